"""All of Airflow, as `make airflow` starts it: from a REST call to a promoted model, also after crashes."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from statistics import median

import pytest
import yaml

from components.orchestration.airflow_server import AirflowServer, free_port
from components.pipeline.stages import STAGES, find_stage

pytest.importorskip("airflow")

REPO = Path(__file__).parents[2]
RARELY = "0 0 29 2 *"
SETTINGS = {  # runs are of the profile `tour` by their form or event, and of `tiny` where nothing says so
    "UNIVIGU_KFP_ARGUMENTS": '{"parts": 2}',
    "UNIVIGU_KFP_SERVICE_ACCOUNT": "univigu-launcher",
    "UNIVIGU_PROFILE": "tiny",
    "UNIVIGU_KFP_POLL_S": "1",
    "UNIVIGU_RETRAIN_CRON": RARELY,
    "UNIVIGU_NEW_DATA_CRON": RARELY,
    "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin,ada:user",
    "UNIVIGU_APPROVERS": "ada",
    "UNIVIGU_APPROVE_OWN": "no",
}
pytestmark = pytest.mark.slow


TRAINING = STAGES.index(find_stage("train-stage-1"))
MADE, LEFT = STAGES[:TRAINING], STAGES[TRAINING:]


@pytest.fixture(scope="module")
def root(reproduced, tmp_path_factory):
    """A work root with the prompts, the held-out set, the bundled base, and the data of the profile `smoke`.

    The profile `tour` makes the same data, so that a run of it begins with training.
    """
    folder = tmp_path_factory.mktemp("root")
    for name in ("data/prompts", "data/heldout.json", "model/tiny-wan", *(stage.home for stage in MADE)):
        source = reproduced.root / name
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(Airflow's home, a free port)."""
    return tmp_path_factory.mktemp("airflow"), free_port()


@pytest.fixture(scope="module")
def settings(lasting_kfp):
    lasting_kfp.states = ["RUNNING"]
    return {**SETTINGS, "KFP_ENDPOINT": lasting_kfp.url}


@pytest.fixture(scope="module")
def airflow(place, root, settings):
    with AirflowServer(place[0], root, place[1], settings) as server:
        server.wait_until_ready()
        server.call("PATCH", "/api/v2/dags/retrain", {"is_paused": False})
        yield server


def as_ada(airflow):
    """The server, called by another user."""
    session = copy.copy(airflow)
    session.user, session._token = "ada", ""
    return session


def trigger(airflow, dag="retrain", **conf):
    body = {"logical_date": None, "conf": conf}
    return airflow.call("POST", f"/api/v2/dags/{dag}/dagRuns", body)["dag_run_id"]


def tasks(airflow, run):
    found = airflow.call("GET", f"/api/v2/dags/{run[0]}/dagRuns/{run[1]}/taskInstances?limit=100")
    return {one["task_id"]: one for one in found["task_instances"]}


def state(airflow, run):
    return airflow.call("GET", f"/api/v2/dags/{run[0]}/dagRuns/{run[1]}")["state"]


def wait_for(condition, patience_s=1800):
    """Wait for the condition's result; the time limit only ends a test that hangs."""
    give_up = time.monotonic() + patience_s
    while time.monotonic() < give_up:
        if found := condition():
            return found
        time.sleep(1)
    raise AssertionError(f"not within {patience_s} s")


def ended(airflow, run):
    return wait_for(lambda: state(airflow, run) in ("success", "failed") and state(airflow, run))


def log(airflow, run, task):
    path = f"/api/v2/dags/{run[0]}/dagRuns/{run[1]}/taskInstances/{task}/logs/1?full_content=true"
    return "\n".join(str(line.get("event")) for line in airflow.call("GET", path)["content"])


def champion(root):
    from components.tracking import tracking_uri
    from univigu import registry

    found = registry.version_at("uni-vigu", "champion", tracking_uri(root))
    return found and int(found.version)


def wait_for_question(airflow, run):
    """Wait until a run waits for approval and the scheduler knows: Airflow treats an earlier answer as a failure."""
    pause = f"TaskInstance Finished: dag_id={run[0]}, task_id=approve, run_id={run[1]},"

    def asks():
        assert state(airflow, run) != "failed", tasks(airflow, run)
        waits = tasks(airflow, run)["approve"]["state"] in ("deferred", "awaiting_input")
        return waits and pause in (airflow.home / "scheduler.log").read_text(encoding="utf-8")

    wait_for(asks)


def answer(airflow, run, option):
    """Answer the approval request of a run, as ada; returns its default answer."""
    path = f"/api/v2/dags/{run[0]}/dagRuns/{run[1]}/taskInstances/approve/-1/hitlDetails"
    default = airflow.call("GET", path)["defaults"]
    body = {"chosen_options": [option], "params_input": {}}
    with pytest.raises(urllib.error.HTTPError, match="403"):
        airflow.call("PATCH", path, body)  # not even an administrator who isn't named
    as_ada(airflow).call("PATCH", path, body)
    return default


def stop(airflow, run):
    """End a run for good, by asking until it stays ended.

    A scheduler that has just read the run writes it back as running, and a busy SQLite answers 500.
    """
    unfinished = {"scheduled", "queued", "running", "restarting", "up_for_retry", "up_for_reschedule", "deferred", None}
    quiet_s = 0

    def stopped():
        nonlocal quiet_s
        states = {task["state"] for task in tasks(airflow, run).values()}
        if state(airflow, run) == "failed" and not states & unfinished:
            quiet_s += 1
        else:
            quiet_s = 0
            with suppress(urllib.error.HTTPError):
                airflow.call("PATCH", f"/api/v2/dags/{run[0]}/dagRuns/{run[1]}", {"state": "failed"})
        return quiet_s > 10

    wait_for(stopped)


def asset(airflow, name):
    (found,) = [one for one in airflow.call("GET", "/api/v2/assets?limit=100")["assets"] if one["name"] == name]
    return found["id"]


def emit(airflow, name, **extra):
    airflow.call("POST", "/api/v2/assets/events", {"asset_id": asset(airflow, name), "extra": extra})


def events(airflow, name):
    """The extras of an asset's events that a DAG emitted.

    The runs that they started have to have begun: before that Airflow 3.3.2 answers 500 (apache/airflow#71360).
    """
    path = f"/api/v2/assets/events?asset_id={asset(airflow, name)}&source_dag_id=new_data&limit=100"
    return [event["extra"] for event in airflow.call("GET", path)["asset_events"]]


def started_by_events(airflow, dag):
    """The runs of a DAG that asset events started, newest first."""
    found = airflow.call("GET", f"/api/v2/dags/{dag}/dagRuns?run_type=asset_triggered&order_by=-run_after&limit=100")
    return [(dag, run["dag_run_id"]) for run in found["dag_runs"]]


def started_by_next_event(airflow, dag, before):
    return wait_for(lambda: next(iter(set(started_by_events(airflow, dag)) - set(before)), None))


@pytest.mark.parametrize("part", ["scheduler", "triggerer", "dagProcessor"])
def test_the_probes_of_a_cluster_find_each_part_alive(airflow, part):
    values = yaml.safe_load((REPO / "infra/airflow/values.yaml").read_text(encoding="utf-8"))
    command = values[part]["livenessProbe"]["command"]
    found = subprocess.run(command, env=airflow.environment, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr


def test_a_call_of_the_api_leads_to_a_model_that_a_person_promoted(airflow, root):
    from components.registry import promotion

    assert champion(root) is None
    run = ("retrain", trigger(airflow, profile="tour"))
    wait_for_question(airflow, run)
    assert answer(airflow, run, "Approve") == ["Reject"]
    assert ended(airflow, run) == "success"
    assert champion(root) == 1
    line = promotion.history("uni-vigu", root=root)[0]
    assert (line.outcome, line.version, line.who) == ("promoted", 1, "ada")
    assert run[1] in line.why
    done = tasks(airflow, run)
    assert {done[f"local.{stage.name}"]["state"] for stage in STAGES} == {"success"}
    assert "'state': 'promoted'" in log(airflow, run, "notify")
    assert all("finished before" in log(airflow, run, f"local.{stage.name}") for stage in MADE)
    around = {stage.name: overhead(root, done, stage) for stage in LEFT}
    assert median(around.values()) < median(process_seconds(root, stage) for stage in LEFT), around


def test_no_one_approves_a_run_of_their_own_finished_steps_do_not_run_again_and_a_second_run_waits(airflow, root):
    from mlflow import MlflowClient

    from components.registry import promotion
    from components.tracking import tracking_uri

    MlflowClient(tracking_uri(root)).delete_registered_model_alias("uni-vigu", "champion")
    run, second = (("retrain", trigger(as_ada(airflow), profile="tour")) for _ in range(2))
    wait_for_question(airflow, run)
    assert state(airflow, second) == "queued"
    airflow.call("DELETE", f"/api/v2/dags/retrain/dagRuns/{second[1]}")
    answer(airflow, run, "Approve")
    assert ended(airflow, run) == "success"
    assert champion(root) is None
    done = tasks(airflow, run)
    assert done["promote"]["state"] == "skipped"
    assert "finished before" in log(airflow, run, "local.train-stage-2")
    assert "'state': 'rejected', 'message': 'ada started this run, so another person" in log(airflow, run, "notify")
    promotion.promote("uni-vigu", 1, "for the tests that follow", root=root)


def overhead(root, done, stage):
    """A task's overhead in seconds, from when it was ready to run, beyond the step's own process."""

    def at(task, key):
        return datetime.fromisoformat(done[task][key])

    before = [f"local.{source}" for source in stage.inputs.values()] or ["begin"]
    began = max(at(task, "end_date") for task in before)
    return (at(f"local.{stage.name}", "end_date") - began).total_seconds() - process_seconds(root, stage)


def process_seconds(root, stage):
    return json.loads((root / f".univigu/runs/{stage.name}.json").read_text())["process_seconds"]


def test_a_dataset_that_was_trained_with_its_profile_is_not_trained_again(airflow, root):
    from components.orchestration import retraining

    digest = retraining.dataset(root, "tour")["digest"]
    for profile, wanted in (("tour", "success"), ("huge", "failed")):
        before = started_by_events(airflow, "retrain")
        emit(airflow, "univigu://dataset", digest=digest, profile=profile)
        run = started_by_next_event(airflow, "retrain", before)
        assert ended(airflow, run) == wanted
        assert tasks(airflow, run)["local.train-stage-1"]["state"] in ("skipped", "upstream_failed")
    assert champion(root) == 1


def test_new_prompts_become_a_dataset_that_is_announced_once_and_starts_one_retraining(airflow, root):
    from components.orchestration import retraining

    known = retraining.dataset(root, "tour")
    prompt = {"text": "a clip of a red nine that turns over black", "source": "test", "licence": "CC0-1.0"}
    (root / "data/prompts/new.jsonl").write_text(json.dumps(prompt) + "\n", encoding="utf-8")
    retrainings = started_by_events(airflow, "retrain")
    airflow.call("PATCH", "/api/v2/dags/new_data", {"is_paused": False})

    emit(airflow, "univigu://prompts")
    first = started_by_next_event(airflow, "new_data", [])
    assert ended(airflow, first) == "success"
    found = retraining.dataset(root, "tiny")
    assert found["digest"] != known["digest"]
    assert found["rows"] == known["rows"] + 1
    assert "not a DVC project, so only the digest identifies the dataset" in log(airflow, first, "version_dataset")
    run = started_by_next_event(airflow, "retrain", retrainings)
    wait_for(lambda: tasks(airflow, run)["local.validate-prompts"]["state"] == "success")
    assert events(airflow, "univigu://dataset") == [{**found, "profile": "tiny"}]
    assert "training with the profile 'tiny'" in log(airflow, run, "begin")
    assert "finished before" in log(airflow, run, "local.validate-prompts")
    stop(airflow, run)

    emit(airflow, "univigu://prompts")
    second = started_by_next_event(airflow, "new_data", [first])
    assert ended(airflow, second) == "success"
    assert "announced before" in log(airflow, second, "announce")
    assert len(events(airflow, "univigu://dataset")) == 1
    assert {*started_by_events(airflow, "retrain")} == {*retrainings, run}


@pytest.mark.parametrize("conf", [{"profile": "huge"}, {"backend": "moon"}])
def test_a_wrong_form_starts_nothing(airflow, conf):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        trigger(airflow, **conf)
    assert refusal.value.code == 400


def test_a_second_airflow_in_the_same_place_is_refused_in_one_sentence(airflow, tmp_path):
    for home, said in ((airflow.home, "is already running in"), (tmp_path, f"The port {airflow.port} is taken")):
        arguments = ["--home", str(home), "--root", str(airflow.root), "--port", str(airflow.port)]
        done = subprocess.run(
            [sys.executable, "-m", "components.orchestration.airflow_server", *arguments],
            env=os.environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 82
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
        if named := re.search(r"\(`kill ([\d ]+)`\)", done.stderr):
            processes = named[1].split()
    assert {*map(int, processes)} <= {*airflow.alive()}
    for pid in processes:  # so that what outlives a killed `make airflow` still keeps others out
        held = {os.path.realpath(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
        assert str(airflow.home / "lock") in held


def test_airflow_killed_while_it_waits_for_kubeflow_submits_nothing_twice_and_silence_promotes_nobody(
    airflow, place, root, settings, lasting_kfp
):
    from mlflow import MlflowClient

    from components.tracking import tracking_uri

    run = ("retrain", trigger(airflow, profile="tour", backend="kubeflow"))
    wait_for(lambda: tasks(airflow, run)["kubeflow"]["state"] == "deferred")
    airflow.kill()
    assert [one["state"] for one in lasting_kfp.runs.values()] == ["RUNNING"]
    with AirflowServer(place[0], root, place[1], settings | {"UNIVIGU_APPROVAL_HOURS": "0.001"}) as server:
        server.wait_until_ready()
        lasting_kfp.states = ["SUCCEEDED"]
        assert ended(server, run) == "success"
        assert [*lasting_kfp.runs] == ["run-1"]
        submitted = lasting_kfp.runs["run-1"]
        wanted = {"profile": "tour", "promotion": "manual", "parts": 2}
        assert submitted["runtime_config"]["parameters"] == wanted
        assert submitted["service_account"] == "univigu-launcher"
        assert "it is champion already" in log(server, run, "gate")
        assert champion(root) == 1

        MlflowClient(tracking_uri(root)).delete_registered_model_alias("uni-vigu", "champion")
        run = ("retrain", trigger(server, profile="tour", backend="kubeflow"))
        assert ended(server, run) == "success"
        assert tasks(server, run)["promote"]["state"] == "skipped"
        assert "'state': 'rejected'" in log(server, run, "notify")
        assert champion(root) is None
        processes = [*server.alive()]
    assert processes
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
