"""Promotion: only if significantly better, one ledger line per decision, one process at a time."""

import getpass
import socket
import time

import pytest

from components.registry import leases, promotion
from components.tracking import tracking_uri
from python_process import run_python
from univigu import registry
from univigu.errors import BadInputError, GateFailedError, MissingInputError, TransientError


@pytest.mark.slow
def test_a_promotion_records_user_time_reason_versions_and_scores(versions, monkeypatch):
    monkeypatch.setenv("UNIVIGU_ACTOR", "ann@example.org")
    for right in (10, 30):
        versions.add("said", right)
    promotion.promote("said", 1, "somebody has to", root=versions.root)
    line = promotion.promote("said", 2, "it sees more", root=versions.root)
    assert line.who == f"ann@example.org, says {getpass.getuser()}"  # a variable alone proves nothing
    assert (line.why, line.action, line.outcome) == ("it sees more", "promote", "promoted")
    assert (line.replaced, line.version, line.forced, line.metric) == (1, 2, False, "captions.mean")
    # colours: 10 and 30 of 40, digits: 5 and 15 of 40
    assert line.scores["champion"] == 0.1875
    assert line.scores["challenger"] == 0.5625
    assert line.scores["difference"] == 0.375
    assert 0 < line.scores["difference_low"] < 0.375 < line.scores["difference_high"]
    assert line.scores["items"] == 40
    assert abs(time.time() - time.mktime(time.strptime(line.when, "%Y-%m-%dT%H:%M:%S+00:00")) + time.timezone) < 600
    assert versions.aliases("said") == (2, 1)
    assert promotion.history("said", root=versions.root)[0] == line


def test_a_ledger_line_contains_no_secret(versions, monkeypatch):
    monkeypatch.setenv("DEPLOY_TOKEN", "promoted")  # a word of the ledger's own
    monkeypatch.setenv("HF_TOKEN", "token-of-ann")
    versions.add("discreet", 10)
    line = promotion.promote("discreet", 1, "as http://ann:s3cret@host with token-of-ann says", root=versions.root)
    assert (line.outcome, line.why) == ("promoted", "as http://***@host with *** says")
    (read,) = promotion.history("discreet", root=versions.root)
    assert read == line


def test_a_line_can_not_be_rewritten(versions):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    versions.add("written", 10)
    line = promotion.promote("written", 1, "the first", root=versions.root)
    with pytest.raises(MlflowException, match="already logged"):
        MlflowClient(tracking_uri(versions.root)).log_param(line.id, "who", "somebody else")


@pytest.mark.slow
def test_only_a_significantly_better_version_is_promoted(versions):
    for right in (20, 21, 12):
        versions.add("doubt", right)
    assert promotion.compare("doubt", 2, root=versions.root).better  # than no champion
    promotion.promote("doubt", 1, "the first", root=versions.root)
    comparison = promotion.compare("doubt", "2", root=versions.root)
    assert comparison.scores["difference"]["value"] > 0
    assert not comparison.better
    assert comparison.reason.endswith("which may be chance")
    for version, words in ((2, "may be chance"), (3, r"worse by 0.1\d\d \(")):
        with pytest.raises(GateFailedError, match=words):
            promotion.promote("doubt", version, "let us try", root=versions.root)
    assert versions.aliases("doubt") == (1, None)
    assert [line.outcome for line in promotion.history("doubt", root=versions.root)] == [
        *["refused"] * 2,
        "promoted",
    ]
    forced = promotion.promote("doubt", 3, "it is faster", force=True, root=versions.root)
    assert (forced.forced, forced.outcome, forced.why) == (True, "promoted", "it is faster")
    assert versions.aliases("doubt") == (3, 1)


@pytest.mark.slow
def test_a_champion_measured_on_fewer_items_is_compared_on_those(versions):
    versions.add("quick", 4, items=range(20))
    versions.add("quick", 16)
    versions.add("quick", 16, items=range(15))
    versions.add("quick", 30, items=range(8))
    promotion.promote("quick", 1, "the first", root=versions.root)
    comparison = promotion.compare("quick", 2, root=versions.root)
    assert (comparison.better, comparison.scores["challenger"]["value"], comparison.scores["difference"]["n"]) == (
        True,
        0.6,  # of the champion's 20 items; 0.3 of its own 40
        20,
    )
    fewer = promotion.compare("quick", 3, root=versions.root)
    assert (fewer.better, fewer.scores) == (False, {})
    assert "not measured on the same held-out items" in fewer.reason
    promotion.promote("quick", 4, "to see", force=True, root=versions.root)
    assert "8 items in common" in promotion.compare("quick", 2, root=versions.root).reason


@pytest.mark.slow
def test_the_score_that_decides_is_the_one_that_the_version_was_registered_with(versions):
    for right in (10, 30):
        versions.add("metric", right, tags={promotion.METRIC_TAG: "joint.agreement"})
    versions.add("metric", 30, tags={promotion.METRIC_TAG: "captions.colour"})
    promotion.promote("metric", 1, "the first", root=versions.root)
    assert promotion.compare("metric", 2, root=versions.root).scores["challenger"]["value"] == 0.5625
    colour = promotion.compare("metric", 3, root=versions.root)
    assert (colour.metric, colour.scores["challenger"]["value"]) == ("captions.colour", 0.75)


@pytest.mark.slow
def test_a_rollback_swaps_champion_and_previous(versions):
    for right in (10, 30):
        versions.add("back", right)
    promotion.promote("back", 1, "the first", root=versions.root)
    with pytest.raises(MissingInputError, match="no previous champion"):
        promotion.rollback("back", "no reason", root=versions.root)
    promotion.promote("back", "2", "better", root=versions.root)
    line = promotion.rollback("back", "it swears", who="bob", root=versions.root)
    assert (line.action, line.outcome, line.replaced, line.version, line.who) == (
        "rollback",
        "rolled back",
        2,
        1,
        "bob",
    )
    assert line.scores["difference"] == -0.375
    assert versions.aliases("back") == (1, 2)
    promotion.rollback("back", "it did not", root=versions.root)
    assert versions.aliases("back") == (2, 1)


@pytest.mark.slow
def test_a_version_without_files_never_becomes_champion(versions):
    import shutil

    for right in (10, 30):
        versions.add("gone", right)
    promotion.promote("gone", 1, "the first", root=versions.root)
    store = tracking_uri(versions.root)
    shutil.rmtree(registry.artifact("models:/gone/2", "evaluation", store).parents[1])
    with pytest.raises(GateFailedError, match="the evaluation of version 2 can't be read"):
        promotion.promote("gone", 2, "better", root=versions.root)
    with pytest.raises(MissingInputError, match="files of version 2 of 'gone' are gone"):
        promotion.promote("gone", 2, "better", force=True, root=versions.root)
    assert versions.aliases("gone") == (1, None)
    assert [line.outcome for line in promotion.history("gone", root=versions.root)] == ["failed", "refused", "promoted"]


def test_invalid_requests_are_refused_with_a_message(versions, tmp_path):
    versions.add("sense", 10)
    with pytest.raises(BadInputError, match="needs a reason"):
        promotion.promote("sense", 1, " ", root=versions.root)
    with pytest.raises(MissingInputError, match="no version or alias '7'; use one of: 1"):
        promotion.promote("sense", 7, "why not", root=versions.root)
    with pytest.raises(MissingInputError, match="No model is registered as 'nonsense'"):
        promotion.compare("nonsense", 1, root=versions.root)
    with pytest.raises(MissingInputError, match=r"no mlflow\.db"):
        promotion.history("sense", root=tmp_path)
    assert not (tmp_path / "mlflow.db").exists()
    assert promotion.history("sense", root=versions.root) == []
    promotion.promote("sense", 1, "the first", root=versions.root)
    assert promotion.promote("sense", 1, "again", root=versions.root).outcome == "unchanged"


def test_a_server_that_does_not_answer_is_reported_and_nothing_changes(versions, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free.getsockname()[1]}")
    for call in (
        lambda: promotion.compare("any", 1, root=versions.root),
        lambda: promotion.promote("any", 1, "why", root=versions.root),
        lambda: promotion.rollback("any", "why", root=versions.root),
        lambda: promotion.history("any", root=versions.root),
    ):
        with pytest.raises(TransientError, match="does not answer"):
            call()


KILLED = """
import os, signal, sys
from pathlib import Path
import mlflow.store.model_registry.sqlalchemy_store, mlflow.store.tracking.sqlalchemy_store  # once, not in each child
import components.evaluation.evaluate_model, scipy.stats, sqlalchemy.orm
from components.registry import ledger, promotion
from univigu import registry
sqlalchemy.orm.configure_mappers()
root, calls = Path(sys.argv[1]), {"n": 0}

def promote(name):
    promotion.promote(name, 2, "better", who="ann", root=root)

def roll_back(name):
    promotion.rollback(name, "worse", who="ann", root=root)

def kill_at(owner, name, call):  # right before that call, as a machine that loses its power does
    real = getattr(owner, name)
    def die(*args, **kwargs):
        calls["n"] += 1
        if calls["n"] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, die)

for name, ask, place, attribute, call in (
    ("kill-undecided", promote, promotion, "_compare", 1),
    ("kill-decided", promote, registry, "set_alias", 1),
    ("kill-half-moved", promote, registry, "set_alias", 2),
    ("kill-rolled-halfway", roll_back, registry, "set_alias", 2),
    ("kill-rolled", roll_back, ledger.Lease, "end", 1),
    ("kill-cut-off", roll_back, registry, "set_alias", 2),
    ("kill-overtaken", promote, registry, "set_alias", 1),
):
    if not (child := os.fork()):
        kill_at(place, attribute, call)
        ask(name)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, name
"""
NAMES = ("undecided", "decided", "half-moved", "rolled-halfway", "rolled", "cut-off", "overtaken")


@pytest.fixture(scope="module")
def killed(versions):
    """Models whose version 1 is champion; on each, a change was killed at a different write."""
    for name in (f"kill-{point}" for point in NAMES):
        for right in (10, 30):
            versions.add(name, right)
        promotion.promote(name, 1, "the first", root=versions.root)
        if name in ("kill-rolled-halfway", "kill-rolled", "kill-cut-off"):
            promotion.promote(name, 2, "the second", root=versions.root)
    process = run_python(KILLED, versions.root)
    assert process.wait(timeout=240) == 0, process.stderr.read()
    return versions


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kill-undecided", "kill-decided", "kill-half-moved"])
def test_a_killed_promotion_that_is_repeated_has_the_same_result_as_without_the_kill(killed, name):
    line = promotion.promote(name, 2, "better", who="ann", root=killed.root)
    assert (line.outcome, line.version, line.replaced, line.why) == ("promoted", 2, 1, "better")
    assert line.scores["difference"] == 0.375
    assert killed.aliases(name) == (2, 1)
    story = promotion.history(name, root=killed.root)
    assert [(one.version, one.outcome) for one in story] == [(2, "promoted"), (1, "promoted")]
    again = promotion.promote(name, 2, "better", who="ann", root=killed.root)  # a new request, by one who was answered
    assert (again.outcome, len(promotion.history(name, root=killed.root))) == ("unchanged", 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kill-rolled-halfway", "kill-rolled"])
def test_a_killed_rollback_that_is_repeated_does_not_swap_back(killed, name):
    line = promotion.rollback(name, "worse", who="ann", root=killed.root)
    assert (line.outcome, line.version, line.replaced) == ("rolled back", 1, 2)
    assert killed.aliases(name) == (1, 2)
    assert [one.outcome for one in promotion.history(name, root=killed.root)] == ["rolled back", "promoted", "promoted"]
    promotion.rollback(name, "worse", who="ann", root=killed.root)  # meant
    assert killed.aliases(name) == (2, 1)


@pytest.mark.slow
def test_the_next_holder_completes_a_killed_rollback_once(killed):
    assert promotion.promote("kill-cut-off", 1, "to be sure", who="bob", root=killed.root).outcome == "unchanged"
    assert killed.aliases("kill-cut-off") == (1, 2)
    line = promotion.rollback("kill-cut-off", "worse", who="ann", root=killed.root)
    assert (line.outcome, line.version) == ("rolled back", 1)
    assert killed.aliases("kill-cut-off") == (1, 2)


@pytest.mark.slow
def test_a_killed_promotion_does_not_override_a_later_change(killed):
    killed.add("kill-overtaken", 40)
    registry.set_alias("kill-overtaken", registry.CHAMPION, 3, tracking_uri(killed.root))
    with pytest.raises(GateFailedError):
        promotion.promote("kill-overtaken", 2, "better", who="ann", root=killed.root)
    assert killed.aliases("kill-overtaken")[0] == 3
    outcomes = [one.outcome for one in promotion.history("kill-overtaken", root=killed.root)]
    assert outcomes == ["refused", "failed", "promoted"]


def test_a_promotion_that_takes_too_long_is_given_up_with_a_message(versions, monkeypatch):
    versions.add("broken", 10)
    monkeypatch.setattr(leases, "LEASE_S", -1.0)
    with pytest.raises(TransientError, match="the lease may expire"):
        promotion.promote("broken", 1, "the first", root=versions.root)
    assert [line.outcome for line in promotion.history("broken", root=versions.root)] == ["failed"]
    assert versions.aliases("broken") == (None, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "params", "outcome"),
    [
        ("left-deleted", {"outcome": "promoted", "version": 2, "replaced": 1}, "promoted"),
        ("left-unknown", {"outcome": "promoted", "version": 9, "replaced": 2}, "failed"),
        ("left-odd", {"outcome": "crowned", "version": 3, "replaced": 2}, "failed"),
        ("left-nonsense", {"outcome": "promoted", "version": "three", "replaced": 2}, "unreadable"),
    ],
)
def test_an_invalid_line_of_a_killed_process_does_not_stop_the_next(versions, name, params, outcome):
    from mlflow import MlflowClient

    for right in (10, 30, 35):
        versions.add(name, right)
    promotion.promote(name, 2, "the first", root=versions.root)
    client = MlflowClient(tracking_uri(versions.root))
    client.delete_model_version(name, "1")
    experiment = client.get_experiment_by_name(f"{name}/promotions").experiment_id
    run = client.create_run(experiment, start_time=1, tags={"univigu.process": "elsewhere:1:1"}).info.run_id
    for key, value in {"who": "ann", "why": "better", "action": "promote", **params}.items():
        client.log_param(run, key, value)
    assert promotion.promote(name, 2, "again", root=versions.root).outcome == "unchanged"
    assert versions.aliases(name) == (2, None)
    assert [line.outcome for line in promotion.history(name, root=versions.root) if line.id == run] == [outcome]


def test_a_run_that_is_not_a_ledger_line_is_named_and_stops_nothing(versions):
    from mlflow import MlflowClient

    versions.add("odd", 10)
    promotion.promote("odd", 1, "the first", root=versions.root)
    client = MlflowClient(tracking_uri(versions.root))
    run = client.create_run(client.get_experiment_by_name("odd/promotions").experiment_id).info.run_id
    client.log_param(run, "version", "the best")
    assert promotion.promote("odd", 1, "again", root=versions.root).outcome == "unchanged"
    odd = [line for line in promotion.history("odd", root=versions.root) if line.outcome == "unreadable"]
    assert [run in line.reason for line in odd] == [True]
