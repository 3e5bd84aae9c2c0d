"""Airflow operators: one runs a step in its own process, the other runs a Kubeflow pipeline and waits for it.

The operator for Kubeflow Pipelines is deferrable: it occupies no worker while a run is active. The run's name is
derived from the DAG run, so that a retried task, also after Airflow was killed, finds its run instead of starting
another.
"""

import asyncio
import json
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator, Variable
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowTaskTimeout
from airflow.triggers.base import BaseTrigger, TriggerEvent

from components.orchestration.kfp_server import KfpServer, RunCanceledError, RunFailedError, typed_arguments
from components.orchestration.kfp_tasks import STOP_S, command
from components.pipeline.notes import DEFERRED, note_path, remove_note, write_note
from components.pipeline.processes import read_lines, start_child
from components.pipeline.profiles import load_profile
from components.pipeline.stages import find_stage
from univigu.errors import BusyError, ConfigError, MissingInputError, PreemptedError, TransientError, UniViGUError

ROOT_VARIABLE = "univigu_root"
FAILURE = "failure"  # the XCom with a failed task's message
KFP_ARGUMENTS = "UNIVIGU_KFP_ARGUMENTS"
POLL_S = 15.0
PATIENCE_S = 6 * 3600.0
GONE_S = 600.0  # after this time, a run that the server doesn't know counts as deleted
BUSY_S = 15.0
# In addition to KFP's states: the server failed for too long, it doesn't know the run, the run exceeded its time limit.
UNREACHABLE, GONE, OVERDUE = "UNREACHABLE", "GONE", "OVERDUE"
RETRYABLE = frozenset(error.exit_code for error in (TransientError, PreemptedError))


def work_root() -> Path:
    """The folder in the Airflow variable `univigu_root`; users who trigger a DAG can't choose it."""
    value = Variable.get(ROOT_VARIABLE, default="")
    if not value or not Path(value).is_dir():
        raise ConfigError(
            f"The Airflow variable '{ROOT_VARIABLE}' is not a folder ({value!r}); set it to the work root, or set "
            f"AIRFLOW_VAR_{ROOT_VARIABLE.upper()} in Airflow's environment."
        )
    return Path(value).resolve()


def merge_arguments(package: Path, arguments: Mapping[str, Any], extra: str) -> dict[str, Any]:
    """A run's arguments with those of `extra`, the JSON object in UNIVIGU_KFP_ARGUMENTS.

    Raises `ConfigError` for invalid JSON, for an unknown parameter, and for a parameter that is also in `arguments`.
    """
    try:
        extra_arguments = json.loads(extra or "{}")
    except ValueError:
        extra_arguments = None
    if not isinstance(extra_arguments, dict):
        raise ConfigError(f'{KFP_ARGUMENTS} is not a JSON object; use the form {{"parts": 4, "gpus": "2"}}.')
    if taken := sorted(arguments.keys() & extra_arguments.keys()):
        raise ConfigError(f"{KFP_ARGUMENTS} sets '{taken[0]}', which the DAG sets itself; remove it.")
    try:
        return {**arguments, **typed_arguments(package, extra_arguments)}
    except ConfigError as error:
        raise ConfigError(f"{KFP_ARGUMENTS}: {error}") from None


def require_known_fields(context: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a parameter that the DAG doesn't have; Airflow checks only the values of known ones."""
    if unknown := sorted(set(context["dag_run"].conf or {}) - set(context["dag"].params)):
        raise ConfigError(
            f"The DAG has no parameter '{unknown[0]}'; it has {', '.join(sorted(context['dag'].params))}."
        )


@contextmanager
def report_failures(context: Mapping[str, Any]) -> Iterator[None]:
    """Turn an expected error into a failed task, with the message in the XCom `failure` for later tasks.

    Transient failures are retried as the task's `retries` say; other errors fail the task at once.
    """
    try:
        yield
    except UniViGUError as error:
        context["ti"].xcom_push(key=FAILURE, value=str(error))
        is_retryable = isinstance(error, (TransientError, PreemptedError))
        raise (AirflowException if is_retryable else AirflowFailException)(str(error)) from None
    except AirflowTaskTimeout:
        context["ti"].xcom_push(key=FAILURE, value="the task exceeded its time limit and was stopped")
        raise


class StepFailedError(UniViGUError):
    """A step's process failed with an error that a retry will not fix."""


class StepOperator(BaseOperator):
    """Runs one step as `univigu run STEP` in its own process, unless its output is up to date.

    The step's output goes to the task's log. Transient failures are retried; any other failure fails the task at once,
    with the step's message. While another process runs the same step, the task waits. When the task is stopped or
    exceeds its time limit, the step is stopped too, and resumes at the next attempt.
    """

    template_fields = ("profile",)

    def __init__(
        self,
        *,
        step: str,
        profile: str,
        skip_finished: bool = True,
        env: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.step, self.profile, self.skip_finished, self.env = step, profile, skip_finished, dict(env or {})
        self._process: subprocess.Popen | None = None
        self._stopped = False

    def execute(self, context: Mapping[str, Any]) -> str:
        """Returns the digest of the step's output; its inputs must be the outputs of this DAG run's tasks."""
        from components.pipeline.freshness import committed, finished, require_inputs

        with report_failures(context):
            root, expected = work_root(), self._inputs(context)
            while True:
                require_inputs(self.step, root, expected)
                if self.skip_finished and (manifest := finished(self.step, load_profile(self.profile), root)):
                    self.log.info("finished before, with the same inputs, parameters and code")
                    return manifest["digest"]
                code, message = self._run(command(self.step, self.profile, str(root)))
                if code != BusyError.exit_code:
                    break
                self.log.info("waiting, because another process runs this step")
                time.sleep(BUSY_S)
                if self._stopped:
                    raise PreemptedError(f"'{self.step}' was stopped before it started.")
            if code < 0:
                killer = signal.Signals(-code).name
                raise PreemptedError(f"'{self.step}' was stopped by {killer}; it resumes at the next attempt.")
            if code:
                failure = PreemptedError if code in RETRYABLE else StepFailedError
                raise failure(message or f"'{self.step}' ended with exit code {code}; see its log.")
            require_inputs(self.step, root, expected, made=True)
            return committed(self.step, root)["digest"]

    def _inputs(self, context: Mapping[str, Any]) -> dict[str, str]:
        """The digests that this DAG run's tasks returned for this step's inputs; they are in the same task group."""
        group = self.task_id.removesuffix(self.step)
        makers = sorted(set(find_stage(self.step).inputs.values()))
        digests = (context["ti"].xcom_pull(task_ids=group + maker) for maker in makers)
        return {maker: digest for maker, digest in zip(makers, digests, strict=True) if digest}

    def on_kill(self) -> None:
        """Send SIGTERM to the step; a training step saves its state."""
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def _run(self, arguments: list[str]) -> tuple[int, str]:
        """Run a command to its end; returns its exit code and its last message."""
        with start_child(arguments, self.env) as process:
            self._process = process
            if self._stopped:  # while it was started
                process.terminate()
            try:
                message = read_lines(process, lambda line: self.log.info("%s", line))
            except BaseException:  # AirflowTaskTimeout, which a signal handler raises
                process.terminate()
                try:
                    process.communicate(timeout=STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                raise
        return process.returncode, message


class KfpRunOperator(BaseOperator):
    """Runs a compiled pipeline on a Kubeflow Pipelines server, and waits for its end without occupying a worker.

    The scheduler and the triggerer both need the server's address in KFP_ENDPOINT and the token as `KfpServer` reads
    it. An active or succeeded run called `run_name` is reused. Clearing the task replaces a failed or cancelled run by
    a new one, which skips finished steps. Stopping or marking the task cancels the run, as does the time limit
    `limit_s`, in seconds. Returns the run's id.

    extra_arguments: JSON that `merge_arguments` adds to `arguments`. service_account: of the run's pods; by default
    the server's choice.
    """

    template_fields = ("run_name", "arguments")

    def __init__(
        self,
        *,
        package: str,
        run_name: str,
        arguments: Mapping[str, Any],
        extra_arguments: str = "",
        service_account: str = "",
        namespace: str = "",
        limit_s: float,
        poll_s: float = POLL_S,
        patience_s: float = PATIENCE_S,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.package, self.run_name, self.arguments = package, run_name, dict(arguments)
        self.extra_arguments, self.service_account = extra_arguments, service_account
        self.namespace, self.limit_s, self.poll_s, self.patience_s = namespace, limit_s, poll_s, patience_s
        self._run_id = ""

    def execute(self, context: Mapping[str, Any]) -> str:
        """Submit the run, and defer until it has ended."""
        with report_failures(context):
            package = Path(self.package)
            arguments = merge_arguments(package, self.arguments, self.extra_arguments)
            server = KfpServer(namespace=self.namespace)
            self._run_id = server.submit(package, self.run_name, arguments, service_account=self.service_account)
            self.log.info("run %s on %s has the name '%s'", self._run_id, server.host, self.run_name)
            now = server.state(self._run_id)
        if now.is_terminal:
            return self.finish(context, {"run_id": self._run_id, "state": now.state, "message": now.message})
        end, note = time.time() + self.limit_s, self._note()
        if note:
            write_note(Path(note), {"run": self.run_name, "since": time.time(), "end": end})
        self.defer(
            trigger=KfpRunTrigger(self._run_id, self.namespace, end, self.poll_s, self.patience_s, note),
            method_name="finish",
        )
        raise AssertionError("unreachable")

    def finish(self, context: Mapping[str, Any], event: Mapping[str, str]) -> str:
        """Called with the run's final state: returns its id if it succeeded, and fails the task otherwise."""
        run_id, state, message = event["run_id"], event["state"], event["message"]
        if note := self._note():
            remove_note(Path(note))
        with report_failures(context):
            if state == UNREACHABLE:
                raise TransientError(message)
            if state == GONE:
                raise RunFailedError(
                    f"The Kubeflow Pipelines server no longer knows the run {run_id} ({message}); clear this task to "
                    f"submit a new run, which skips finished steps."
                )
            if state == OVERDUE:
                raise RunFailedError(
                    f"The run {run_id} had not ended after {self.limit_s / 3600:g} hours, and was cancelled; see "
                    f"`univigu pipeline status {run_id}`, and clear this task to continue."
                )
            if state == "CANCELED":
                raise RunCanceledError(
                    f"The run {run_id} was cancelled on the Kubeflow Pipelines server; clear this task to submit a new "
                    f"run, which skips finished steps."
                )
            if state != "SUCCEEDED":
                raise RunFailedError(
                    f"The run {run_id} ended as {state} ({message or 'the server gives no reason'}); see "
                    f"`univigu pipeline logs {run_id}`, and clear this task to continue."
                )
        return run_id

    def _note(self) -> str:
        """The file that tells monitoring of the deferred run; "" if Airflow knows no work root."""
        try:
            return str(note_path(work_root(), DEFERRED, self.run_name))
        except UniViGUError:
            return ""

    def on_kill(self) -> None:
        """Cancel the run of a task that is stopped before it is deferred."""
        if self._run_id:
            KfpServer(namespace=self.namespace).cancel(self._run_id)


class KfpRunTrigger(BaseTrigger):
    """Polls a run every `poll_s` seconds until it has ended; cancels it at the Unix time `end`.

    A server that fails or denies access is polled for another `patience_s` seconds, as the run continues without it.
    note: the file that tells monitoring of the run.
    """

    def __init__(
        self, run_id: str, namespace: str, end: float, poll_s: float, patience_s: float, note: str = ""
    ) -> None:
        super().__init__()
        self.run_id, self.namespace, self.end, self.poll_s, self.patience_s = run_id, namespace, end, poll_s, patience_s
        self.note = note

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """The trigger's state in Airflow's database; it contains no address and no token."""
        path = f"{type(self).__module__}.{type(self).__qualname__}"
        names = ("run_id", "namespace", "end", "poll_s", "patience_s", "note")
        return path, {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        answered = time.monotonic()
        while True:
            try:
                state, message = await asyncio.to_thread(self._final_state)
                answered = time.monotonic()
            except UniViGUError as error:  # may recover: a token is renewed, or a gateway restarts
                state, message = "", ""
                self.log.warning("%s", error)
                silent = time.monotonic() - answered
                if isinstance(error, MissingInputError) and silent > min(GONE_S, self.patience_s):
                    state, message = GONE, str(error)
                elif silent > self.patience_s:
                    state, message = UNREACHABLE, str(error)
            if not state and time.time() > self.end:
                with suppress(UniViGUError):
                    await self.on_kill()
                state, message = OVERDUE, ""
            if state:
                yield TriggerEvent({"run_id": self.run_id, "state": state, "message": message})
                return
            await asyncio.sleep(self.poll_s)

    async def on_kill(self) -> None:
        """Cancel the run: the user stopped or marked the task. Airflow does not call this when a triggerer restarts."""
        if self.note:
            remove_note(Path(self.note))
        await asyncio.to_thread(self._server().cancel, self.run_id)

    def _final_state(self) -> tuple[str, str]:
        """The run's state and message, or empty strings while it is active."""
        now = self._server().state(self.run_id)
        return (now.state, now.message) if now.is_terminal else ("", "")

    def _server(self) -> Any:
        return KfpServer(namespace=self.namespace)
