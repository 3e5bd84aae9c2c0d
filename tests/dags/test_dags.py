"""The DAGs as Airflow reads them: they load, have the dependencies of stages.py, and refuse invalid input."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from components.pipeline.profiles import profile_names
from components.pipeline.stages import STAGES

pytest.importorskip("airflow")

DAGS = Path(__file__).parents[2] / "dags"
DIGEST = "ab" * 32


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    """Both DAGs, loaded with a separate Airflow home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))
        patch.setenv("AIRFLOW__CORE__LOAD_EXAMPLES", "False")
        for name in ("UNIVIGU_PROFILE", "UNIVIGU_BACKEND"):
            patch.delenv(name, raising=False)
        from airflow.dag_processing.dagbag import DagBag

        yield DagBag(str(DAGS))


@pytest.fixture
def retrain(bag):
    return bag.dags["retrain"]


def test_the_dags_load(bag):
    assert bag.import_errors == {}
    assert set(bag.dags) == {"retrain", "new_data"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["new_data", "retrain"])
def test_reading_a_dag_imports_nothing_heavy(name, tmp_path):
    heavy = {"torch", "mlflow", "kfp", "kfp_server_api", "pandas", "pyarrow", "diffusers", "great_expectations", "dvc"}
    script = f"import sys; sys.path.insert(0, {str(DAGS)!r}); import {name}; print(*({heavy!r} & set(sys.modules)))"
    environment = {"AIRFLOW_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1:] in ([], [""])


def test_each_step_has_a_task_that_waits_for_its_inputs(retrain):
    for stage in STAGES:
        task = retrain.task_dict[f"local.{stage.name}"]
        assert task.step == stage.name
        wanted = {f"local.{source}" for source in stage.inputs.values()}
        assert task.upstream_task_ids - {"begin"} == wanted
    assert {name for name in retrain.task_dict if name.startswith("local.")} == {f"local.{s.name}" for s in STAGES}


def test_a_step_never_promotes(retrain):
    assert retrain.task_dict["local.register-model"].env == {"UNIVIGU_PROMOTION": "manual"}
    assert retrain.task_dict["kubeflow"].arguments["promotion"] == "manual"


def test_nothing_is_promoted_without_gate_and_approval_and_no_answer_rejects(retrain):
    assert retrain.task_dict["promote"].upstream_task_ids == {"gate", "approve"}
    approve = retrain.task_dict["approve"]
    assert approve.upstream_task_ids == {"gate"}
    assert approve.defaults == ["Reject"]
    assert approve.response_timeout == timedelta(hours=24)
    assert approve.assigned_users is None  # whoever may answer in Airflow


def test_the_decision_is_tried_again_for_longer_than_mlflow_is_down(retrain):
    for name in ("gate", "promote", "local.register-model"):
        task = retrain.task_dict[name]
        assert task.retry_exponential_backoff
        assert sum(task.retry_delay.total_seconds() * 2**number for number in range(task.retries)) > 10 * 60


def test_a_request_to_an_approver_who_left_is_answered_by_no_one_else_and_ends_as_rejected(retrain, monkeypatch):
    from airflow.api_fastapi.auth.managers.simple.simple_auth_manager import SimpleAuthManager
    from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser

    monkeypatch.setenv("UNIVIGU_APPROVERS", "left")
    request = retrain.task_dict["promote"].python_callable.__globals__["add_approval"]()
    assigned = {user["id"] for user in request.assigned_users}
    manager = SimpleAuthManager()
    for name, may in (("left", True), ("admin", False)):
        user = SimpleAuthManagerUser(username=name, role="ADMIN")
        assert manager.is_authorized_hitl_task(assigned_users=assigned, user=user) is may
    assert (request.defaults, request.response_timeout) == (["Reject"], timedelta(hours=24))


def test_retraining_begins_when_someone_enables_it(bag):
    assert {dag.is_paused_upon_creation for dag in bag.dags.values()} == {True}


class TaskInstance:
    """A task instance that stores XComs."""

    def __init__(self):
        self.pushed = {}

    def xcom_push(self, key, value):
        self.pushed[key] = value

    def xcom_pull(self, task_ids, key):
        assert task_ids == "begin"
        return self.pushed[key]


@pytest.fixture
def begin(retrain, tmp_path, monkeypatch):
    """A function from the extras of a run's events to the return value of `begin` and its task instance."""

    def call(*extras, conf=None):
        ti = TaskInstance()
        events = {Asset("univigu://dataset"): [SimpleNamespace(extra=extra) for extra in extras]} if extras else {}
        params = {"profile": "tiny", "backend": "local"}
        run = SimpleNamespace(conf=conf or {})
        return task.python_callable(ti=ti, params=params, triggering_asset_events=events, dag_run=run, dag=retrain), ti

    from airflow.sdk import Asset

    task = retrain.task_dict["begin"]
    monkeypatch.setitem(task.python_callable.__globals__, "work_root", lambda: tmp_path)
    return call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extras", "profile"),
    [
        ([], "tiny"),
        ([{"digest": DIGEST}], "tiny"),
        ([{"digest": DIGEST, "profile": "smoke"}], "smoke"),
        ([{"digest": DIGEST, "profile": "smoke"}, {"digest": DIGEST, "profile": "wan-14b"}], "wan-14b"),
    ],
)
def test_all_tasks_use_the_profile_of_the_newest_event_or_else_of_the_form(retrain, begin, extras, profile):
    following, ti = begin(*extras)
    assert following == "local.curate-prompts"
    tasks = retrain.task_dict
    used = [tasks["kubeflow"].arguments["profile"], *(tasks[f"local.{stage.name}"].profile for stage in STAGES)]
    assert {tasks["begin"].render_template(text, {"ti": ti}) for text in used} == {profile}


@pytest.mark.slow
def test_an_event_with_an_unknown_profile_trains_nothing(begin):
    from airflow.sdk.exceptions import AirflowFailException

    with pytest.raises(AirflowFailException, match="The event's 'profile' is \"huge\", which is not a profile"):
        begin({"digest": DIGEST, "profile": "huge"})


@pytest.mark.parametrize(
    ("outcome", "state"), [("promoted", "promoted"), ("unchanged", "promoted"), ("refused", "kept champion")]
)
def test_a_promotions_outcome_is_reported_as_a_documented_state(retrain, outcome, state):
    pulled = {"gate": {"name": "uni-vigu", "version": 2, "champion": 1}, "promote": {"outcome": outcome, "reason": "r"}}
    ti = SimpleNamespace(xcom_pull=lambda task_ids, key=None: pulled.get(task_ids) if isinstance(task_ids, str) else [])
    said = retrain.task_dict["notify"].python_callable.__globals__["outcome_of"](ti)
    assert said == {"state": state, "message": "r", "name": "uni-vigu", "version": 2, "champion": 1}
    assert f"`{state}`" in (DAGS.parent / "docs/airflow.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_unknown_parameter_trains_nothing(begin):
    from airflow.sdk.exceptions import AirflowFailException

    with pytest.raises(AirflowFailException, match="The DAG has no parameter 'prof'; it has backend, profile"):
        begin(conf={"prof": "smoke"})
    begin(conf={"profile": "smoke"})


@pytest.mark.slow
def test_an_unclear_setting_for_approvals_ends_a_run_before_it_trains(begin, monkeypatch):
    from airflow.sdk.exceptions import AirflowFailException

    monkeypatch.setenv("UNIVIGU_APPROVE_OWN", "true")
    with pytest.raises(AirflowFailException, match="UNIVIGU_APPROVE_OWN is 'true'; set it to yes or no"):
        begin()


def test_two_retrainings_never_run_at_once(bag):
    assert {dag.max_active_runs for dag in bag.dags.values()} == {1}


def test_the_form_offers_the_existing_profiles_and_backends(retrain):
    assert retrain.params.get_param("profile").schema["enum"] == profile_names()
    assert retrain.params.get_param("backend").schema["enum"] == ["local", "kubeflow"]
    assert set(retrain.params) == {"profile", "backend"}  # whether a person has to approve is for administrators


@pytest.mark.parametrize(("field", "wrong"), [("profile", "huge"), ("profile", "../x.yaml"), ("backend", "moon")])
def test_a_wrong_value_in_the_form_is_refused(retrain, field, wrong):
    from airflow.sdk.exceptions import ParamValidationError

    with pytest.raises(ParamValidationError):
        retrain.params.get_param(field).resolve(wrong)
