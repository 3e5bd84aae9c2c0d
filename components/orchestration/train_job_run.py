"""One TrainJob from its submission to its end: `train_job.py` says what becomes of it in each case."""

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
_HOPELESS = {error.exit_code for error in (BadInputError, ConfigError, CorruptDataError, MissingInputError)}
_DISRUPTIONS = {"Evicted", "NodeLost", "NodeShutdown", "Preempting", "Shutdown", "Terminated"}  # why a pod was ended


def run_train_job(name: str, profile: str, root: Path, settings: Settings) -> dict[str, Any]:
    """Have the step `name` run as a TrainJob; returns the manifest of its output.

    Everything that can be checked is, before GPUs are asked for. Raises an error of `univigu.errors`, as the table at
    the head of `train_job` says.
    """
    from components.pipeline.runner import make_step

    stage, profile, root = _check(name, profile, root, settings)
    step = make_step(stage, load_profile(profile), root)
    job = build(stage, work_key(step.key, root, settings), profile, root, settings)
    return follow(job, settings, lambda: _output_of(step))


def try_train_job(name: str, profile: str, root: Path, settings: Settings) -> None:
    """Have the API server check such a TrainJob as it would a real one; raises as `run_train_job` does.

    The step's inputs don't have to be there yet.
    """
    stage, profile, root = _check(name, profile, root, settings)
    with Cluster.connect(settings.namespace, settings.api_timeout) as cluster:
        cluster.create(build(stage, "dry-run", profile, root, settings), dry_run=True)


def _check(name: str, profile: str, root: Path, settings: Settings) -> tuple[Stage, str, Path]:
    """The stage, the profile's name or absolute path, and the absolute root; raises for what can't be trained there."""
    from univigu.training.engine import TrainingConfig, micro_batches

    stage, root = find_stage(name), root.resolve()
    if stage.module != TRAINING_MODULE:
        raise ConfigError(f"'{name}' doesn't train, so it needs no TrainJob; use `univigu run {name}`.")
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
    """The manifest of the step's output, if these inputs, parameters and code made it and it is whole."""
    try:
        manifest = verify(step.previous, step.stage.name)
    except BadInputError:
        return None
    return manifest if Recipe.of(manifest).key() == step.key else None


def follow(job: dict[str, Any], settings: Settings, output: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """See a TrainJob through to its end, submitting it if it isn't there; returns what `output` then finds."""
    with Cluster.connect(settings.namespace, settings.api_timeout) as cluster:
        return _Follower(cluster, job, settings, output).run()


class _Follower:
    """One TrainJob, from its submission to its end."""

    def __init__(
        self,
        cluster: Cluster,
        job: dict[str, Any],
        settings: Settings,
        output: Callable[[], dict[str, Any] | None],
    ) -> None:
        self.cluster, self.job, self.settings, self.output = cluster, job, settings, output
        self.name = job["metadata"]["name"]
        self.called = f"TrainJob {cluster.namespace}/{self.name}"
        self.logs = _Logs(cluster)
        self.last_state = ""

    # pyrefly: ignore[bad-return]
    def run(self) -> dict[str, Any]:
        """Follow the TrainJob, submitting it where it isn't there yet or was preempted; returns the manifest."""
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
                    f"The {self.called} has completed, and its output is not below the work root here; check that "
                    "--claim is the volume that is mounted at --mount-path, and that the pods' image has this version."
                )
            pods = self.cluster.pods(self.name)
            if not _is_preempted(pods):
                raise self._failure(job, pods)
            if resumed > self.settings.resumes:
                break
            self._say(f"preempted; submitting it again ({resumed} of {self.settings.resumes})")
            self._submit()
        raise PreemptedError(
            f"The {self.called} was preempted {self.settings.resumes + 1} times, and saved its state; run the same "
            "command to go on, or ask for a pool that lasts longer."
        )

    def _submit(self) -> None:
        """See to it that the TrainJob is there: created, or found under way, or finished with its output in place."""
        while not self.cluster.create(self.job):
            found = self.cluster.get(self.name)
            if found is None:
                continue
            if found["metadata"].get("deletionTimestamp"):
                self._say("another of this name is being deleted; waiting for it to be gone")
            elif _condition(found, "Complete") and not self.output():
                self._say("an earlier one has completed, but its output is gone; replacing it")
            elif _condition(found, "Failed"):
                self._say("an earlier one has failed; replacing it, to go on from its checkpoint")
            else:
                self._say("it was submitted before; following it")
                return
            self.cluster.delete(self.name, self.settings.grace + 60)
        self._say(f"submitted, nodes: {self.settings.nodes}")

    def _follow(self) -> dict[str, Any]:
        """Wait for the TrainJob's end, passing on its first pod's log; returns it as it was last seen."""
        alive = time.monotonic()
        while True:
            job = self.cluster.get(self.name)
            if job is None or job["metadata"].get("deletionTimestamp"):
                raise PreemptedError(
                    f"The {self.called} was deleted by someone else while it was followed; its pods were told to stop "
                    "and save. Run the same command to go on."
                )
            pods = self.cluster.pods(self.name)
            self.logs.pass_on(pods)
            if _condition(job, "Complete") or _condition(job, "Failed"):
                return job
            running = [pod for pod in pods if pod.status.phase in ("Running", "Succeeded")]  # a replaced one has Failed
            queued = job["spec"].get("suspend") or _condition(job, "Suspended")
            if len(running) >= self.settings.nodes or queued:
                alive = time.monotonic()
            if time.monotonic() - alive > self.settings.start_timeout:
                why = self.cluster.why_not_started(self.name, pods)
                self.cluster.delete(self.name, 0)
                raise TransientError(
                    f"The {self.called} had {len(running)} of {self.settings.nodes} pods running for "
                    f"{self.settings.start_timeout:g} s and was deleted ({why}); mend that, or wait for room, and run "
                    "the same command."
                )
            if queued:
                self._say("waiting in its queue")
            elif running:
                self._say(f"{len(running)} of {self.settings.nodes} pods have started")
            else:
                self._say(f"waiting for its pods ({self.cluster.why_not_started(self.name, pods)})")
            time.sleep(self.settings.poll)

    def _failure(self, job: Mapping[str, Any], pods: Sequence[Any]) -> UniViGUError:
        """The error that the pods ended with, under the same exit code."""
        ended = [(pod.metadata.name, *end) for pod in pods if (end := _end(pod)) and end[0]]
        for name, *_ in ended:
            self.logs.show_tail(name)
        condition = one_line(_condition(job, "Failed").get("message") or "no reason given")
        if not ended:
            return UniViGUError(f"The {self.called} failed ({condition}), and no pod is left that says why.")
        name, code, reason = max(ended, key=lambda end: (_is_own_fault(*end[1:]), end[1]))
        if reason == "OOMKilled":
            limit = self.job["spec"]["trainer"]["resourcesPerNode"]["limits"]["memory"]
            return UniViGUError(
                f"The {self.called} failed: pod {name} needed more memory than its {limit} (OOMKilled); raise "
                "--memory, or lower `micro_batch_size`."
            )
        said = f", saying: {self.logs.last_words}" if self.logs.last_words else "; its log is above"
        message = f"The {self.called} failed: pod {name} ended with exit code {code}{said}"
        return _error_class(code)(message if message.endswith(".") else f"{message}.")

    def _clean_up(self, cancelled: "_Cancelled") -> None:
        """Delete the TrainJob; the pods save what they have, as their own SIGTERM asks them to."""
        self._say("told to stop; deleting it")
        self.cluster.patience = min(self.cluster.patience, 15.0)  # whoever told will not wait for ever
        try:
            self.cluster.delete(self.name, 0)
        except TransientError as error:
            raise TransientError(
                f"The {self.called} may still be running, as the API server doesn't answer; delete it with "
                f"`kubectl delete trainjob {self.name} --namespace {self.cluster.namespace}`."
            ) from error
        if cancelled.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise PreemptedError(
            f"The {self.called} was deleted, as this command was told to stop; its pods save what they have. Run the "
            "same command to go on."
        )

    def _say(self, state: str) -> None:
        if state != self.last_state:
            print(f"{self.called}: {state}", file=sys.stderr, flush=True)
        self.last_state = state


class _Logs:
    """The log of the pod that speaks for all, on standard output, a few lines at each look."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.pod, self.last, self.looked = "", "", 0.0
        self.last_words = ""  # what the command said last: why it stopped

    def pass_on(self, pods: Sequence[Any]) -> None:
        first = [p for p in pods if p.metadata.labels.get(INDEX_LABEL, "0") == "0" and p.status.phase != "Pending"]
        if not first:
            return
        pod = max(first, key=lambda p: p.metadata.creation_timestamp)
        if pod.metadata.uid != self.pod:
            self.pod, self.last, self.looked = pod.metadata.uid, "", 0.0
        now = time.monotonic()
        since = {"since_seconds": int(now - self.looked) + 10} if self.looked else {}
        text = self.cluster.log(pod.metadata.name, timestamps=True, **since)
        if text is None:
            return
        self.looked = now
        for line in text.splitlines():
            stamp, _, said = line.partition(" ")
            if stamp > self.last:  # kubelet's stamps are of equal length
                self.last = stamp
                print(one_line(said), flush=True)
                self._remember(said)

    def show_tail(self, pod: str) -> None:
        """The end of a failed pod's log, on standard error."""
        for line in (self.cluster.log(pod, tail_lines=20) or "").splitlines():
            print(f"{pod}: {one_line(line)}", file=sys.stderr)
            self._remember(line)

    def _remember(self, line: str) -> None:
        if said := sentence(line):
            self.last_words = one_line(said)


def _condition(job: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The condition of that type if it is true, else nothing."""
    conditions = job.get("status", {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == kind and c["status"] == "True"), {})


def _end(pod: Any) -> tuple[int, str] | None:
    """How a pod's training container ended: exit code and reason."""
    for status in pod.status.container_statuses or []:
        state = status.state.terminated or (status.last_state and status.last_state.terminated)
        if status.name == NODE and state:
            return state.exit_code, state.reason or ""
    return None


def _is_preempted(pods: Sequence[Any]) -> bool:
    """Whether pods saved and left, or were taken away: what comes of it is not the training's own fault."""
    ends = [end for pod in pods if (end := _end(pod))]
    if any(code in _HOPELESS for code, _ in ends):
        return False
    disrupted = {c.type for pod in pods for c in pod.status.conditions or [] if c.status == "True"}
    if "DisruptionTarget" in disrupted or any(pod.status.reason in _DISRUPTIONS for pod in pods):
        return True  # and who was left alone may have ended with any code
    saved = any(code == PreemptedError.exit_code for code, _ in ends)
    return saved and not any(_is_own_fault(code, reason) for code, reason in ends)


def _is_own_fault(code: int, reason: str) -> bool:
    """Whether a pod failed by itself: neither was it told to stop, nor killed because it hadn't stopped in time."""
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
    """SIGTERM or SIGINT came; not an Exception, so that nothing on the way takes it for a failed request."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _cancellation() -> Iterator[None]:
    """Raise `_Cancelled` at the first SIGTERM or SIGINT, and let nothing more disturb the cleaning up."""

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
