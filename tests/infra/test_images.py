"""Container files are pinned and not for root, and what they build runs as that user."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from components.orchestration.airflow_server import free_port

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "infra/images"
NAMES = ["pipeline", "training", "mlflow", "airflow"]


def instructions(name):
    """(instruction, arguments) of a container file, without comments and continuation lines."""
    text = (IMAGES / name / "Containerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def test_there_is_a_container_file_for_each_image():
    assert sorted(path.parent.name for path in IMAGES.glob("*/Containerfile")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_base_is_pinned_and_the_user_is_not_root(name):
    lines = instructions(name)
    arguments = dict(value.split("=", 1) for instruction, value in lines if instruction == "ARG")
    bases = [re.sub(r"\$\{(\w+)\}", lambda m: arguments[m[1]], value) for key, value in lines if key == "FROM"]
    for base in bases:
        assert re.fullmatch(r"[a-z0-9./-]+(:\d+\.\d+\.\d+[\w.-]*|@sha256:[0-9a-f]{64})", base), base
    users = [value for key, value in lines if key == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]), users


@pytest.mark.parametrize("name", NAMES)
def test_packages_are_locked_and_nothing_is_fetched_by_address(name):
    for key, value in instructions(name):
        assert key != "ADD"
        assert "curl" not in value
        assert "wget" not in value
        if key == "RUN" and "pip install" in value:
            assert re.search(r"--constraint constraints\.txt|--no-deps", value), value
    for lock in IMAGES.glob("*/requirements.txt"):
        for line in lock.read_text(encoding="utf-8").splitlines():
            assert re.fullmatch(r"#.*|apache-airflow|[\w.-]+==[\w.]+", line), line


@pytest.mark.parametrize("name", NAMES)
def test_what_is_copied_is_in_the_build_context(name):
    kept = [
        line[1:] for line in (ROOT / ".containerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"
    ]
    for key, value in instructions(name):
        if key == "COPY":
            for source in value.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(f"{one}/".startswith(f"{source}/") or f"{source}/".startswith(f"{one}/") for one in kept)


# --- a real build ----------------------------------------------------------------------------------------------------

# within a container, no process compiles what an earlier one has compiled, which the images leave out here
COMPILE_ONCE = ["--env", "PYTHONDONTWRITEBYTECODE=", "--env", "PYTHONPYCACHEPREFIX=/tmp/pycache"]
WHO = ("python", "-c", "import os; print(os.getuid(), os.getgid())")


def make_base(folder):
    """A substitute for python:3.11-slim from this Debian machine's files: essential packages, apt and Python."""
    python = Path(sys.base_prefix)
    for name in ("etc", "tmp", "proc", "sys", "dev", "usr/local", "var/lib/dpkg/triggers", "var/cache/apt/archives"):
        (folder / name).mkdir(parents=True)
    form = "--showformat=${Essential} ${db:Status-Status} ${Package}\n"
    known = [line.split() for line in output("dpkg-query", "--show", form).splitlines()]
    wanted = [name for essential, _, name in known if essential == "yes"] + ["apt", "mawk"]
    closure = output("apt-cache", "depends", "--recurse", "--installed", "--important", *wanted).splitlines()
    names = [name for _, status, name in known if status == "installed" and name in closure]
    unneeded = re.compile("/usr/share/(doc|info|lintian|locale|man)/")
    files = {line for line in output("dpkg", "--listfiles", *names).splitlines() if Path(line).exists()}
    files |= {str(path) for path in Path("/var/lib/dpkg/info").iterdir() if path.stem.split(":")[0] in names}
    files |= {str(path) for path in Path("/etc/apt").glob("sources.list.d/debian.sources")}
    files |= {"/etc/ssl/certs/ca-certificates.crt", "/var/lib/dpkg/info/format", "/var/lib/dpkg/triggers/ldconfig"}
    binaries = [python / "bin/python3.11", *python.glob("lib/python3.11/lib-dynload/*.so")]
    binaries += [file for file in files if "/bin/" in file]
    linked = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False).stdout
    libraries = {word for line in linked.splitlines() for word in line.split() if re.match(r"/.*[^:]$", word)}
    files = {file for file in files if not unneeded.match(file)}
    files |= {file for file in libraries if not file.startswith(str(python))}
    copy(["--no-recursion", "--dereference", "--files-from=-"], folder, "\n".join(sorted(files)))
    left_out = ["test", "site-packages", "idlelib", "tkinter"]
    excluded = [f"--exclude=lib/python3.11/{name}" for name in left_out]
    copy([f"--directory={python}", *excluded, "--exclude=__pycache__", "bin", "lib"], folder / "usr/local")
    (folder / "var/lib/dpkg/status").write_text(output("dpkg", "--status", *names))
    (folder / "etc/ld.so.conf").write_text("/usr/local/lib\n")
    subprocess.run(["/sbin/ldconfig", "-r", folder], check=True)
    (folder / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (folder / "etc/group").write_text("root:x:0:\n")


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def copy(what, target, names=""):
    archive = subprocess.run(["tar", "--create", *what], input=names.encode(), capture_output=True, check=True).stdout
    subprocess.run(["tar", "--extract", f"--directory={target}"], input=archive, check=True)


def installer_settings(folder):
    """This machine's pip settings as the build secrets `pip` and `uv`, and its folders of local wheels."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    known = dict(re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", listed.stdout, re.M))
    wheels = [path for path in known.get("find-links", "").split() if Path(path).is_dir()]
    kept = {key: known[key] for key in ("index-url", "find-links", "timeout") if key in known}
    certificates = "/etc/ssl/certs/ca-certificates.crt"
    lines = [f"{key} = {value}\n" for key, value in {**kept, "cert": certificates}.items()]
    (folder / "pip.conf").write_text("[global]\n" + "".join(lines))
    index = f'index-url = "{known["index-url"]}"\n' if "index-url" in known else ""
    (folder / "uv.toml").write_text(f"system-certs = true\nfind-links = {wheels!r}\n{index}")
    return wheels


class Store:
    """An image store in a folder, in which this repository's images are built without a registry.

    Their base is made from this machine, torch is whichever build this machine's pip finds, and nothing is compiled to
    bytecode; all else is as in a release. Wheels stay in buildah's cache, for the next time.
    """

    def __init__(self, folder):
        self.folder, self.wheels = folder, installer_settings(folder)
        nested = output("stat", "--file-system", "--format=%T", folder).strip() == "overlayfs"
        self.driver = "vfs" if nested else "overlay"
        make_base(folder / "base")
        base = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", base, folder / "base", "/")
        self.buildah("commit", "--quiet", "--rm", base, "localhost/base:0.0.0")
        shutil.rmtree(folder / "base")

    def remove(self):
        self.buildah("rm", "--all")
        subprocess.run(["umount", "--quiet", self.folder / "storage/overlay"], check=False)  # a mount of buildah's own
        subprocess.run(["rm", "-rf", self.folder], check=False)

    def buildah(self, *arguments):
        where = ["--root", self.folder / "storage", "--runroot", self.folder / "run", "--storage-driver", self.driver]
        command = ["buildah", *where, *arguments]
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout.strip()

    def build(self, name, bytecode="0"):
        """Build an image; returns its root file system, and a function that runs a command in it as its user."""
        given = {"BASE": "localhost/base:0.0.0", "PIPELINE": "localhost/pipeline:0.0.0"}
        given |= {"TORCH": "", "BYTECODE": bytecode}
        declared = {
            value.split("=")[0] for instruction, value in instructions(name) if instruction == "ARG"
        } & given.keys()
        self.buildah(
            *["bud", "--isolation", "chroot", "--layers=false", "--tag", f"localhost/{name}:0.0.0"],
            *["--timestamp", "1", "--file", IMAGES / name / "Containerfile"],
            *(f"--build-arg={argument}={given[argument]}" for argument in sorted(declared)),
            *["--secret", f"id=pip,src={self.folder}/pip.conf", "--secret", f"id=uv,src={self.folder}/uv.toml"],
            *(f"--volume={path}:{path}:ro" for path in self.wheels),
            ".",
        )
        container = self.buildah("from", f"localhost/{name}:0.0.0")
        root = Path(self.buildah("mount", container))
        run = ["run", "--isolation", "chroot", *COMPILE_ONCE, container, "--"]
        return root, lambda *command: self.buildah(*run, *command)

    def digest(self, name):
        """The digest of the image that was built last."""
        return self.buildah("inspect", "--type", "image", "--format", "{{.FromImageDigest}}", f"localhost/{name}:0.0.0")


MEMORY = Path("/dev/shm")  # twice as fast as a disk


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    if shutil.which("buildah") is None or os.geteuid() != 0 or shutil.which("dpkg") is None:
        pytest.skip("building an image takes Debian's buildah, and root: apt-get install buildah")
    has_memory = MEMORY.is_dir() and min(shutil.disk_usage(MEMORY).free, psutil.virtual_memory().available) > 14 * 2**30
    folder = tempfile.mkdtemp(prefix="images-", dir=MEMORY if has_memory else tmp_path_factory.mktemp("images"))
    made = Store(Path(folder))
    yield made
    made.remove()


@pytest.fixture(scope="session")
def pipeline_image(store):
    return store.build("pipeline")


@pytest.fixture(scope="session")
def airflow_image(store, pipeline_image):
    return store.build("airflow")


@pytest.mark.slow
def test_the_pipelines_image_runs_a_step_as_an_unprivileged_user(pipeline_image):
    root, run = pipeline_image
    assert run(*WHO) == "1000 1000"
    # as the job univigu-work copies them
    sources = "data/prompts data/heldout.json data/evaluation-prompts.jsonl model/tiny-wan"
    run("sh", "-c", f"mkdir /tmp/work && cd /opt/univigu && cp -r --no-clobber --parents {sources} /tmp/work")
    said = run("univigu", "run", "curate-prompts", "--profile", "smoke", "--root", "/tmp/work")
    assert "curate-prompts:" in said
    assert (root / "tmp/work/data/curated/manifest.json").is_file()
    theirs = ["(", "-user", "1000", "-o", "-perm", "-o+w", ")", "!", "-type", "l"]
    found = subprocess.run(["find", root / "opt", root / "usr", *theirs], capture_output=True, text=True, check=True)
    assert found.stdout == ""


@pytest.mark.slow
def test_the_pipelines_image_holds_neither_the_builders_settings_nor_other_files_of_the_repository(pipeline_image):
    root, _ = pipeline_image
    assert not (root / "etc/pip.conf").is_file()
    assert not (root / "etc/uv/uv.toml").is_file()
    assert sorted(path.name for path in (root / "opt/univigu").iterdir() if not path.name.endswith(".egg-info")) == [
        *["LICENSE", "README.md", "components", "constraints.txt", "data", "model", "pyproject.toml"]
    ]


@pytest.mark.slow
def test_the_training_image_has_what_rdma_needs_and_the_launcher_of_training(store, pipeline_image):
    """Built with the pipeline's torch instead of a CUDA build, which has gigabytes and needs a GPU."""
    _, run = store.build("training")
    assert run(*WHO) == "1000 1000"
    run("python", "-c", "import ctypes; ctypes.CDLL('libibverbs.so.1')")
    assert "--nproc-per-node" in run("python", "-m", "univigu.training.launch", "--help")


@pytest.mark.slow
def test_the_airflow_image_loads_the_dags_and_grooms_its_logs(airflow_image, airflow_values):
    _, run = airflow_image
    assert run(*WHO) == "1000 1000"
    load = "from airflow.dag_processing.dagbag import DagBag as B; b = B(); print(sorted(b.dags), b.import_errors)"
    said = run("env", "AIRFLOW_HOME=/tmp/airflow", "python", "-c", load)
    assert said.splitlines()[-1] == "['new_data', 'retrain'] {}"
    groomer = airflow_values["scheduler"]["logGroomerSidecar"]
    (script,) = groomer["args"]
    logs = "/tmp/groomed/logs"
    run("sh", "-c", f"mkdir -p {logs} && touch {logs}/new && touch -d '16 days ago' {logs}/old")
    settings = ["env", "AIRFLOW_HOME=/tmp/groomed", "AIRFLOW__LOG_RETENTION_DAYS=15"]
    run(*settings, *groomer["command"], f"sleep() {{ exit 0; }}; {script}")
    assert run("ls", logs) == "new"


SERVE = """
import os, signal, subprocess, sys, time, urllib.request
server = subprocess.Popen(["mlflow", "server", "--port", sys.argv[1], "--workers", "1"], start_new_session=True)
try:
    for _ in range(240):
        try:
            print(urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/health").read().decode())
            break
        except OSError:
            assert server.poll() is None
            time.sleep(0.5)
finally:
    os.killpg(server.pid, signal.SIGTERM)
    server.wait()
"""


@pytest.mark.slow
def test_the_mlflow_image_serves_and_has_the_drivers_of_its_stores(store):
    _, run = store.build("mlflow")
    assert run(*WHO) == "1000 1000"
    settings = ["env", "MLFLOW_BACKEND_STORE_URI=sqlite:////tmp/mlflow.db"]
    assert "OK" in run(*settings, "python", "-c", SERVE, str(free_port())).splitlines()
    run("python", "-c", "import boto3, google.cloud.storage, psycopg2")


@pytest.mark.slow
def test_an_image_that_is_built_again_on_another_day_is_the_same(store, airflow_image):
    """Of the four, one that takes little time."""
    before = store.digest("airflow")
    store.build("airflow")
    assert store.digest("airflow") == before
