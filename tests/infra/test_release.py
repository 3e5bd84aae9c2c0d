"""What is shipped: images of one registry, signed by a workflow; and the pod that decodes strangers' files."""

import copy
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from components.orchestration import kfp_pipeline
from network_policies import KFP, Cluster

ROOT = Path(__file__).parents[2]
IMAGES = sorted(path.parent.name for path in (ROOT / "infra/images").glob("*/Containerfile"))
REGISTRY = (ROOT / "infra/images/registry").read_text(encoding="utf-8").strip()


def build(folder):
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [*yaml.safe_load_all(done.stdout)]


def images(objects):
    return {line.split()[-1] for line in yaml.safe_dump_all(objects).splitlines() if re.match(r"\s*(- )?image: ", line)}


# --- one registry -----------------------------------------------------------------------------------------------------


def test_one_command_names_another_registry_everywhere(tmp_path):
    for name in ("infra", "docs", "components/orchestration"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    new = "registry.example.com:5000/a.b/team"
    done = subprocess.run([tmp_path / "infra/images/use-registry", new], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in (".webp", ".ipynb")]
    texts = {path: path.read_text(encoding="utf-8") for path in names}
    assert [path for path, text in texts.items() if REGISTRY in text] == []
    before = [path for path in texts if f"{REGISTRY}/" in (ROOT / path.relative_to(tmp_path)).read_text()]
    assert len(before) >= 10
    assert [path for path in before if new not in texts[path]] == []


@pytest.mark.parametrize("name", ["", "team", "https://registry.example.com/team", "registry.example.com/team;x"])
def test_a_wrong_name_of_a_registry_changes_nothing(name, tmp_path):
    shutil.copytree(ROOT / "infra/images", tmp_path / "infra/images")
    command = [tmp_path / "infra/images/use-registry", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "infra/images/registry").read_text().strip() == REGISTRY


def test_all_images_of_the_project_are_of_this_registry(render, airflow_values):
    named = [kfp_pipeline.IMAGE, kfp_pipeline.GPU_IMAGE, f"{airflow_values['defaultAirflowRepository']}:x"]
    named += [one for overlay in ("dev", "gke", "multi-user") for one in images(render(overlay)) if "uni-vigu" in one]
    assert len(named) > 6
    assert all(one.startswith(f"{REGISTRY}/uni-vigu") for one in named)


# --- the workflow and the policy --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))


def test_a_tag_alone_starts_a_release_which_may_publish_and_sign_and_no_more(workflow):
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert job["permissions"] == {"contents": "read", "packages": "write", "id-token": "write"}
    assert set(re.findall(r"secrets\.(\w+)", str(workflow))) == {"GITHUB_TOKEN"}
    for step in job["steps"]:
        assert re.search(r"@v?\d", step.get("uses", "@v1"))
        assert "${{" not in step.get("run", "")  # a name of a branch or tag never becomes part of a script


def test_each_image_is_built_scanned_listed_and_signed_by_its_digest(workflow):
    (job,) = workflow["jobs"].values()
    runs = [step.get("run", step.get("uses", "")) for step in job["steps"]]
    (building,) = [run for run in runs if "buildah build" in run]
    assert sorted(re.findall(r"(\w+):uni-vigu", building)) == IMAGES
    (publishing,) = [run for run in runs if "cosign sign" in run]
    assert re.findall(r"\buni-vigu[\w-]*", re.search(r"for name in (.*); do", publishing)[1]) == re.findall(
        r":(uni-vigu[\w-]*)", building
    )
    assert 'image="$REGISTRY/$name@$(cat digest)"' in publishing
    assert 'cosign sign --yes "$image"' in publishing
    order = [next(i for i, run in enumerate(runs) if text in run) for text in ("buildah build", "trivy", "cosign sign")]
    assert order == sorted(order)
    assert '"BASE=${PYTHON_IMAGE%%:*}@$digest"' in building
    for number, run in enumerate(runs):
        done = subprocess.run(["bash", "-n"], input=run, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (number, done.stderr)


def admitting(image, policies):
    """The names of the policies that match an image, by policy-controller's rules (0.9.0, pkg/apis/glob/glob.go)."""
    host, slash, _ = image.partition("/")
    if not slash or not re.search(r"[.:]", host):
        image = f"index.docker.io/{image if slash else f'library/{image}'}"
    image = image.replace("docker.io/", "index.docker.io/", 1) if host == "docker.io" else image
    found = set()
    for policy in policies:
        for one in policy["spec"]["images"]:
            pattern = re.escape(one["glob"]).replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
            if re.fullmatch(pattern, image):
                found.add(policy["metadata"]["name"])
    return found


FIELDS = {  # of policy.sigstore.dev/v1beta1 (0.9.0, config/300-clusterimagepolicy.yaml), as far as we use them
    "images": {"glob"},
    "authorities": {"name", "keyless", "ctlog", "static"},
    "keyless": {"url", "identities"},
    "identities": {"issuer", "subject", "issuerRegExp", "subjectRegExp"},
    "ctlog": {"url"},
    "static": {"action"},
}


def test_only_our_signed_images_and_other_projects_are_admitted(render):
    policies = build(ROOT / "infra/policies/signed-images")
    assert {one["apiVersion"] for one in policies} == {"policy.sigstore.dev/v1beta1"}

    def walk(value, name=""):
        for key, one in value.items() if isinstance(value, dict) else ():
            assert name not in FIELDS or key in FIELDS[name], (name, key)
            for part in one if isinstance(one, list) else [one]:
                walk(part, key)

    for policy in policies:
        walk(policy["spec"])
    signed, _ = policies
    ((authority,),) = [signed["spec"]["authorities"]]
    (identity,) = authority["keyless"]["identities"]
    workflow = "https://github.com/uni-vigu/uni-vigu/.github/workflows/release.yml@refs"
    assert re.search(identity["subjectRegExp"], f"{workflow}/tags/v0.2.0")
    ci = workflow.replace("release", "ci")
    for other in (f"{workflow}/heads/main", f"{workflow}/tags/v0.2.0-x", f"{ci}/tags/v0.2.0"):
        assert not re.search(identity["subjectRegExp"], other)
    for overlay in ("dev", "gke"):
        for image in images(render(overlay)):
            ours = image.startswith(REGISTRY)
            assert admitting(image, policies) == ({"univigu"} if ours else {"univigu-others"}), image
    for image in images(KFP):
        assert admitting(image, policies) <= {"univigu-others"}, image
    assert admitting("docker.io/stranger/uni-vigu:0.2.0", policies) == set()


# --- the decode pod ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decode():
    return build(ROOT / "infra/kustomize/decode")


def test_a_decode_pod_has_no_network_no_token_no_secret_and_bounds(decode, render, pod_templates, airflow_values):
    account, job = sorted(decode, key=lambda one: one["kind"], reverse=True)
    for one in decode:
        kubernetes_validate.validate(one, "1.34", strict=True)
    pod = job["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    assert account["automountServiceAccountToken"] is pod["automountServiceAccountToken"] is False
    assert "secret" not in str(pod).lower()
    (container,) = pod["containers"]
    assert {"memory", "cpu", "ephemeral-storage"} <= set(container["resources"]["limits"])
    assert job["spec"]["activeDeadlineSeconds"] > 0
    for overlay in ("dev", "gke"):
        cluster = Cluster(copy.deepcopy(render(overlay)), pod_templates(render(overlay)), airflow_values["labels"])
        cluster.pods["decode"] = ("kubeflow", job["spec"]["template"]["metadata"]["labels"])
        targets = [*cluster.pods, "8.8.8.8", "172.18.0.2", "10.0.0.2", "169.254.169.254", "169.254.20.10"]
        for port in ("dns", 53, 80, 443, 5000, 6443, 8333, 8888):
            assert not [one for one in targets if cluster.reaches("decode", one, port)], port


@pytest.mark.slow
def test_the_command_of_the_decode_pod_is_one_of_ours(decode, tmp_path):
    (job,) = [one for one in decode if one["kind"] == "Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    shutil.copytree(ROOT / "model/tiny-wan", tmp_path / "model/tiny-wan")
    arguments = [one.replace("/mnt/univigu", str(tmp_path)) for one in container["args"]]
    command = [sys.executable, "-m", "components.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 66, done.stderr
    assert "There is no folder" in done.stderr  # all else was understood
