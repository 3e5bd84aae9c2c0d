"""What the documentation says about retries is what Argo does with the compiled pipeline (see `argo_retries.py`)."""

import json
import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

import argo_retries as argo
from components.orchestration import kfp_pipeline
from components.pipeline.stages import STAGES, find_stage
from univigu import errors

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra/kustomize/kubeflow-pipelines"
USELESS = [2, 65, 66, 73, 74, 78, 80]  # exit codes that a retry can't fix
USEFUL = [1, 70, 75, 81, 82, 137, 143]


@pytest.fixture(scope="session")
def server(kubeflow_pipelines):
    """The variables that our patch of KFP's API server sets."""
    (deployment,) = [
        one for one in kubeflow_pipelines if one["kind"] == "Deployment" and one["metadata"]["name"] == "ml-pipeline"
    ]
    kubernetes_validate.validate(deployment, "1.34", strict=True)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert len({one["name"] for one in container["env"]}) == len(container["env"])
    return {one["name"]: one["value"] for one in container["env"] if "value" in one}


@pytest.fixture(scope="session")
def patch(server):
    return json.loads(server["COMPILED_PIPELINE_SPEC_PATCH"])["templateDefaults"]["retryStrategy"]


@pytest.fixture(scope="session")
def tasks():
    """(name, its step's time limit in seconds, its retryPolicy, number of groups around it) of each compiled task."""
    pipeline, _ = yaml.safe_load_all((ROOT / kfp_pipeline.PACKAGE).read_text(encoding="utf-8"))
    found = []

    def walk(dag, depth):
        for name, task in dag["tasks"].items():
            component = pipeline["components"][task["componentRef"]["name"]]
            if "dag" in component:
                iterated = 1 if "parameterIterator" in task else 0
                walk(component["dag"], depth + 1 + iterated)
                continue
            constant = task.get("inputs", {}).get("parameters", {}).get("step", {}).get("runtimeValue", {})
            step = constant.get("constant")
            hours = find_stage(step).resources.hours if step else kfp_pipeline.CONTROL_HOURS
            found.append((step or name, hours * 3600, task["retryPolicy"], depth + 1))  # KFP puts a group around a pod

    walk(pipeline["root"]["dag"], 2)  # the workflow's entrypoint, and the root
    assert {name for name, *_ in found} >= {stage.name for stage in STAGES}
    return found


def test_a_step_is_tried_three_times_after_one_and_two_minutes_unless_a_retry_cannot_help(tasks, patch):
    for name, _, policy, _ in tasks:
        plan = argo.strategy(policy, patch)
        for code in USEFUL:
            assert [pod.created for pod in argo.attempts(plan, argo.exit_code(code))] == [0, 60, 180], (name, code)
        for code in USELESS:
            assert len(argo.attempts(plan, argo.exit_code(code))) == 1, (name, code)
        assert len(argo.attempts(plan, argo.exit_code(0))) == 1


def test_each_error_class_is_retried_if_trying_again_may_help(patch, tasks):
    plan = argo.strategy(tasks[0][2], patch)
    retried = {
        code: len(argo.attempts(plan, argo.exit_code(code))) > 1
        for code in {one.exit_code for one in vars(errors).values() if hasattr(one, "exit_code")}
    }
    wanted = {errors.TransientError, errors.PreemptedError, errors.BusyError, errors.UniViGUError}
    assert {code for code, again in retried.items() if again} == {one.exit_code for one in wanted}


def test_pods_and_trainjobs_agree_on_the_exit_codes_that_a_retry_cannot_fix(render):
    (runtime,) = [one for one in render("dev") if one["kind"] == "TrainingRuntime"]
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    rules = job["template"]["spec"]["podFailurePolicy"]["rules"]
    (fatal,) = [rule["onExitCodes"]["values"] for rule in rules if rule["action"] == "FailJob"]
    assert fatal == USELESS


@pytest.mark.parametrize("how", argo.LOST)
def test_a_lost_pod_is_replaced(tasks, patch, how):
    for name, _, policy, _ in tasks:
        assert len(argo.attempts(argo.strategy(policy, patch), argo.LOST[how])) == 3, name


def test_a_step_that_fails_at_the_end_of_its_time_limit_has_all_its_tries_and_all_the_time_for_each(tasks, patch):
    pending = 29 * 24 * 3600.0
    for name, limit, policy, _ in tasks:
        made = argo.attempts(argo.strategy(policy, patch), argo.exit_code(81, pending, limit))
        assert len(made) == 3, name
        assert all(pod.deadline is None or pod.created + pending + limit <= pod.deadline for pod in made), name


def test_a_failed_step_starts_three_pods_however_many_groups_are_around_it(tasks, patch):
    ends = [argo.exit_code(1), *argo.LOST.values()]
    for name, _, policy, depth in tasks:
        for end in ends:
            assert argo.pods(argo.strategy(policy, patch), argo.strategy(None, patch), end, depth) == 3, name
    assert max(depth for *_, depth in tasks) >= 5  # without the expression, each level would multiply the pods by 3
    without = {key: value for key, value in patch.items() if key != "expression"}
    assert argo.pods(argo.strategy(policy, without), argo.strategy(None, without), ends[0], 5) == 3**6


def test_nothing_is_retried_in_a_run_that_was_cancelled(tasks, patch):
    for _, _, policy, _ in tasks:
        plan = argo.strategy(policy, patch)
        assert len(argo.attempts(plan, argo.exit_code(143), cancelled_after=1)) == 1
        assert len(argo.attempts(plan, argo.exit_code(143), cancelled_after=2)) == 2


def test_without_our_settings_of_kubeflow_pipelines_no_exit_code_is_retried_as_the_page_says(tasks):
    for _, _, policy, _ in tasks:
        for code in USEFUL + USELESS:
            assert len(argo.attempts(argo.strategy(policy, {}), argo.exit_code(code))) == 1
        assert len(argo.attempts(argo.strategy(policy, {}), argo.LOST["deleted"])) == 3
    page = (ROOT / "docs/kubeflow.md").read_text(encoding="utf-8")
    assert "Without it, only a pod that was deleted is replaced" in " ".join(page.split())


def test_a_window_of_fifteen_minutes_would_end_all_retries_of_a_longer_step(tasks, patch):
    policy = {**tasks[0][2], "backoffMaxDuration": "900s"}
    assert len(argo.attempts(argo.strategy(policy, patch), argo.exit_code(75, running_s=900))) == 1


def test_the_page_says_which_exit_codes_end_a_run_at_once():
    page = " ".join((ROOT / "docs/kubeflow.md").read_text(encoding="utf-8").split())
    listed = re.search(r"exit codes that a retry can't fix \(([\d, ]+)\)", page)
    assert [int(code) for code in listed[1].split(", ")] == USELESS


def test_the_pods_of_a_run_may_write_where_the_seeding_job_has_written(server, render):
    (job,) = [one for one in render("dev") if one["kind"] == "Job"]
    group = json.loads(server["COMPILED_PIPELINE_SPEC_PATCH"])["securityContext"]["fsGroup"]
    assert group == job["spec"]["template"]["spec"]["securityContext"]["fsGroup"] == kfp_pipeline.USER


def test_one_version_of_kubeflow_pipelines_is_installed_and_its_runs_may_start_trainjobs(server, render):
    (base,) = yaml.safe_load((FOLDER / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    page = (ROOT / "docs/operate.md").read_text(encoding="utf-8")
    assert f"Kubeflow Pipelines {base.rpartition('?ref=')[2]} for one cluster" in " ".join(page.split())
    assert "kubectl apply -k infra/kustomize/kubeflow-pipelines\n" in page
    account = server["DEFAULTPIPELINERUNNERSERVICEACCOUNT"]
    bindings = [one for one in render("dev") if one["kind"] == "RoleBinding"]
    bound = {one["roleRef"]["name"] for one in bindings for subject in one["subjects"] if subject["name"] == account}
    assert bound == {"univigu-run", "univigu-trainjobs"}
