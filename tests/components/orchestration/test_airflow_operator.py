"""Airflow operators: a step's task ends as its process does; a pipeline is submitted once and awaited."""

import asyncio
import json
import re
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("airflow")

from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowTaskTimeout, TaskDeferred
from airflow.sdk.execution_time.timeout import timeout
from airflow.triggers.base import TriggerEvent

from components.orchestration import airflow_operator
from components.orchestration.airflow_operator import FAILURE, KfpRunOperator, KfpRunTrigger, StepOperator
from components.pipeline.notes import DEFERRED, read_notes

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow
PACKAGE = str(ROOT / "infra/pipeline.yaml")


class TaskInstance:
    def __init__(self):
        self.pushed = {}
        self.returned = {}

    def xcom_push(self, key, value):
        self.pushed[key] = value

    def xcom_pull(self, task_ids):
        return self.returned.get(task_ids)


def new_context():
    return {"ti": TaskInstance()}


@pytest.fixture
def endpoint(kfp, monkeypatch):
    monkeypatch.setenv("KFP_ENDPOINT", kfp.url)
    return kfp


def operator(**changes):
    arguments = {"package": PACKAGE, "run_name": "retrain-1", "arguments": {"profile": "smoke"}} | changes
    return KfpRunOperator(task_id="kubeflow", **{"limit_s": 3600, **arguments})


def defer(context, **changes):
    with pytest.raises(TaskDeferred) as deferred:
        operator(**changes).execute(context)
    return deferred.value


def follow(trigger):
    async def first():
        return await anext(trigger.run())

    return asyncio.run(first())


def restored(trigger):
    """The trigger as another triggerer restores it from Airflow's database, e.g. after a crash."""
    path, arguments = trigger.serialize()
    module, _, name = path.rpartition(".")
    return getattr(sys.modules[module], name)(**json.loads(json.dumps(arguments)))


# --- Kubeflow Pipelines ----------------------------------------------------------------------------------------------


def test_a_run_is_submitted_and_awaited_without_occupying_a_worker(endpoint):
    context = new_context()
    deferred = defer(context, poll_s=0.01)
    event = follow(deferred.trigger)
    assert event.payload == {"run_id": "run-1", "state": "SUCCEEDED", "message": ""}
    assert getattr(operator(), deferred.method_name)(context, event.payload) == "run-1"


def test_after_a_crash_nothing_is_submitted_twice(endpoint):
    endpoint.states = ["RUNNING"]
    first = defer(new_context())
    second = defer(new_context())  # the crash came before the id was noted
    assert second.trigger.run_id == first.trigger.run_id
    trigger = restored(first.trigger)
    trigger.poll_s = 0.01
    endpoint.states = ["SUCCEEDED"]
    assert follow(trigger).payload["state"] == "SUCCEEDED"
    assert len(endpoint.runs) == 1
    assert operator().execute(new_context()) == "run-1"  # a task that is cleared finds the run that succeeded


def test_a_run_that_failed_says_why_and_is_replaced_when_the_task_is_cleared(endpoint):
    endpoint.states = ["PENDING", "FAILED"]
    context = new_context()
    event = follow(defer(context, poll_s=0.01).trigger)
    with pytest.raises(AirflowFailException, match=r"run-1 ended as FAILED \(main: Error \(exit code 80\)\)"):
        operator().finish(context, event.payload)
    assert "exit code 80" in context["ti"].pushed[FAILURE]
    endpoint.states = ["RUNNING"]
    assert defer(context).trigger.run_id == "run-2"


def test_a_run_cancelled_on_the_server_is_distinguished_from_a_failed_one(endpoint):
    endpoint.states = ["PENDING", "CANCELED"]
    event = follow(defer(new_context(), poll_s=0.01).trigger)
    with pytest.raises(AirflowFailException, match="was cancelled on the Kubeflow Pipelines server"):
        operator().finish(new_context(), event.payload)


def test_stopping_a_task_that_waits_cancels_its_run_and_a_triggerer_that_restarts_does_not(endpoint):
    endpoint.states = ["RUNNING"]
    trigger = defer(new_context()).trigger
    asyncio.run(trigger.cleanup())
    assert endpoint.runs["run-1"]["state"] == "RUNNING"
    asyncio.run(trigger.on_kill())
    assert endpoint.runs["run-1"]["state"] in ("CANCELING", "CANCELED")


def test_a_temporary_server_outage_fails_nothing(endpoint):
    trigger = defer(new_context(), poll_s=0.01).trigger
    endpoint.failures = [503] * 4
    assert follow(trigger).payload["state"] == "SUCCEEDED"


def test_a_long_server_outage_is_reported_and_a_retry_finds_the_same_run(endpoint):
    endpoint.states = ["RUNNING"]
    trigger = defer(new_context(), poll_s=0.01, patience_s=0.0).trigger
    endpoint.failures = [503] * 4
    event = follow(trigger)
    assert event.payload["state"] == "UNREACHABLE"
    with pytest.raises(AirflowException, match="status 503") as failure:
        operator().finish(new_context(), event.payload)
    assert not isinstance(failure.value, AirflowFailException)
    assert defer(new_context()).trigger.run_id == "run-1"


def test_an_unreachable_server_gets_no_submission_and_the_task_is_retried(monkeypatch):
    monkeypatch.setenv("KFP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("components.orchestration.kfp_server.time.sleep", lambda _: None)
    with pytest.raises(AirflowException, match="does not answer") as failure:
        operator().execute(new_context())
    assert not isinstance(failure.value, AirflowFailException)


def test_a_run_deleted_on_the_server_ends_the_wait(endpoint):
    trigger = defer(new_context(), poll_s=0.01, patience_s=0.1).trigger
    endpoint.runs.clear()
    event = follow(trigger)
    with pytest.raises(AirflowFailException, match=r"no longer knows the run run-1 \(.*not found.*clear this task"):
        operator().finish(new_context(), event.payload)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_temporary_refusal_fails_nothing(endpoint, status):
    trigger = defer(new_context(), poll_s=0.01).trigger
    endpoint.failures = [status] * 3
    assert follow(trigger).payload["state"] == "SUCCEEDED"


def test_a_lasting_refusal_is_reported_and_retried(endpoint):
    endpoint.states = ["RUNNING"]
    trigger = defer(new_context(), poll_s=0.01, patience_s=0.1).trigger
    endpoint.failures = [401] * 1000
    with pytest.raises(AirflowException, match="set KFP_TOKEN") as failure:
        operator().finish(new_context(), follow(trigger).payload)
    assert not isinstance(failure.value, AirflowFailException)


def test_a_run_over_its_time_limit_is_cancelled_and_reported(endpoint):
    endpoint.states = ["RUNNING"]
    trigger = restored(defer(new_context(), poll_s=0.01, limit_s=0.2).trigger)
    event = follow(trigger)
    with pytest.raises(AirflowFailException, match="run-1 had not ended after 1 hours, and was cancelled"):
        operator().finish(new_context(), event.payload)
    assert endpoint.runs["run-1"]["state"] == "CANCELED"


@pytest.mark.parametrize("stop", [False, True], ids=["ends", "is stopped"])
def test_monitoring_is_told_of_a_run_and_its_time_limit_until_it(endpoint, monkeypatch, tmp_path, stop):
    endpoint.states = ["RUNNING"]
    monkeypatch.setattr(airflow_operator, "work_root", lambda: tmp_path)
    trigger = restored(defer(new_context(), poll_s=0.01, run_name="retrain-manual__2026-11-29T10:00:00+00:00").trigger)
    ((path, note),) = read_notes(tmp_path, DEFERRED)
    assert (note["run"], note["end"]) == ("retrain-manual__2026-11-29T10:00:00+00:00", trigger.end)
    if stop:
        asyncio.run(trigger.on_kill())
    else:
        endpoint.states = ["SUCCEEDED"]
        operator(run_name=note["run"]).finish(new_context(), follow(trigger).payload)
    assert not path.exists()


def test_a_task_that_is_cleared_while_its_run_is_being_cancelled_waits_for_that(endpoint):
    endpoint.states = ["RUNNING"]
    defer(new_context())
    endpoint.runs["run-1"]["state"] = "CANCELING"
    with pytest.raises(AirflowException, match="run-1 of this name is being cancelled") as failure:
        operator().execute(new_context())
    assert not isinstance(failure.value, AirflowFailException)
    endpoint.runs["run-1"]["state"] = "CANCELED"
    assert defer(new_context()).trigger.run_id == "run-2"


def test_arguments_that_the_pipeline_does_not_have_fail_at_once(endpoint):
    with pytest.raises(AirflowFailException, match="no parameter 'colour'"):
        operator(arguments={"colour": "red"}).execute(new_context())
    assert not endpoint.runs


def test_a_run_has_the_settings_arguments_and_account_too(endpoint):
    defer(new_context(), extra_arguments='{"parts": 4, "gpus": 2}', service_account="univigu-launcher")
    run = endpoint.runs["run-1"]
    assert run["runtime_config"]["parameters"] == {"profile": "smoke", "parts": 4, "gpus": "2"}
    assert run["service_account"] == "univigu-launcher"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("parts=4", "is not a JSON object; use the form"),
        ("[4]", "is not a JSON object; use the form"),
        ('{"prats": 4}', "The pipeline has no parameter 'prats'; it has accelerator, "),
        ('{"parts": "four"}', "'parts' must be JSON of type NUMBER_INTEGER"),
        ('{"profile": "tiny"}', "sets 'profile', which the DAG sets itself; remove it"),
    ],
)
def test_a_wrong_setting_of_arguments_fails_at_once_in_one_sentence(endpoint, text, said):
    context = new_context()
    with pytest.raises(AirflowFailException, match=f"^UNIVIGU_KFP_ARGUMENTS[: ]+{re.escape(said)}"):
        operator(extra_arguments=text).execute(context)
    assert context["ti"].pushed[FAILURE].count("\n") == 0
    assert not endpoint.runs


def test_a_serialized_trigger_contains_neither_address_nor_token(endpoint, monkeypatch):
    monkeypatch.setenv("KFP_TOKEN", "a-secret")
    trigger = defer(new_context(), poll_s=0.01).trigger
    kept = json.dumps(trigger.serialize())
    assert "a-secret" not in kept
    assert endpoint.url not in kept
    assert isinstance(restored(trigger), KfpRunTrigger)
    assert endpoint.tokens[-1] == "Bearer a-secret"
    assert isinstance(follow(trigger), TriggerEvent)


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(new_root, monkeypatch):
    folder = new_root("airflow")
    monkeypatch.setenv("AIRFLOW_VAR_UNIVIGU_ROOT", str(folder))
    monkeypatch.setattr(airflow_operator, "work_root", lambda: folder)
    return folder


def step_with(script, monkeypatch):
    """A `StepOperator` that runs a script instead of a step, to simulate all kinds of failures."""
    monkeypatch.setattr("components.orchestration.airflow_operator.command", lambda *_: [sys.executable, "-c", script])
    return StepOperator(task_id="step", step="train-stage-1", profile="smoke", skip_finished=False)


@pytest.mark.parametrize(
    ("code", "again"),
    [(65, False), (66, False), (73, False), (78, False), (80, False), (75, True), (81, True)],
)
def test_only_transient_failures_of_a_step_are_retried(root, monkeypatch, code, again):
    script = f"import sys; print('univigu: the rows are bad.', file=sys.stderr); sys.exit({code})"
    context = new_context()
    with pytest.raises(AirflowException, match=r"^the rows are bad\.$") as failure:
        step_with(script, monkeypatch).execute(context)
    assert isinstance(failure.value, AirflowFailException) is not again
    assert context["ti"].pushed == {FAILURE: "the rows are bad."}


def test_the_task_waits_while_another_process_runs_the_step(root, monkeypatch, tmp_path):
    monkeypatch.setattr(airflow_operator, "BUSY_S", 0.01)
    tried = tmp_path / "tried"
    script = (
        "import pathlib, sys\n"
        f"tried = pathlib.Path({str(tried)!r})\n"
        "code = 65 if tried.exists() else 82\n"
        "tried.touch()\n"
        "print('univigu: the rows are bad.')\n"
        "sys.exit(code)"
    )
    with pytest.raises(AirflowFailException, match="the rows are bad"):
        step_with(script, monkeypatch).execute(new_context())
    monkeypatch.setattr(airflow_operator, "BUSY_S", 60)
    busy = step_with("import sys; sys.exit(82)", monkeypatch)
    monkeypatch.setattr(airflow_operator.time, "sleep", lambda _: busy.on_kill())
    with pytest.raises(AirflowException, match="was stopped before it started"):
        busy.execute(new_context())


def test_a_step_over_its_time_limit_receives_sigterm(root, monkeypatch, tmp_path):
    saved = tmp_path / "saved"
    script = (
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(saved)!r}, 'w'), print('saved'), sys.exit(81)))\n"
        "print('under way', flush=True)\n"
        "time.sleep(60)"
    )
    context, began = new_context(), time.monotonic()
    with pytest.raises(AirflowTaskTimeout), timeout(2):
        step_with(script, monkeypatch).execute(context)
    assert time.monotonic() - began < 20
    assert saved.exists()
    assert "exceeded its time limit" in context["ti"].pushed[FAILURE]


def test_stopping_a_task_stops_its_step_which_can_be_resumed(root, monkeypatch):
    operator = step_with("import time; print('under way', flush=True); time.sleep(60)", monkeypatch)
    failures = []

    def execute():
        try:
            operator.execute(new_context())
        except AirflowException as error:
            failures.append(error)

    thread = threading.Thread(target=execute)
    thread.start()
    give_up = time.monotonic() + 30
    while operator._process is None and time.monotonic() < give_up:
        time.sleep(0.05)
    operator.on_kill()
    thread.join(30)
    assert "SIGTERM" in str(failures[0])
    assert not isinstance(failures[0], AirflowFailException)


def test_a_missing_input_is_reported_in_one_sentence(root):
    context = new_context()
    with pytest.raises(AirflowFailException, match="run `univigu run synthesize-videos` first"):
        StepOperator(task_id="step", step="validate-clips", profile="smoke").execute(context)
    assert "univigu run synthesize-videos" in context["ti"].pushed[FAILURE]


def test_a_step_returns_its_digest_and_refuses_an_input_replaced_by_another_run(root, profile, tmp_path):
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(profile))
    context, name = new_context(), "synthesize-videos"
    operator = StepOperator(task_id=f"local.{name}", step=name, profile=str(tmp_path / "profile.yaml"))
    context["ti"].returned = {"local.validate-prompts": "ab" * 32}
    with pytest.raises(AirflowFailException, match="output of validate-prompts was replaced by another run"):
        operator.execute(context)
    assert not (root / "data/clips").exists()
    ours = json.loads((root / "data/validated/prompts/manifest.json").read_text())["digest"]
    context["ti"].returned = {"local.validate-prompts": ours}
    digest = operator.execute(context)
    assert digest == operator.execute(context) == json.loads((root / "data/clips/manifest.json").read_text())["digest"]


def test_a_work_root_that_is_not_a_folder_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(airflow_operator.Variable, "get", lambda *_, **__: str(tmp_path / "nowhere"))
    with pytest.raises(AirflowFailException, match="variable 'univigu_root' is not a folder"):
        StepOperator(task_id="step", step="validate-clips", profile="smoke").execute(new_context())
