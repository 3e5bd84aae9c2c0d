"""One process at a time that changes a model's aliases: leases, which are runs of MLflow.

MLflow has no compare-and-set. A lease is a run that is RUNNING, and it is given up if another one is RUNNING too: of
two that begin at once at least one sees the other, so no two are ever held together. A lease ends with its process. On
the machine of that process one can look; elsewhere a lease is over after `LEASE_S`, so clocks of machines that share a
server have to agree to within that. What a lease left that ended so is settled by the next holder, and by no one else.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from univigu.errors import BusyError
from univigu.processes import has_ended, this_process

LEASE_S = 300.0  # longer than any lease is held
PATIENCE_S = 60.0
_PROCESS_TAG = "univigu.process"
_DROPPED_TAG = "univigu.dropped"  # of a lease that says nothing
_held: set[str] = set()  # by this process


@contextmanager
def hold(
    client: Any, experiment: str, title: str, tags: Mapping[str, str], settle: Callable[[Any], None]
) -> Iterator[str]:
    """Hold the lease of an MLflow experiment; yields the id of its run, which the block has to end.

    settle: what to do with the run of a lease whose process ended before it. Raises `BusyError` where others hold the
    lease for too long.
    """
    run_id = _take(client, experiment, title, tags)
    _held.add(run_id)
    try:
        for run in filter(_is_over, _running(client, experiment, but=run_id)):  # others drop theirs themselves
            settle(run)
        for run in search_runs(client, experiment, f"tags.`{_DROPPED_TAG}` = 'true'"):
            if _is_over(run):  # its process was killed before it could
                client.delete_run(run.info.run_id)
        yield run_id
    finally:
        _held.discard(run_id)


def drop(client: Any, run_id: str, status: str = "KILLED") -> None:
    """Delete the run of a lease that says nothing, ended with MLflow's `status` (`mlflow gc` removes it for good)."""
    client.set_tag(run_id, _DROPPED_TAG, "true")
    client.set_terminated(run_id, status)
    client.delete_run(run_id)


def search_runs(client: Any, experiment: str, condition: str = "") -> list[Any]:
    """Every run of an experiment that meets a condition of MLflow's, the newest first."""
    found, token = [], None
    while True:
        page = client.search_runs([experiment], condition, max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id), reverse=True)


def _take(client: Any, experiment: str, title: str, tags: Mapping[str, str]) -> str:
    give_up = time.monotonic() + PATIENCE_S
    while True:
        holders = _holders(client, experiment)
        if not holders:
            marked = {**tags, _PROCESS_TAG: this_process()}
            run_id = client.create_run(experiment, tags=marked, run_name=title).info.run_id
            holders = _holders(client, experiment, but=run_id)
            if not holders:
                return run_id
            drop(client, run_id)
        if time.monotonic() > give_up:
            named = ", ".join(f"'{run.info.run_name}' by {run.data.tags.get('mlflow.user', '?')}" for run in holders)
            raise BusyError(
                f"The same model's aliases are being changed by others ({named}), so nothing was done; try again later "
                f"(a process that died on another machine is no longer waited for after {LEASE_S / 60:.0f} minutes)."
            )
        time.sleep(random.uniform(0.1, 0.7))


def _holders(client: Any, experiment: str, but: str = "") -> list[Any]:
    return [run for run in _running(client, experiment, but) if not _is_over(run)]


def _running(client: Any, experiment: str, but: str) -> list[Any]:
    runs = search_runs(client, experiment, "attributes.status = 'RUNNING'")
    return [run for run in runs if run.info.run_id != but and _PROCESS_TAG in run.data.tags]


def _is_over(run: Any) -> bool:
    process = run.data.tags.get(_PROCESS_TAG, "")
    left_by_us = process != "" and process == this_process() and run.info.run_id not in _held
    return left_by_us or has_ended(process) or time.time() - run.info.start_time / 1000 > LEASE_S
