"""Submit a TrainJob and follow it to its end; the table in `train_job.py` lists all outcomes."""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.orchestration.kubernetes_api import NODE, Cluster, one_line
from components.orchestration.train_job import Settings, build, processes, work_key
from components.pipeline.manifests import Recipe, verify
from components.pipeline.notes import QUEUE, QueueNote, note_path
from components.pipeline.processes import sentence
from components.pipeline.profiles import absolute_profile, load_profile, profile_files
from components.pipeline.stages import Stage, find_stage
from univigu.errors import (
    BadInputError,
    ConfigError,
    CorruptDataError,
    MissingInputError,
    PreemptedError,
    TransientError,
    UniViGUError,
)

TRAINING_MODULE = "components.training.train_stage"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
_PERMANENT = {error.exit_code for error in (BadInputError, ConfigError, CorruptDataError, MissingInputError)}
_DISRUPTIONS = {"Evicted", "NodeLost", "NodeShutdown", "Preempting", "Shutdown", "Terminated"}  # reasons of pods


def run_train_job(name: str, profile: str, root: Path, settings: Settings) -> dict[str, Any]:
    """Run the step `name` as a TrainJob; returns the manifest of its output.

    Checks the settings before it requests GPUs. Raises errors of `univigu.errors`, as listed in the table of
    `train_job`.
    """
    from components.pipeline.runner import make_step

    stage, profile, root = _check(name, profile, root, settings)
    step = make_step(stage, load_profile(profile), root)
    job = build(stage, work_key(step.key, root, settings), profile, root, settings)
    wait = QueueNote(note_path(root, QUEUE, stage.name), job["metadata"]["name"], stage.name)
    return follow(job, settings, lambda: _output_of(step), wait)


def dry_run_train_job(name: str, profile: str, root: Path, settings: Settings) -> None:
    """Have the API server validate the TrainJob without creating it; raises the errors of `run_train_job`.

    The step's inputs need not exist yet.
    """
    stage, profile, root = _check(name, profile, root, settings)
    with Cluster.connect(settings.namespace, settings.api_timeout) as cluster:
        cluster.create(build(stage, "dry-run", profile, root, settings), dry_run=True)


def _check(name: str, profile: str, root: Path, settings: Settings) -> tuple[Stage, str, Path]:
    """The stage, the profile's name or absolute path, and the absolute root; raises if these can't be trained."""
    from univigu.training.engine import TrainingConfig, micro_batches

    stage, root = find_stage(name), root.resolve()
    if stage.module != TRAINING_MODULE:
        raise ConfigError(f"'{name}' is not a training step and needs no TrainJob; use `univigu run {name}`.")
    if settings.priority and not settings.queue:
        raise ConfigError(
            f"The priority '{settings.priority}' has no effect without a queue; add --queue (`training_queue` in the "
            "pipeline), or leave it out."
        )
    mount_path = (settings.mount_path or root).resolve()
    if not root.is_relative_to(mount_path):
        raise BadInputError(f"The work root {root} is not on the volume at {mount_path}; give another --mount-path.")
    profile = absolute_profile(profile)
    for path in profile_files(profile):
        if not path.resolve().is_relative_to(mount_path):
            raise BadInputError(f"The profile {path} is not on the volume at {mount_path}; copy it there.")
    values = load_profile(profile)
    micro_batches(
        TrainingConfig.from_section(values[stage.parameters[-1]], values["seed"]),
        settings.nodes * processes(stage, settings),
    )
    return stage, profile, root


def _output_of(step: Any) -> dict[str, Any] | None:
    """The manifest of the step's output, if it is complete and made from these inputs, parameters and code."""
    try:
        manifest = verify(step.previous, step.stage.name)
    except BadInputError:
        return None
    return manifest if Recipe.of(manifest).key() == step.key else None


def follow(
    job: dict[str, Any],
    settings: Settings,
    output: Callable[[], dict[str, Any] | None],
    wait: QueueNote | None = None,
) -> dict[str, Any]:
    """Follow a TrainJob to its end, and submit it first if necessary; returns the result of `output`.

    wait: the note of how long the TrainJob waits for its nodes.
    """
    with Cluster.connect(settings.namespace, settings.api_timeout) as cluster:
        try:
            return _Follower(cluster, job, settings, output, wait).run()
        finally:
            if wait is not None:
                wait.update(False)


class _Follower:
    """One TrainJob, from its submission to its end."""

    def __init__(
        self,
        cluster: Cluster,
        job: dict[str, Any],
        settings: Settings,
        output: Callable[[], dict[str, Any] | None],
        wait: QueueNote | None,
    ) -> None:
        self.cluster, self.job, self.settings, self.output, self.wait = cluster, job, settings, output, wait
        self.name = job["metadata"]["name"]
        self.label = f"TrainJob {cluster.namespace}/{self.name}"
        self.logs = _Logs(cluster)
        self.last_state = ""

    # pyrefly: ignore[bad-return]
    def run(self) -> dict[str, Any]:
        """Submit the TrainJob, also again after preemption, and follow it to its end; returns the manifest."""
        with _cancellation():
            try:
                return self._run()
            except _Cancelled as cancelled:
                self._clean_up(cancelled)

    def _run(self) -> dict[str, Any]:
        self._submit()
        for resumed in range(1, self.settings.resumes + 2):
            job = self._follow()
            if _condition(job, "Complete"):
                if manifest := self.output():
                    return manifest
                raise MissingInputError(
                    f"The {self.label} has completed, but its output is not in the work root here; check that "
                    "--claim is the volume that is mounted at --mount-path, and that the pods' image has this version."
                )
            pods = self.cluster.pods(self.name)
            if not _is_preempted(pods):
                raise self._failure(job, pods)
            if resumed > self.settings.resumes:
                break
            self._report(f"preempted; submitting it again ({resumed} of {self.settings.resumes})")
            self._submit()
        raise PreemptedError(
            f"The {self.label} was preempted {self.settings.resumes + 1} times, and saved its state; run the same "
            "command to resume it, or use a pool that is preempted less often."
        )

    def _submit(self) -> None:
        """Create the TrainJob, unless one of this name is running or has completed with its output in place."""
        while not self.cluster.create(self.job):
            found = self.cluster.get(self.name)
            if found is None:
                continue
            if found["metadata"].get("deletionTimestamp"):
                self._report("an earlier one is being deleted; waiting until it is gone")
            elif _condition(found, "Complete") and not self.output():
                self._report("an earlier one has completed, but its output is gone; replacing it")
            elif _condition(found, "Failed"):
                self._report("an earlier one has failed; replacing it, to resume from its checkpoint")
            else:
                self._report("already submitted; following it")
                return
            self.cluster.delete(self.name, self.settings.grace + 60)
        self._report(f"submitted, nodes: {self.settings.nodes}")

    def _follow(self) -> dict[str, Any]:
        """Wait for the TrainJob's end and forward its first pod's log; returns its last state."""
        last_active = time.monotonic()
        while True:
            job = self.cluster.get(self.name)
            if job is None or job["metadata"].get("deletionTimestamp"):
                raise PreemptedError(
                    f"The {self.label} was deleted by someone else; its pods received SIGTERM and saved their state. "
                    "Run the same command to resume it."
                )
            pods = self.cluster.pods(self.name)
            self.logs.forward(pods)
            if _condition(job, "Complete") or _condition(job, "Failed"):
                return job
            running = [pod for pod in pods if pod.status.phase in ("Running", "Succeeded")]  # replaced pods are Failed
            queued = job["spec"].get("suspend") or _condition(job, "Suspended")
            if self.wait is not None:
                self.wait.update(bool(queued) or len(running) < self.settings.nodes)
            if len(running) >= self.settings.nodes or queued:
                last_active = time.monotonic()
            if time.monotonic() - last_active > self.settings.start_timeout:
                reason = self.cluster.pending_reason(self.name, pods)
                self.cluster.delete(self.name, 0)
                raise TransientError(
                    f"The {self.label} had {len(running)} of {self.settings.nodes} pods running for "
                    f"{self.settings.start_timeout:g} s and was deleted ({reason}); fix the cause, or wait for free "
                    "nodes, and run the same command."
                )
            if queued:
                self._report("waiting in its queue")
            elif running:
                self._report(f"{len(running)} of {self.settings.nodes} pods have started")
            else:
                self._report(f"waiting for its pods ({self.cluster.pending_reason(self.name, pods)})")
            time.sleep(self.settings.poll)

    def _failure(self, job: Mapping[str, Any], pods: Sequence[Any]) -> UniViGUError:
        """The error of the pod that caused the failure, with the same exit code."""
        ended = [(pod.metadata.name, *end) for pod in pods if (end := _termination(pod)) and end[0]]
        for name, *_ in ended:
            self.logs.show_tail(name)
        condition = one_line(_condition(job, "Failed").get("message") or "no reason given")
        if not ended:
            return UniViGUError(f"The {self.label} failed ({condition}), and no pod is left whose log shows the cause.")
        name, code, reason = max(ended, key=lambda end: (_is_own_failure(*end[1:]), end[1]))
        if reason == "OOMKilled":
            limit = self.job["spec"]["trainer"]["resourcesPerNode"]["limits"]["memory"]
            return UniViGUError(
                f"The {self.label} failed: pod {name} exceeded its memory limit of {limit} (OOMKilled); raise "
                "--memory, or lower `micro_batch_size`."
            )
        detail = f": {self.logs.last_message}" if self.logs.last_message else "; its log is above"
        message = f"The {self.label} failed: pod {name} ended with exit code {code}{detail}"
        return _error_class(code)(message if message.endswith(".") else f"{message}.")

    def _clean_up(self, cancelled: "_Cancelled") -> None:
        """Delete the TrainJob; its pods receive SIGTERM and save their state."""
        self._report("received a signal to stop; deleting it")
        self.cluster.retry_s = min(self.cluster.retry_s, 15.0)  # SIGKILL may follow soon
        try:
            self.cluster.delete(self.name, 0)
        except TransientError as error:
            raise TransientError(
                f"The {self.label} may still be running, because the API server does not answer; delete it with "
                f"`kubectl delete trainjob {self.name} --namespace {self.cluster.namespace}`."
            ) from error
        if cancelled.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise PreemptedError(
            f"The {self.label} was deleted, because this command received SIGTERM; its pods save their state. Run the "
            "same command to resume it."
        )

    def _report(self, state: str) -> None:
        if state != self.last_state:
            print(f"{self.label}: {state}", file=sys.stderr, flush=True)
        self.last_state = state


class _Logs:
    """Forwards the log of the first pod to standard output, new lines at each poll."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.pod, self.last, self.polled = "", "", 0.0  # uid, timestamp of the last line, time of the last poll
        self.last_message = ""  # the last error message of the command

    def forward(self, pods: Sequence[Any]) -> None:
        first = [p for p in pods if p.metadata.labels.get(INDEX_LABEL, "0") == "0" and p.status.phase != "Pending"]
        if not first:
            return
        pod = max(first, key=lambda p: p.metadata.creation_timestamp)
        if pod.metadata.uid != self.pod:
            self.pod, self.last, self.polled = pod.metadata.uid, "", 0.0
        now = time.monotonic()
        since = {"since_seconds": int(now - self.polled) + 10} if self.polled else {}
        text = self.cluster.log(pod.metadata.name, timestamps=True, **since)
        if text is None:
            return
        self.polled = now
        for line in text.splitlines():
            timestamp, _, content = line.partition(" ")
            if timestamp > self.last:  # kubelet's timestamps have equal length, so they sort as text
                self.last = timestamp
                print(one_line(content), flush=True)
                self._remember(content)

    def show_tail(self, pod: str) -> None:
        """Print the end of a failed pod's log to standard error."""
        for line in (self.cluster.log(pod, tail_lines=20) or "").splitlines():
            print(f"{pod}: {one_line(line)}", file=sys.stderr)
            self._remember(line)

    def _remember(self, line: str) -> None:
        if message := sentence(line):
            self.last_message = one_line(message)


def _condition(job: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The condition of this type if its status is True, otherwise an empty mapping."""
    conditions = job.get("status", {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == kind and c["status"] == "True"), {})


def _termination(pod: Any) -> tuple[int, str] | None:
    """The exit code and the reason with which a pod's training container ended; None while it runs."""
    for status in pod.status.container_statuses or []:
        state = status.state.terminated or (status.last_state and status.last_state.terminated)
        if status.name == NODE and state:
            return state.exit_code, state.reason or ""
    return None


def _is_preempted(pods: Sequence[Any]) -> bool:
    """Whether pods were preempted or evicted, so that submitting the TrainJob again can help."""
    ends = [end for pod in pods if (end := _termination(pod))]
    if any(code in _PERMANENT for code, _ in ends):
        return False
    disrupted = {c.type for pod in pods for c in pod.status.conditions or [] if c.status == "True"}
    if "DisruptionTarget" in disrupted or any(pod.status.reason in _DISRUPTIONS for pod in pods):
        return True  # the remaining pods lose their peers and may exit with any code
    saved = any(code == PreemptedError.exit_code for code, _ in ends)
    return saved and not any(_is_own_failure(code, reason) for code, reason in ends)


def _is_own_failure(code: int, reason: str) -> bool:
    """Whether a pod failed on its own: it neither stopped after SIGTERM nor was killed after its grace period."""
    stopped = {0, PreemptedError.exit_code, 128 + signal.SIGTERM, 128 + signal.SIGKILL}
    return reason == "OOMKilled" or code not in stopped


def _error_class(code: int) -> type[UniViGUError]:
    classes, known = [UniViGUError], {}
    while classes:
        one = classes.pop()
        known.setdefault(one.exit_code, one)
        classes += one.__subclasses__()
    return known.get(code, UniViGUError)


class _Cancelled(BaseException):
    """SIGTERM or SIGINT was received; not an `Exception`, so that no handler mistakes it for a failed request."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _cancellation() -> Iterator[None]:
    """Raise `_Cancelled` on the first SIGTERM or SIGINT; ignore further ones, so that the clean-up completes."""

    def cancel(number: int, _: object) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        raise _Cancelled(number)

    before = {number: signal.signal(number, cancel) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
