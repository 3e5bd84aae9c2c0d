"""The compiled pipeline has the steps of stages.py, with their inputs, parameters and resources."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from components.orchestration import kfp_pipeline
from components.orchestration.kfp_tasks import declaration
from components.pipeline.stages import STAGES, find_stage

ROOT = Path(__file__).parents[3]
IDS = [stage.name for stage in STAGES]
CONTROL = {"check-prerequisites", "cache-keys", "notify"}


@pytest.fixture(scope="module")
def committed():
    return list(yaml.safe_load_all((ROOT / kfp_pipeline.PACKAGE).read_text()))


@pytest.fixture(scope="module")
def tasks(committed):
    return steps_and_edges(committed[0])


def steps_and_edges(spec):
    """Every task that runs a step, by the step's name: its settings, and the steps that it depends on.

    Groups (loops, conditions, the exit handler) are looked through: what goes into a group is followed into it.
    """
    found = {}

    def component_of(task):
        return spec["components"][task["componentRef"]["name"]]

    def steps_of(name, dag):
        """The steps that a task, or a group of tasks, runs."""
        inner = component_of(dag["tasks"][name]).get("dag")
        return (
            set().union(*(steps_of(each, inner) for each in inner["tasks"])) if inner else {name_of(dag["tasks"][name])}
        )

    def walk(dag, outer):
        for name, task in dag["tasks"].items():
            sources = {}  # the task whose output each input is, here or around the group
            for key, value in task.get("inputs", {}).get("parameters", {}).items():
                if "taskOutputParameter" in value:
                    sources[key] = steps_of(value["taskOutputParameter"]["producerTask"], dag)
                elif "componentInputParameter" in value:
                    sources[key] = outer.get(value["componentInputParameter"], set())
            component = component_of(task)
            if "dag" in component:
                walk(component["dag"], sources)
                continue
            waits_for = set().union(*sources.values())
            found.setdefault(name_of(task), []).append((name, task, component, waits_for))

    walk(spec["root"]["dag"], {})
    return found


def name_of(task):
    """The step that a task runs; its own name if it runs none."""
    step = task.get("inputs", {}).get("parameters", {}).get("step", {}).get("runtimeValue", {}).get("constant")
    return step or task["taskInfo"]["name"]


def constant(task, name):
    return task["inputs"]["parameters"][name]["runtimeValue"]["constant"]


def platform_of(committed, component):
    return committed[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"][component["executorLabel"]]


def container_of(committed, component):
    return committed[0]["deploymentSpec"]["executors"][component["executorLabel"]]["container"]


def test_the_committed_file_is_what_the_table_compiles_to(tmp_path):
    # in a process of its own: kfp looks through all imported modules at each setting, and here these are thousands
    command = [sys.executable, "-m", "components.cli.main", "pipeline", "compile", "--output"]
    subprocess.run([*command, tmp_path / "pipeline.yaml"], cwd=ROOT, check=True)
    fresh = (tmp_path / "pipeline.yaml").read_text()
    assert fresh == (ROOT / kfp_pipeline.PACKAGE).read_text(), "run `univigu pipeline compile` and commit the file"


def test_the_pipeline_has_the_steps_of_the_table(tasks):
    assert tasks.keys() - CONTROL == set(IDS)


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_a_step_waits_for_the_steps_of_the_table(tasks, stage):
    for _, _, _, waits_for in tasks[stage.name]:
        assert waits_for - {"check-prerequisites", "cache-keys", stage.name} == set(stage.inputs.values())


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_a_step_reads_the_parameters_of_the_table(tasks, stage):
    for _, task, _, _ in tasks[stage.name]:
        declared = constant(task, "declared")
        assert declared == declaration(stage.name)
        assert set(declared["parameters"]) == {*stage.sources.values(), *stage.parameters}


def test_a_step_in_shards_fans_out_and_is_committed_by_one_task_without_gpu(committed, tasks):
    for stage in STAGES:
        names = [name.rstrip("-0123456789") for name, *_ in tasks[stage.name]]
        if not stage.sharded:
            assert set(names) <= {"run-step", "run-trainjob"}
            continue
        assert sorted(names) == ["commit-parts", "run-part"]
        for name, task, component, waits_for in tasks[stage.name]:
            asked = "accelerator" in container_of(committed, component)["resources"]
            assert asked == (name.startswith("run-part") and stage.resources.pool != "cpu")
            if name.startswith("commit"):
                assert stage.name in waits_for
                assert "made" in task["inputs"]["parameters"]
    assert {stage.name for stage in STAGES if stage.sharded} >= {"synthesize-videos", "caption-videos"}


def test_a_training_step_runs_in_a_gpu_pod_or_as_a_trainjob_started_by_a_cpu_pod(committed, tasks):
    for stage in STAGES:
        if stage.resources.pool != "training":
            continue
        asks_for_gpus = {
            name.rstrip("-0123456789"): "accelerator" in container_of(committed, component)["resources"]
            for name, _, component, _ in tasks[stage.name]
        }
        assert asks_for_gpus == {"run-step": True, "run-trainjob": False}


def test_every_parameter_that_a_task_or_its_pod_uses_reaches_it(committed):
    spec, platform = committed
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]

    def used(value):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from [inner] if key == "componentInputParameter" else used(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from used(inner)

    for name, component in {**spec["components"], "root": spec["root"]}.items():
        for task in component.get("dag", {}).get("tasks", {}).values():
            wanted = {*used(task.get("inputs", {}))}
            inner = spec["components"][task["componentRef"]["name"]]
            wanted_by_pod = {*used(executors.get(inner.get("executorLabel"), {}))}
            assert wanted <= component["inputDefinitions"]["parameters"].keys(), name
            assert (
                wanted_by_pod
                <= component["inputDefinitions"]["parameters"].keys() | task["inputs"]["parameters"].keys()
            )


def test_pods_have_the_volume_no_privileges_and_their_secrets_by_reference(committed, tasks):
    of_steps = {stage.name: set(stage.secrets) for stage in STAGES}
    of_steps["check-prerequisites"] = set().union(*of_steps.values())  # it asks the services that they are for
    assert of_steps["check-prerequisites"]
    for name, group in tasks.items():
        for _, _, component, _ in group:
            pod = platform_of(committed, component)
            assert [mount["mountPath"] for mount in pod["pvcMount"]] == [kfp_pipeline.MOUNT]
            assert pod["securityContext"] == {
                "runAsUser": str(kfp_pipeline.USER),
                "runAsGroup": str(kfp_pipeline.USER),
                "runAsNonRoot": True,
            }
            secrets = {secret["secretName"]: secret["optional"] for secret in pod["secretAsEnv"]}
            assert secrets.pop(kfp_pipeline.TRACKING_SECRET) is True
            assert set(secrets) - {kfp_pipeline.NOTIFY_SECRET} == of_steps.get(name, set())
            assert set(secrets.values()) <= {True}
    ((_, _, last, _),) = tasks["notify"]
    assert kfp_pipeline.NOTIFY_SECRET in {
        secret["secretName"] for secret in platform_of(committed, last)["secretAsEnv"]
    }


def test_a_pod_with_gpus_has_its_pool_and_shared_memory(committed, tasks):
    seen = 0
    for stage in STAGES:
        for _, _, component, _ in tasks[stage.name]:
            resources, pod = container_of(committed, component)["resources"], platform_of(committed, component)
            if "accelerator" not in resources:
                assert "nodeSelector" not in pod
                continue
            seen += 1
            pool = {"gpu": "gpu", "training": "training"}[stage.resources.pool]
            gpus = {"gpu": "gpus", "training": "training_gpus"}[stage.resources.pool]
            assert f"--{gpus}'" in resources["accelerator"]["resourceCount"]
            assert "--accelerator'" in resources["accelerator"]["resourceType"]
            selector = pod["nodeSelector"]["nodeSelectorJson"]["componentInputParameter"]
            assert selector.endswith(f"--{pool}_node_selector")
            assert pod["tolerations"][0]["tolerationJson"]["componentInputParameter"].endswith("--tolerations")
            assert pod["emptyDirMounts"] == [
                {"volumeName": "shm", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "16Gi"}
            ]
    assert seen == 5


@pytest.mark.parametrize("name", [*IDS, *sorted(CONTROL)])
def test_a_task_is_retried_with_growing_delays_a_limited_number_of_times(committed, tasks, name):
    hours = kfp_pipeline.CONTROL_HOURS if name in CONTROL else find_stage(name).resources.hours
    for _, task, component, _ in tasks[name]:
        assert task["retryPolicy"] == {
            "maxRetryCount": kfp_pipeline.RETRIES,
            "backoffDuration": f"{kfp_pipeline.BACKOFF_S}s",
            "backoffFactor": 2.0,
            "backoffMaxDuration": f"{kfp_pipeline.retry_window(kfp_pipeline.RETRIES, hours)}s",
        }
        assert platform_of(committed, component)["activeDeadlineSeconds"] == str(hours * 3600)


def test_training_runs_as_a_trainjob_unless_asked_otherwise(committed):
    assert committed[0]["root"]["inputDefinitions"]["parameters"]["train_backend"]["defaultValue"] == "trainjob"


def test_steps_are_cached_by_their_key_and_other_tasks_are_not_cached(tasks):
    for name, group in tasks.items():
        for _, task, _, _ in group:
            cached = name not in CONTROL and not find_stage(name).external
            assert task["cachingOptions"].get("enableCache", False) == cached
            if name not in CONTROL:
                assert task["inputs"]["parameters"]["cache_key"].keys() & {
                    "taskOutputParameter",
                    "componentInputParameter",
                }


def test_the_images_and_the_volume_are_parameters(committed, tasks):
    parameters = committed[0]["root"]["inputDefinitions"]["parameters"]
    assert parameters["image"]["defaultValue"] == kfp_pipeline.IMAGE
    assert parameters["gpu_image"]["defaultValue"] == kfp_pipeline.GPU_IMAGE
    for group in tasks.values():
        for _, _, component, _ in group:
            container = container_of(committed, component)
            wanted = "gpu_image" if "accelerator" in container["resources"] else "image"
            assert container["image"].endswith(f"--{wanted}']}}}}") or container["image"].endswith(f"'{wanted}']}}}}")
            assert platform_of(committed, component)["pvcMount"][0]["componentInputParameter"].endswith("work_pvc")
