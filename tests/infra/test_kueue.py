"""The queue for TrainJobs is what Kueue 0.19.2 accepts, and one of our TrainJobs can be admitted to it."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from components.orchestration.train_job import Settings, build
from components.pipeline.stages import find_stage

ROOT = Path(__file__).parents[2]
# The fields that we use, of apis/kueue/v1beta2 (clusterqueue_types.go, resourceflavor_types.go, localqueue_types.go,
# workloadpriorityclass_types.go): a dict has these fields at most, a list has elements like this one.
SELECTOR = {"matchLabels": dict, "matchExpressions": list}
QUOTA = {"name": str, "nominalQuota": str, "borrowingLimit": str, "lendingLimit": str}
GROUP = {"coveredResources": [str], "flavors": [{"name": str, "resources": [QUOTA]}]}
TOLERATION = {"key": str, "operator": str, "effect": str, "value": str}
SPECS = {
    "ResourceFlavor": {"spec": {"nodeLabels": dict, "nodeTaints": list, "tolerations": [TOLERATION]}},
    "ClusterQueue": {
        "spec": {
            "namespaceSelector": SELECTOR,
            "queueingStrategy": ("StrictFIFO", "BestEffortFIFO"),
            "preemption": {"withinClusterQueue": ("Never", "LowerPriority", "LowerOrNewerEqualPriority")},
            "resourceGroups": [GROUP],
        }
    },
    "LocalQueue": {"spec": {"clusterQueue": str}},
    "WorkloadPriorityClass": {"value": int, "description": str},
}
HEAD = {"apiVersion": ("kueue.x-k8s.io/v1beta2",), "kind": str, "metadata": dict}


@pytest.fixture(scope="module")
def queues():
    command = ["kubectl", "kustomize", ROOT / "infra/kustomize/kueue"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [*yaml.safe_load_all(done.stdout)]


def wrong(value, schema, where=""):
    """What a value has that the schema doesn't allow."""
    if isinstance(schema, type):
        return [] if isinstance(value, schema) else [f"{where} is {value!r}"]
    if isinstance(schema, tuple):
        return [] if value in schema else [f"{where} is {value!r}"]
    if not isinstance(value, type(schema)):
        return [f"{where} is {value!r}"]
    if isinstance(schema, list):
        return [problem for one in value for problem in wrong(one, schema[0], f"{where}[]")]
    unknown = [f"{where}.{key} is unknown" for key in value.keys() - schema.keys()]
    return unknown + [
        p for key in value.keys() & schema.keys() for p in wrong(value[key], schema[key], f"{where}.{key}")
    ]


def of_kind(queues, kind):
    return {one["metadata"]["name"]: one for one in queues if one["kind"] == kind}


def test_each_object_has_only_fields_of_its_kind(queues):
    for one in queues:
        assert wrong(one, {**HEAD, **SPECS[one["kind"]]}) == []
    (queue,) = of_kind(queues, "ClusterQueue").values()
    misspelt = {**queue, "spec": {**queue["spec"], "cohort": "a"}}
    assert wrong(misspelt, {**HEAD, **SPECS["ClusterQueue"]}) == [".spec.cohort is unknown"]


def test_the_queues_refer_to_what_is_there(queues, render):
    (local,) = of_kind(queues, "LocalQueue").values()
    (cluster,) = of_kind(queues, "ClusterQueue").values()
    assert local["spec"]["clusterQueue"] == cluster["metadata"]["name"]
    flavors = {flavor["name"] for group in cluster["spec"]["resourceGroups"] for flavor in group["flavors"]}
    assert flavors == set(of_kind(queues, "ResourceFlavor"))
    namespaces = {one["metadata"]["name"] for one in render("gke") if one["kind"] == "Namespace"}
    assert local["metadata"]["namespace"] in namespaces
    selected = cluster["spec"]["namespaceSelector"]["matchLabels"]
    assert selected == {"kubernetes.io/metadata.name": local["metadata"]["namespace"]}


@pytest.mark.parametrize("step", ["train-stage-1", "train-stage-2"])
def test_a_trainjob_of_two_nodes_can_be_admitted_and_one_of_three_waits(queues, step, render):
    (local,) = of_kind(queues, "LocalQueue")
    (cluster,) = of_kind(queues, "ClusterQueue").values()
    (group,) = cluster["spec"]["resourceGroups"]
    quota = {one["name"]: one["nominalQuota"] for one in group["flavors"][0]["resources"]}
    job = build(find_stage(step), "0" * 64, "wan-1.3b", Path("/work"), Settings(queue=local, nodes=2))
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local
    (limits,) = [one for one in render("gke") if one["kind"] == "LimitRange"]
    (default,) = [one["defaultRequest"] for one in limits["spec"]["limits"]]  # Kueue counts it like a request
    requests = {**default, **job["spec"]["trainer"]["resourcesPerNode"]["requests"]}
    assert set(requests) == set(quota) == set(group["coveredResources"])  # it admits no other resource
    for name, asked in requests.items():
        assert 2 * number(asked) <= number(quota[name]) < 3 * number(asked), name


def test_the_priorities_that_the_pages_name_exist_and_a_trainjob_names_one(queues):
    page = (ROOT / "docs/operate.md").read_text(encoding="utf-8")
    classes = of_kind(queues, "WorkloadPriorityClass")
    assert set(re.findall(r"`(?:training_priority=)?(univigu-(?:urgent|background))`", page)) == set(classes)
    for name in classes:
        job = build(
            find_stage("train-stage-1"), "0" * 64, "tiny", Path("/work"), Settings(queue="univigu", priority=name)
        )
        assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == name


def number(quantity):
    return int(quantity.removesuffix("Gi"))
