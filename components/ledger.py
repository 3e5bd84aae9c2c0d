"""Who moved a model's aliases, when and why: a ledger that lives in MLflow, beside the registry that it is about.

Each line is a run of the experiment ``NAME/promotions``, so that it travels with the tracking server, shows in its
pages, and can be read by anything that reads MLflow. What is decided is logged as params, which MLflow refuses to
change; nothing here deletes or edits a line that says something.

MLflow has no compare-and-set, so a line is also the turn of who writes it: a turn begins with a run that is RUNNING,
and is given up if another one is RUNNING too. Of two that begin at once at least one sees the other, so no two ever
move aliases together. What a turn does is written first, done second, and marked as done last; a turn whose process
died is completed, if the alias moved, or marked as failed, once it is older than `LEASE_S`. Clocks of machines that
share a server have to agree to within that.
"""

import getpass
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.tracking import existing_store, open_tracking, tracking_uri
from univigu import registry
from univigu.errors import BusyError, TransientError, UniViGUError

LEASE_S = 300.0  # longer than any turn takes
PATIENCE_S = 60.0
OUTCOMES = PROMOTED, REFUSED, UNCHANGED, ROLLED_BACK = "promoted", "refused", "unchanged", "rolled back"
UNDER_WAY, FAILED = "under way", "failed"  # what a line says that has not ended, or that broke off before any change


@dataclass(frozen=True)
class Entry:
    """A line of the ledger; `outcome` is one of `OUTCOMES`, or `UNDER_WAY`, or `FAILED`."""

    id: str  # MLflow's run
    when: str  # UTC, ISO 8601
    who: str
    why: str
    action: str
    outcome: str
    version: int  # the one that was to become champion
    replaced: int | None = None  # the champion at that moment
    forced: bool = False
    reason: str = ""
    metric: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)


def actor() -> str:
    """Who acts: UNIVIGU_ACTOR, which an orchestrator sets to the person it acts for, else the user of this machine."""
    try:
        return os.environ.get("UNIVIGU_ACTOR") or getpass.getuser()
    except (OSError, KeyError):  # a container's user may have a number and no name
        return f"uid {os.getuid()}"


class Turn:
    """The one process that may move aliases of `name` now, and the line that it writes."""

    def __init__(self, client: Any, run_id: str, name: str) -> None:
        self._client, self._run_id, self._name, self._began = client, run_id, name, time.monotonic()

    def write(self, facts: Mapping[str, Any], scores: Mapping[str, float] | None = None) -> None:
        """Add to the line; what is decided is written before anything moves."""
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        params = [Param(key, str(value)) for key, value in facts.items() if value is not None]
        metrics = [Metric(key, float(value), now, 0) for key, value in (scores or {}).items()]
        self._client.log_batch(self._run_id, params=params, metrics=metrics)

    def move(self, to: int, replaced: int | None) -> None:
        """Make `to` champion, and who it replaces `previous`."""
        if time.monotonic() - self._began > LEASE_S / 2:
            raise TransientError(
                f"The turn to change '{self._name}' took longer than {LEASE_S / 2:.0f} s, so nothing was changed; try "
                f"again."
            )
        _point(self._name, to, replaced)

    def entry(self) -> Entry:
        """The line as it stands."""
        return _entry(self._client.get_run(self._run_id))


@contextmanager
def take_turn(name: str, root: Path, *, action: str, version: int, who: str, why: str) -> Iterator[Turn]:
    """A turn at moving the aliases of `name`: waits for others, and writes the line's end when the block ends.

    Raises `BusyError` where others take too long.
    """
    experiment = open_tracking(root, _experiment(name))
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient()
    tags = {"mlflow.user": who, "mlflow.note.content": why}
    with registry.explained(tracking_uri(root)):
        run_id = _begin(client, experiment, name, f"{action} version {version}", tags)
        turn = Turn(client, run_id, name)
        try:
            turn.write({"action": action, "version": version, "who": who, "why": why})
            yield turn
            client.set_terminated(run_id, "FINISHED")
        except BaseException:
            with suppress(MlflowException, UniViGUError):  # if the server is gone, the next turn settles this one
                _settle(client, client.get_run(run_id), name)
            raise


def read_ledger(name: str, root: Path) -> list[Entry]:
    """Every line about `name`, the newest first."""
    store = existing_store(root)
    try:
        with registry.in_a_hurry():
            from mlflow import MlflowClient

            client = MlflowClient(store)
            experiment = client.get_experiment_by_name(_experiment(name))
            if experiment is None:
                return []
            return [_entry(run) for run in _runs(client, experiment.experiment_id) if "version" in run.data.params]
    except Exception as error:  # MLflow passes on whatever its database driver or HTTP client raises
        raise registry.store_error(error, store) from error


def _experiment(name: str) -> str:
    return f"{name}/promotions"


# --- turns -----------------------------------------------------------------------------------------------------------


def _begin(client: Any, experiment: str, name: str, title: str, tags: Mapping[str, str]) -> str:
    give_up = time.monotonic() + PATIENCE_S
    while True:
        if not _others(client, experiment, name):
            run_id = client.create_run(experiment, tags=dict(tags), run_name=title).info.run_id
            if not _others(client, experiment, name, but=run_id):
                return run_id
            client.delete_run(run_id)  # two began at once: this one never got to say anything
        if time.monotonic() > give_up:
            raise BusyError(
                f"The aliases of '{name}' are being changed by others ({_named(_others(client, experiment, name))}), "
                f"so nothing was done; try again later (a turn that died is settled after {LEASE_S / 60:.0f} minutes)."
            )
        time.sleep(random.uniform(0.1, 0.7))


def _named(runs: list[Any]) -> str:
    return ", ".join(f"'{run.info.run_name}' by {run.data.tags.get('mlflow.user', '?')}" for run in runs) or "just done"


def _others(client: Any, experiment: str, name: str, but: str = "") -> list[Any]:
    """The turns under way besides `but`; those that died are settled."""
    alive = []
    for run in _runs(client, experiment, "attributes.status = 'RUNNING'"):
        if run.info.run_id == but:
            continue
        if time.time() - run.info.start_time / 1000 > LEASE_S:
            _settle(client, run, name)
        else:
            alive.append(run)
    return alive


def _settle(client: Any, run: Any, name: str) -> None:
    """End the line of a turn that broke off: as done where the champion has moved, else as failed."""
    params = run.data.params
    champion = registry.version_at(name, registry.CHAMPION)
    outcome, status = params.get("outcome"), "FAILED"
    if outcome in (REFUSED, UNCHANGED):
        status = "FINISHED"
    elif outcome and champion is not None and str(champion.version) == params["version"]:
        _point(name, int(params["version"]), int(params["replaced"]) if "replaced" in params else None)
        status = "FINISHED"
    client.set_terminated(run.info.run_id, status)


def _point(name: str, champion: int, previous: int | None) -> None:
    # the champion first: whether it has moved tells if a turn that broke off is to be completed
    registry.set_alias(name, registry.CHAMPION, champion)
    if previous is not None:
        registry.set_alias(name, registry.PREVIOUS, previous)


def _runs(client: Any, experiment: str, condition: str = "") -> list[Any]:
    found, token = [], None
    while True:
        page = client.search_runs([experiment], condition, max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id), reverse=True)


def _entry(run: Any) -> Entry:
    params = run.data.params
    ends = {"FINISHED": params.get("outcome", FAILED), "RUNNING": UNDER_WAY}
    return Entry(
        id=run.info.run_id,
        when=datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds"),
        who=params["who"],
        why=params["why"],
        action=params["action"],
        outcome=ends.get(run.info.status, FAILED),
        version=int(params["version"]),
        replaced=int(params["replaced"]) if "replaced" in params else None,
        forced=params.get("forced") == "True",
        reason=params.get("reason", ""),
        metric=params.get("metric", ""),
        scores=dict(run.data.metrics),
    )
