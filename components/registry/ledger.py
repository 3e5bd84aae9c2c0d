"""The promotion ledger: who changed a model's aliases, when and why. It is stored in MLflow, next to the registry.

Each line is a run of the experiment ``NAME/promotions``, so it is backed up with the tracking server, appears in its
UI, and can be read by any MLflow client. A decision is logged as params, which MLflow does not allow to change; this
module never deletes or edits a line that holds a decision. Lines form a hash chain (`components.registry.chain`).

A line is also the lease (`components.registry.leases`) of the process that writes it. The decision is written first, in
one request; then the aliases are set; then the run is ended. A process may therefore be killed at any point: the next
holder deletes a line without a decision, and completes a decision that was written. If the same request is repeated, it
returns that decision and writes no second line.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.registry import chain, leases
from components.tracking import existing_store, open_tracking, tracking_uri
from univigu import registry
from univigu.errors import TransientError, UniViGUError
from univigu.mlflow_store import explained, first_contact, short_timeouts, without_secrets

OUTCOMES = PROMOTED, REFUSED, UNCHANGED, ROLLED_BACK = "promoted", "refused", "unchanged", "rolled back"
UNDER_WAY, FAILED = "under way", "failed"  # a line that has not ended, or that failed before any change
UNREADABLE = "unreadable"  # a run of the experiment that is not a ledger line
_FINISHED = "attributes.status = 'FINISHED'"
_FREE_TEXT = {"who", "why", "reason"}  # params that users or error messages supply
_SETTLED_TAG = "univigu.settled"  # marks a line that another process completed, until its request is repeated


@dataclass(frozen=True)
class Entry:
    """A line of the ledger; `outcome` is one of `OUTCOMES`, or `UNDER_WAY`, `FAILED`, or `UNREADABLE`."""

    id: str  # MLflow's run
    when: str  # UTC, ISO 8601
    who: str
    why: str
    action: str
    outcome: str
    version: int  # the version that was to become champion
    replaced: int | None = None  # the champion before it
    forced: bool = False
    reason: str = ""
    metric: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    files: str = ""  # the digest of the version's files (`univigu.version_files`) when the decision was made


class Lease:
    """The right to change the aliases of `name`, and the ledger line that its holder writes."""

    def __init__(self, client: Any, experiment: str, run_id: str, name: str) -> None:
        self._client, self._experiment, self._run_id, self._name = client, experiment, run_id, name
        self._began = time.monotonic()
        self._line: str | None = None  # the run that holds the decision: this one, or an earlier one

    def find_settled(self, request: str) -> bool:
        """Adopt the line of the same request whose process was killed, if its decision still holds."""
        condition = f"tags.`{_SETTLED_TAG}` = 'true' and params.request = '{request}' and {_FINISHED}"
        for run in leases.search_runs(self._client, self._experiment, condition):
            line = _entry(run)
            expected = line.replaced if line.outcome == REFUSED else line.version
            if line.outcome in OUTCOMES and _champion(self._name) == expected:
                self._line = run.info.run_id
                return True
        return False

    def find_decided(self, request: str) -> bool:
        """Adopt the line of the same request, whichever process wrote it: for decisions that are made only once."""
        run = _decided(self._client, self._experiment, request)
        self._line = run and run.info.run_id
        return run is not None

    def decide(self, facts: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        """Write the decision; from here on this process or the next holder carries it out."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self._run_id, metrics=[Metric(key, float(value), now, 0) for key, value in scores.items()]
        )
        self._client.update_run(self._run_id, name=f"{facts['action']} version {facts['version']}")
        self._write(facts, scores)  # last, in one request: a line with any params has all of them, and its scores
        self._line = self._run_id
        note_line(self._client, self._name, self._client.get_run(self._run_id))

    def set_champion(self, to: int, replaced: int | None) -> None:
        """Set the alias `champion` to version `to`, and `previous` to the version that it replaces."""
        if time.monotonic() - self._began > leases.LEASE_S / 2:
            self._client.set_terminated(self._run_id, "FAILED")
            raise TransientError(
                f"The aliases of '{self._name}' were not changed, because the decision took longer than "
                f"{leases.LEASE_S / 2:.0f} s and the lease may expire; check `univigu model history`, and try again."
            )
        _set_aliases(self._name, to, replaced)

    def fail(self, facts: Mapping[str, Any]) -> None:
        """Write a line with the request and the outcome `failed`."""
        self._write(facts, {})
        self._line = self._run_id
        note_line(self._client, self._name, self._client.get_run(self._run_id))
        self._client.set_terminated(self._run_id, "FAILED")

    def end(self) -> None:
        """End the line; delete the run of a lease that wrote no line."""
        if self._line == self._run_id:
            self._client.set_terminated(self._run_id, "FINISHED")
            return
        leases.drop(self._client, self._run_id, "FINISHED")
        if self._line is not None:  # last: if this process is killed before, a repeated request finds the line again
            self._remove_settled_tag(self._line)

    def abandon(self) -> None:
        """Leave a decision to the next holder, as a killed process would; delete a lease without one."""
        if self._line != self._run_id:
            leases.drop(self._client, self._run_id)

    def entry(self) -> Entry:
        """The current line."""
        assert self._line is not None
        return _entry(self._client.get_run(self._line))

    def _write(self, facts: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        from mlflow.entities import Param

        texts = {key: without_secrets(str(facts[key])) for key in _FREE_TEXT & facts.keys()}
        line = {key: str(value) for key, value in {**facts, **texts}.items() if value is not None}
        link = chain.next_link(line, scores, _lines(self._client, self._experiment))
        params = [Param(key, value) for key, value in {**line, **link}.items()]
        self._client.log_batch(self._run_id, params=params)

    def _remove_settled_tag(self, run_id: str) -> None:
        if _SETTLED_TAG in self._client.get_run(run_id).data.tags:
            self._client.delete_tag(run_id, _SETTLED_TAG)


@contextmanager
def hold_lease(name: str, root: Path, title: str, who: str, why: str) -> Iterator[Lease]:
    """Hold a lease on the aliases of `name`: wait for other holders, recover expired leases, and end the line.

    Raises `BusyError` if other processes hold the lease for too long, and `TransientError` soon after the server stops
    answering: a request that MLflow repeats for minutes could arrive when the lease has expired.
    """
    experiment = open_tracking(root, _experiment(name))
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient()
    tags = {"mlflow.user": who, "mlflow.note.content": without_secrets(why)}
    with (
        explained(tracking_uri(root)),
        short_timeouts(),
        leases.hold(client, experiment, title, tags, lambda run: _recover(client, run, name)) as run_id,
    ):
        lease = Lease(client, experiment, run_id, name)
        try:
            yield lease
        except BaseException:
            with suppress(MlflowException, UniViGUError):  # if the server does not answer, the next holder does this
                lease.abandon()
            raise
        lease.end()


def read_ledger(name: str, root: Path) -> list[Entry]:
    """All ledger lines of `name`, newest first."""
    store = existing_store(root)
    with first_contact(store):
        from mlflow import MlflowClient

        client = MlflowClient(store)
        experiment = client.get_experiment_by_name(_experiment(name))
        if experiment is None:
            return []
        return [_entry(run) for run in _lines(client, experiment.experiment_id)]


def verify_ledger(name: str, root: Path) -> chain.Verified:
    """Examine all ledger lines of `name`; raises like `chain.verify`."""
    store = existing_store(root)
    with first_contact(store):
        from mlflow import MlflowClient

        client = MlflowClient(store)
        experiment = client.get_experiment_by_name(_experiment(name))
        runs = _lines(client, experiment.experiment_id) if experiment else []
        return chain.verify(runs, _head_tag(client, name))


def note_line(client: Any, name: str, run: Any) -> None:
    """Write a line to the mirror, and its number and digest to the model's tag."""
    from mlflow.exceptions import MlflowException

    chain.mirror(run)
    params = run.data.params
    known = (_head_tag(client, name) or "0").partition(" ")[0]
    if "digest" in params and int(params["number"]) > (int(known) if known.isdecimal() else 0):
        with suppress(MlflowException):  # there may be no model of this name, for a request that failed
            client.set_registered_model_tag(name, chain.HEAD_TAG, f"{params['number']} {params['digest']}")


def _head_tag(client: Any, name: str) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name).tags.get(chain.HEAD_TAG)
    except MlflowException:
        return None


def _lines(client: Any, experiment: str) -> list[Any]:
    """The runs that are lines, newest first; a run without params is a lease without a decision."""
    return [run for run in leases.search_runs(client, experiment) if run.data.params]


def find_decision(name: str, request: str, root: Path) -> Entry | None:
    """The line of a request that is decided only once; None if it is not decided yet."""
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


# --- recovery of expired leases --------------------------------------------------------------------------------------


def _recover(client: Any, run: Any, name: str) -> None:
    """Carry out the decision of a killed process, unless the champion has changed since."""
    run_id, params = run.info.run_id, run.data.params
    if "outcome" not in params:
        leases.drop(client, run_id)
        return
    client.set_tag(run_id, _SETTLED_TAG, "true")
    note_line(client, name, run)
    try:
        done = _complete(name, params)
    except ValueError:  # not a ledger line
        done = False
    client.set_terminated(run_id, "FINISHED" if done else "FAILED")


def _complete(name: str, params: Mapping[str, str]) -> bool:
    if params["outcome"] in (REFUSED, UNCHANGED):
        return True
    version, replaced = _number(params, "version"), _number(params, "replaced")
    existing = [int(one.version) for one in registry.versions(name)]
    if params["outcome"] not in (PROMOTED, ROLLED_BACK) or version not in existing:
        return False
    if _champion(name) not in (version, replaced):
        return False
    _set_aliases(name, version, replaced if replaced in existing else None)
    return True


def _set_aliases(name: str, champion: int, previous: int | None) -> None:
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
            when=_start_time(run),
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
            files=params.get("files", ""),
        )
    except (KeyError, ValueError) as error:
        reason = f"the run {run.info.run_id} is not a ledger line ({type(error).__name__}: {error})"
        return Entry(run.info.run_id, _start_time(run), "?", "?", "?", UNREADABLE, 0, reason=reason)


def _start_time(run: Any) -> str:
    try:
        return datetime.fromtimestamp((run.info.start_time or 0) / 1000, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):  # not representable as a date
        return "?"
