"""Who moved a model's aliases, when and why: a ledger that lives in MLflow, beside the registry that it is about.

Each line is a run of the experiment ``NAME/promotions``, so that it travels with the tracking server, shows in its
pages, and can be read by anything that reads MLflow. What is decided is logged as params, which MLflow refuses to
change; nothing here deletes or edits a line that says something.

A line is also the lease (`components.registry.leases`) of the process that writes it. What is decided is written first,
at once; then the aliases are moved; then the line is ended. So a process may be killed anywhere: where nothing was
decided its line is deleted, and what was decided is done by the next holder, as the process would have done it. Whoever
asks for the same again is then told what was decided, and no second line is written.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.registry import leases
from components.tracking import existing_store, open_tracking, tracking_uri
from univigu import registry
from univigu.errors import TransientError, UniViGUError
from univigu.mlflow_store import explained, first_contact, without_secrets

OUTCOMES = PROMOTED, REFUSED, UNCHANGED, ROLLED_BACK = "promoted", "refused", "unchanged", "rolled back"
UNDER_WAY, FAILED = "under way", "failed"  # what a line says that has not ended, or that broke off before any change
UNREADABLE = "unreadable"  # a run among the lines that none of ours is like
_FINISHED = "attributes.status = 'FINISHED'"
_PROSE = {"who", "why", "reason"}  # of a line: what people wrote, or MLflow said
_SETTLED_TAG = "univigu.settled"  # of a line that another process completed, until whoever asked for it is told


@dataclass(frozen=True)
class Entry:
    """A line of the ledger; `outcome` is one of `OUTCOMES`, or `UNDER_WAY`, `FAILED`, or `UNREADABLE`."""

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


class Lease:
    """The one process that may move aliases of `name` now, and the line that it writes."""

    def __init__(self, client: Any, experiment: str, run_id: str, name: str) -> None:
        self._client, self._experiment, self._run_id, self._name = client, experiment, run_id, name
        self._began = time.monotonic()
        self._line: str | None = None  # the run that says what was decided: this one, or an earlier one

    def find_settled(self, request: str) -> bool:
        """Take over the line of the same request whose process was killed, if what it decided still stands."""
        condition = f"tags.`{_SETTLED_TAG}` = 'true' and params.request = '{request}' and {_FINISHED}"
        for run in leases.search_runs(self._client, self._experiment, condition):
            line = _entry(run)
            left = line.replaced if line.outcome == REFUSED else line.version
            if line.outcome in OUTCOMES and _champion(self._name) == left:
                self._line = run.info.run_id
                return True
        return False

    def find_decided(self, request: str) -> bool:
        """Take over the line of the same request, whoever wrote it, for what is decided only once."""
        run = _decided(self._client, self._experiment, request)
        self._line = run and run.info.run_id
        return run is not None

    def decide(self, facts: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        """Write the line: from here on it is done, by this process or by the next holder."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self._run_id, metrics=[Metric(key, float(value), now, 0) for key, value in scores.items()]
        )
        self._client.update_run(self._run_id, name=f"{facts['action']} version {facts['version']}")
        self._write(facts)  # last, and at once: a line that has params has all of them, and its scores
        self._line = self._run_id

    def move(self, to: int, replaced: int | None) -> None:
        """Make `to` champion, and who it replaces `previous`."""
        if time.monotonic() - self._began > leases.LEASE_S / 2:
            self._client.set_terminated(self._run_id, "FAILED")
            raise TransientError(
                f"The lease to change '{self._name}' took longer than {leases.LEASE_S / 2:.0f} s, so it was given up; "
                f"see `univigu model history`, and try again."
            )
        _point(self._name, to, replaced)

    def fail(self, facts: Mapping[str, Any]) -> None:
        """Write a line that says what was asked for, and that nothing came of it."""
        self._write(facts)
        self._line = self._run_id
        self._client.set_terminated(self._run_id, "FAILED")

    def end(self) -> None:
        """End the line; a lease without one leaves nothing."""
        if self._line == self._run_id:
            self._client.set_terminated(self._run_id, "FINISHED")
            return
        leases.drop(self._client, self._run_id, "FINISHED")
        if self._line is not None:  # last of all: until here whoever asked may be killed, and ask once more
            self._forget(self._line)

    def abandon(self) -> None:
        """Leave as a killed process would: what was decided to the next holder, what was not to nobody."""
        if self._line != self._run_id:
            leases.drop(self._client, self._run_id)

    def entry(self) -> Entry:
        """The line as it stands."""
        assert self._line is not None
        return _entry(self._client.get_run(self._line))

    def _write(self, facts: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        texts = {key: without_secrets(str(facts[key])) for key in _PROSE & facts.keys()}
        params = [Param(key, str(value)) for key, value in {**facts, **texts}.items() if value is not None]
        self._client.log_batch(self._run_id, params=params)

    def _forget(self, run_id: str) -> None:
        if _SETTLED_TAG in self._client.get_run(run_id).data.tags:
            self._client.delete_tag(run_id, _SETTLED_TAG)


@contextmanager
def hold_lease(name: str, root: Path, title: str, who: str, why: str) -> Iterator[Lease]:
    """A lease on the aliases of `name`: waits for others, settles what killed ones left, and ends its line.

    Raises `BusyError` where others take too long.
    """
    experiment = open_tracking(root, _experiment(name))
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient()
    tags = {"mlflow.user": who, "mlflow.note.content": without_secrets(why)}
    with (
        explained(tracking_uri(root)),
        leases.hold(client, experiment, title, tags, lambda run: _settle(client, run, name)) as run_id,
    ):
        lease = Lease(client, experiment, run_id, name)
        try:
            yield lease
        except BaseException:
            with suppress(MlflowException, UniViGUError):  # if the server is gone, the next holder does this
                lease.abandon()
            raise
        lease.end()


def read_ledger(name: str, root: Path) -> list[Entry]:
    """Every line about `name`, the newest first."""
    store = existing_store(root)
    with first_contact(store):
        from mlflow import MlflowClient

        client = MlflowClient(store)
        experiment = client.get_experiment_by_name(_experiment(name))
        if experiment is None:
            return []
        runs = leases.search_runs(client, experiment.experiment_id)
        return [_entry(run) for run in runs if run.data.params]  # without: leases of those who have not decided


def find_decision(name: str, request: str, root: Path) -> Entry | None:
    """The line about what is decided only once, if it was."""
    experiment = open_tracking(root, _experiment(name))
    from mlflow import MlflowClient

    client = MlflowClient()
    with explained(tracking_uri(root)):
        run = _decided(client, experiment, request)
        return run and _entry(run)


def _experiment(name: str) -> str:
    return f"{name}/promotions"


def _decided(client: Any, experiment: str, request: str) -> Any:
    found = leases.search_runs(client, experiment, f"params.request = '{request}' and {_FINISHED}")
    return next((run for run in found if _entry(run).outcome in OUTCOMES), None)


# --- what killed processes left --------------------------------------------------------------------------------------


def _settle(client: Any, run: Any, name: str) -> None:
    """Do what the line of a killed process decided, unless the champion is now another one than it left."""
    run_id, params = run.info.run_id, run.data.params
    if "outcome" not in params:
        leases.drop(client, run_id)
        return
    client.set_tag(run_id, _SETTLED_TAG, "true")
    try:
        done = _complete(name, params)
    except ValueError:  # the line is none of ours
        done = False
    client.set_terminated(run_id, "FINISHED" if done else "FAILED")


def _complete(name: str, params: Mapping[str, str]) -> bool:
    if params["outcome"] in (REFUSED, UNCHANGED):
        return True
    version, replaced = _number(params, "version"), _number(params, "replaced")
    there = [int(one.version) for one in registry.versions(name)]
    if params["outcome"] not in (PROMOTED, ROLLED_BACK) or version not in there:
        return False
    if _champion(name) not in (version, replaced):
        return False
    _point(name, version, replaced if replaced in there else None)
    return True


def _point(name: str, champion: int, previous: int | None) -> None:
    registry.set_alias(name, registry.CHAMPION, champion)
    if previous is not None:
        registry.set_alias(name, registry.PREVIOUS, previous)


def _champion(name: str) -> int | None:
    found = registry.version_at(name, registry.CHAMPION)
    # pyrefly: ignore[bad-return]
    return found and int(found.version)


def _number(params: Mapping[str, str], key: str) -> int | None:
    return int(params[key]) if key in params else None


def _entry(run: Any) -> Entry:
    params = run.data.params
    ends = {"FINISHED": params.get("outcome", FAILED), "RUNNING": UNDER_WAY}
    try:
        return Entry(
            id=run.info.run_id,
            when=_moment(run),
            who=params["who"],
            why=params["why"],
            action=params["action"],
            outcome=ends.get(run.info.status, FAILED),
            version=int(params["version"]),
            replaced=_number(params, "replaced"),
            forced=params.get("forced") == "True",
            reason=params.get("reason", ""),
            metric=params.get("metric", ""),
            scores=dict(run.data.metrics),
        )
    except (KeyError, ValueError) as error:
        reason = f"the run {run.info.run_id} is no line of a ledger ({type(error).__name__}: {error})"
        return Entry(run.info.run_id, _moment(run), "?", "?", "?", UNREADABLE, 0, reason=reason)


def _moment(run: Any) -> str:
    try:
        return datetime.fromtimestamp((run.info.start_time or 0) / 1000, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):  # beyond any calendar
        return "?"
