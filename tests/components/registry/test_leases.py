"""A model's lease: one change at a time, whoever dies with it in hand."""

import pytest

from components.registry import leases, ledger, promotion
from components.tracking import tracking_uri
from univigu.errors import BusyError


def test_the_next_holder_deletes_a_lease_that_a_killed_process_dropped(versions, monkeypatch):
    import mlflow

    def killed(*_):
        raise KeyboardInterrupt

    versions.add("late", 10)
    lease = ledger.hold_lease("late", versions.root, "promote", "ann", "nothing comes of it")
    lease.__enter__()
    with monkeypatch.context() as change:
        change.setattr(mlflow.MlflowClient, "delete_run", killed)
        with pytest.raises(KeyboardInterrupt):
            lease.__exit__(None, None, None)
    line = promotion.promote("late", 1, "again", root=versions.root)
    assert line.outcome == "promoted"
    client = mlflow.MlflowClient(tracking_uri(versions.root))
    experiments = [found.experiment_id for found in client.search_experiments() if "late" in found.name]
    assert [run.info.run_name for run in client.search_runs(experiments)] == ["promote version 1"]


def test_while_a_lease_is_held_others_wait_and_then_name_its_holder(versions, monkeypatch):
    versions.add("busy", 10)
    with ledger.hold_lease("busy", versions.root, "promote version 1", "ann", "slow"):
        monkeypatch.setattr(leases, "TIMEOUT_S", 0.5)
        with pytest.raises(BusyError, match="'promote version 1' by ann"):
            promotion.promote("busy", 1, "mine", root=versions.root)
    assert versions.aliases("busy") == (None, None)
    assert promotion.promote("busy", 1, "now", root=versions.root).outcome == "promoted"
