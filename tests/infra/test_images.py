"""Container files are pinned and not for root; the pipeline image is built, as far as that goes without a registry."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", ["pipeline", "training", "mlflow"])
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

DEBIAN = ["base-files", "bash", "ca-certificates", "coreutils", "dash", "libc-bin", "libc6", "libgcc-s1", "libstdc++6"]


def make_base(folder):
    """What python:3.11-slim is, out of this Debian machine's own files: a few packages, and Python in /usr/local."""
    python = Path(sys.base_prefix)
    folder.mkdir()
    for name in ("etc", "tmp", "proc", "sys", "dev", "usr/local"):
        (folder / name).mkdir(parents=True)
    listed = subprocess.run(["dpkg", "--listfiles", *DEBIAN], capture_output=True, text=True, check=True).stdout
    files = {line for line in listed.splitlines() if Path(line).exists() and not line.startswith("/usr/share/")}
    binaries = [python / "bin/python3.11", *python.glob("lib/python3.11/lib-dynload/*.so")]
    binaries += [file for file in files if "/bin/" in file]
    needed = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False).stdout
    libraries = {word for line in needed.splitlines() for word in line.split() if re.match(r"/.*[^:]$", word)}
    files |= {file for file in libraries if not file.startswith(str(python))} | {"/etc/ssl/certs/ca-certificates.crt"}
    copy(["--no-recursion", "--dereference", "--files-from=-"], folder, "\n".join(sorted(files)))
    left_out = ["test", "site-packages", "idlelib", "tkinter"]
    excluded = [f"--exclude=lib/python3.11/{name}" for name in left_out]
    copy([f"--directory={python}", *excluded, "--exclude=__pycache__", "bin", "lib"], folder / "usr/local")
    (folder / "etc/ld.so.conf").write_text("/usr/local/lib\n")
    subprocess.run(["/sbin/ldconfig", "-r", folder], check=True)
    (folder / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (folder / "etc/group").write_text("root:x:0:\n")


def copy(what, target, names=""):
    archive = subprocess.run(["tar", "--create", *what], input=names.encode(), capture_output=True, check=True).stdout
    subprocess.run(["tar", "--extract", f"--directory={target}"], input=archive, check=True)


def installer_settings(folder):
    """This machine's settings of pip, as the build secrets `pip` and `uv`; and its folders of local wheels."""
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


@pytest.fixture(scope="session")
def pipeline_image(tmp_path_factory):
    """The pipeline's image, built from the repository: its root file system, and a function that runs a command in it.

    Its base is made from this machine, torch is whichever build this machine's pip finds, and nothing is compiled to
    bytecode; all else is as in a release.
    """
    if shutil.which("buildah") is None or os.geteuid() != 0 or shutil.which("dpkg") is None:
        pytest.skip("building an image takes Debian's buildah, and root: apt-get install buildah")
    folder = tmp_path_factory.mktemp("image")
    make_base(folder / "base")
    wheels = installer_settings(folder)
    store = ["--root", folder / "storage", "--runroot", folder / "run", "--storage-driver", "vfs"]

    def buildah(*arguments):
        command = ["buildah", *store, *arguments]
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout.strip()

    base = buildah("from", "scratch")
    buildah("add", "--quiet", base, folder / "base", "/")
    buildah("commit", "--quiet", "--rm", base, "localhost/base:0.0.0")
    shutil.rmtree(folder / "base")
    try:
        buildah(
            *["bud", "--isolation", "chroot", "--layers=false", "--tag", "localhost/pipeline:0.0.0"],
            *["--file", IMAGES / "pipeline/Containerfile", "--build-arg", "BASE=localhost/base:0.0.0"],
            *["--build-arg", "TORCH=", "--build-arg", "BYTECODE=0"],
            *["--secret", f"id=pip,src={folder}/pip.conf", "--secret", f"id=uv,src={folder}/uv.toml"],
            *(f"--volume={path}:{path}:ro" for path in wheels),
            ".",
        )
        container = buildah("from", "localhost/pipeline:0.0.0")
        root = Path(buildah("mount", container))
        yield root, lambda *command: buildah("run", "--isolation", "chroot", container, "--", *command)
        buildah("umount", container)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_the_pipelines_image_runs_a_step_as_a_user_who_may_change_nothing_in_it(pipeline_image):
    root, run = pipeline_image
    assert run("sh", "-c", "id -u; id -g").split() == ["1000", "1000"]
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
