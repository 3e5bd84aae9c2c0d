"""Fixtures of infra/: overlays as kustomize renders them, and the values of Airflow's chart."""

import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from network_policies import KFP

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def render():
    """A function from an overlay's name to all its objects."""
    return _render


@pytest.fixture(scope="session", params=["dev", "gke"])
def objects(request):
    """All objects of an overlay, each overlay in turn."""
    return _render(request.param)


@pytest.fixture(scope="session")
def pod_templates():
    """A function from objects to their pod templates, with namespaces, by kind, namespace and name."""
    return _pod_templates


@pytest.fixture(scope="session")
def airflow_values():
    return yaml.safe_load((ROOT / "infra/airflow/values.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def kubeflow_pipelines(tmp_path_factory):
    """Our two folders of Kubeflow Pipelines, built on what we rely on of its own manifests."""
    built = []
    for name, of_the_cluster in (("cluster-scoped", True), (".", False)):
        folder = tmp_path_factory.mktemp("kfp")
        source = ROOT / "infra/kustomize/kubeflow-pipelines" / name
        settings = yaml.safe_load((source / "kustomization.yaml").read_text(encoding="utf-8"))
        upstream = [one for one in KFP if (one["kind"] == "Namespace") == of_the_cluster]
        (folder / "upstream.yaml").write_text(yaml.safe_dump_all(upstream))
        (folder / "kustomization.yaml").write_text(yaml.safe_dump({**settings, "resources": ["upstream.yaml"]}))
        for patch in settings["patches"]:
            if "path" in patch:
                (folder / patch["path"]).write_text((source / patch["path"]).read_text(encoding="utf-8"))
        built += _build(folder)
    return built


def _build(folder: Path) -> list[dict]:
    command = ["kubectl", "kustomize", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "goroutine" in done.stderr:  # kubectl itself has crashed, as it did once in hundreds of builds
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [*yaml.safe_load_all(done.stdout)]


@cache
def _render(overlay: str) -> list[dict]:
    return _build(ROOT / "infra/kustomize/overlays" / overlay)


def _pod_templates(objects: list[dict]) -> dict[str, dict]:
    found = {}
    for one in objects:
        spec = one.get("spec", {})
        if one["kind"] == "TrainingRuntime":
            for job in spec["template"]["spec"]["replicatedJobs"]:
                found[f"TrainingRuntime/{job['name']}"] = (one, job["template"]["spec"]["template"])
        elif "template" in spec:
            found[f"{one['kind']}/{one['metadata']['namespace']}/{one['metadata']['name']}"] = (one, spec["template"])
    return {
        name: {
            **template,
            "metadata": {**template.get("metadata", {}), "namespace": owner["metadata"]["namespace"]},
        }
        for name, (owner, template) in found.items()
    }
