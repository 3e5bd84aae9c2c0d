"""Leases, so that only one process at a time changes a model's aliases; each lease is an MLflow run.

MLflow has no compare-and-set. A lease is a run with status RUNNING. A process that sees another RUNNING lease after it
created its own drops its own: of two processes that start at once, at least one sees the other, so no two hold a lease
at the same time. A lease expires when its process ends. On the machine of that process this can be checked; on other
machines a lease expires after `LEASE_S`, so the clocks of machines that share a server must agree to within that time.
Only the next holder recovers what an expired lease left unfinished.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from univigu.errors import BusyError
from univigu.processes import has_ended, this_process

LEASE_S = 300.0  # longer than any lease is held
TIMEOUT_S = 60.0  # how long a process waits for a lease
_PROCESS_TAG = "univigu.process"
_DROPPED_TAG = "univigu.dropped"  # marks a lease without a decision, which is to be deleted
_held: set[str] = set()  # run ids of the leases that this process holds


@contextmanager
def hold(
    client: Any, experiment: str, title: str, tags: Mapping[str, str], recover: Callable[[Any], None]
) -> Iterator[str]:
    """Hold the lease of an MLflow experiment; yields the id of its run, which the caller must end within the block.

    recover: called with the run of each expired lease. Raises `BusyError` if other processes hold the lease for longer
    than `TIMEOUT_S`.
    """
    run_id = _take(client, experiment, title, tags)
    _held.add(run_id)
    try:
        for run in filter(_is_expired, _running(client, experiment, exclude=run_id)):  # live processes end theirs
            recover(run)
        for run in search_runs(client, experiment, f"tags.`{_DROPPED_TAG}` = 'true'"):
            if _is_expired(run):  # its process was killed before it deleted the run
                client.delete_run(run.info.run_id)
        yield run_id
    finally:
        _held.discard(run_id)


def drop(client: Any, run_id: str, status: str = "KILLED") -> None:
    """End the run of a lease without a decision with MLflow's `status`, and delete it (`mlflow gc` purges it)."""
    client.set_tag(run_id, _DROPPED_TAG, "true")
    client.set_terminated(run_id, status)
    client.delete_run(run_id)


def search_runs(client: Any, experiment: str, condition: str = "") -> list[Any]:
    """All runs of an experiment that match an MLflow filter string, newest first."""
    found, token = [], None
    while True:
        page = client.search_runs([experiment], condition, max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id), reverse=True)


def _take(client: Any, experiment: str, title: str, tags: Mapping[str, str]) -> str:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        holders = _holders(client, experiment)
        if not holders:
            marked = {**tags, _PROCESS_TAG: this_process()}
            run_id = client.create_run(experiment, tags=marked, run_name=title).info.run_id
            holders = _holders(client, experiment, exclude=run_id)
            if not holders:
                return run_id
            drop(client, run_id)
        if time.monotonic() > deadline:
            named = ", ".join(f"'{run.info.run_name}' by {run.data.tags.get('mlflow.user', '?')}" for run in holders)
            raise BusyError(
                f"Other processes are changing this model's aliases ({named}), so nothing was changed; try again later "
                f"(the lease of a process that died on another machine expires after {LEASE_S / 60:.0f} minutes)."
            )
        time.sleep(random.uniform(0.1, 0.7))


def _holders(client: Any, experiment: str, exclude: str = "") -> list[Any]:
    return [run for run in _running(client, experiment, exclude) if not _is_expired(run)]


def _running(client: Any, experiment: str, exclude: str) -> list[Any]:
    runs = search_runs(client, experiment, "attributes.status = 'RUNNING'")
    return [run for run in runs if run.info.run_id != exclude and _PROCESS_TAG in run.data.tags]


def _is_expired(run: Any) -> bool:
    process = run.data.tags.get(_PROCESS_TAG, "")
    abandoned_here = process != "" and process == this_process() and run.info.run_id not in _held
    return abandoned_here or has_ended(process) or time.time() - run.info.start_time / 1000 > LEASE_S
