"""What Airflow's tasks are made of: a step as a process of its own, and a Kubeflow pipeline that is waited for.

The operator for Kubeflow Pipelines is deferrable: while a run is under way it holds no worker. It submits under a name
that follows from the DAG run, so that a task that is tried again, by itself or after Airflow was killed, finds its run
instead of starting another.
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
from components.pipeline.processes import read_lines, start_child
from components.pipeline.profiles import load_profile
from components.pipeline.stages import find_stage
from univigu.errors import BusyError, ConfigError, MissingInputError, PreemptedError, TransientError, UniViGUError

ROOT_VARIABLE = "univigu_root"
FAILURE = "failure"  # the XCom with a failed task's sentence
KFP_ARGUMENTS = "UNIVIGU_KFP_ARGUMENTS"
POLL_S = 15.0
PATIENCE_S = 6 * 3600.0
GONE_S = 600.0  # after which a run that the server doesn't know is taken for deleted
BUSY_S = 15.0
# Beside KFP's own states: the server was of no help for too long, it knows no such run, the run took too long.
UNREACHABLE, GONE, OVERDUE = "UNREACHABLE", "GONE", "OVERDUE"
TRY_AGAIN = frozenset(error.exit_code for error in (TransientError, PreemptedError))


def work_root() -> Path:
    """The folder that the Airflow variable `univigu_root` names; nobody can choose it in a form."""
    value = Variable.get(ROOT_VARIABLE, default="")
    if not value or not Path(value).is_dir():
        raise ConfigError(
            f"The Airflow variable '{ROOT_VARIABLE}' names no folder ({value!r}); set it to the work root, or "
            f"AIRFLOW_VAR_{ROOT_VARIABLE.upper()} in Airflow's environment."
        )
    return Path(value).resolve()


def merge_arguments(package: Path, own: Mapping[str, Any], more: str) -> dict[str, Any]:
    """A run's own arguments with those of `more`, the JSON object in UNIVIGU_KFP_ARGUMENTS.

    Raises `ConfigError` for what is none, and for a parameter that the pipeline lacks or that `own` has.
    """
    try:
        found = json.loads(more or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f'{KFP_ARGUMENTS} holds no JSON object; write it as {{"parts": 4, "gpus": "2"}}.')
    if taken := sorted(own.keys() & found.keys()):
        raise ConfigError(f"{KFP_ARGUMENTS} sets '{taken[0]}', which each run sets for itself; leave it out.")
    try:
        return {**own, **typed_arguments(package, found)}
    except ConfigError as error:
        raise ConfigError(f"{KFP_ARGUMENTS}: {error}") from None


def require_known_fields(context: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a field that the DAG's form doesn't have: Airflow checks the values of those it has."""
    if unknown := sorted(set(context["dag_run"].conf or {}) - set(context["dag"].params)):
        raise ConfigError(f"The form has no field '{unknown[0]}'; it has {', '.join(sorted(context['dag'].params))}.")


@contextmanager
def clear_failures(context: Mapping[str, Any]) -> Iterator[None]:
    """Fail a task in one sentence, which later tasks find as its XCom `failure`.

    What may work on the next try is tried again as the task's `retries` say; anything else fails at once.
    """
    try:
        yield
    except UniViGUError as error:
        context["ti"].xcom_push(key=FAILURE, value=str(error))
        passing = isinstance(error, (TransientError, PreemptedError))
        raise (AirflowException if passing else AirflowFailException)(str(error)) from None
    except AirflowTaskTimeout:
        context["ti"].xcom_push(key=FAILURE, value="the task took longer than its time limit, and was stopped")
        raise


class StepFailedError(UniViGUError):
    """A step's process said why it failed, and that trying again will not help."""


class StepOperator(BaseOperator):
    """Runs one step as `univigu run STEP` in a process of its own, unless its output is there and up to date.

    The step's lines go to the task's log. It ends as the step does: a passing failure is tried again, any other fails
    at once with the step's own sentence. While another process makes the same step, it waits. When the task is stopped,
    or its time is over, the step is stopped too, and goes on where it was next time.
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
        """Returns the digest of the step's output; those of its inputs have to be what this DAG run's tasks left."""
        from components.pipeline.freshness import committed, finished, require_inputs

        with clear_failures(context):
            root, expected = work_root(), self._inputs(context)
            while True:
                require_inputs(self.step, root, expected)
                if self.skip_finished and (manifest := finished(self.step, load_profile(self.profile), root)):
                    self.log.info("finished before, with the same inputs, parameters and code")
                    return manifest["digest"]
                code, said = self._run(command(self.step, self.profile, str(root)))
                if code != BusyError.exit_code:
                    break
                self.log.info("waiting, as another process makes this step")
                time.sleep(BUSY_S)
                if self._stopped:
                    raise PreemptedError(f"'{self.step}' was stopped before it could begin.")
            if code < 0:
                killer = signal.Signals(-code).name
                raise PreemptedError(f"'{self.step}' was stopped by {killer}; it goes on where it was.")
            if code:
                failure = PreemptedError if code in TRY_AGAIN else StepFailedError
                raise failure(said or f"'{self.step}' ended with exit code {code}; its log says why.")
            require_inputs(self.step, root, expected, made=True)
            return committed(self.step, root)["digest"]

    def _inputs(self, context: Mapping[str, Any]) -> dict[str, str]:
        """What the tasks of this DAG run have returned that make this step's inputs; they lie in the same group."""
        group = self.task_id.removesuffix(self.step)
        makers = sorted(set(find_stage(self.step).inputs.values()))
        digests = (context["ti"].xcom_pull(task_ids=group + maker) for maker in makers)
        return {maker: digest for maker, digest in zip(makers, digests, strict=True) if digest}

    def on_kill(self) -> None:
        """Ask the step to stop; a training step saves its state."""
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def _run(self, arguments: list[str]) -> tuple[int, str]:
        """Run a command to its end; returns its exit code and the last sentence that it said."""
        with start_child(arguments, self.env) as process:
            self._process = process
            try:
                said = read_lines(process, lambda line: self.log.info("%s", line))
            except BaseException:  # AirflowTaskTimeout, which comes from a signal
                process.terminate()
                try:
                    process.communicate(timeout=STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                raise
        return process.returncode, said


class KfpRunOperator(BaseOperator):
    """Runs a compiled pipeline on a Kubeflow Pipelines server and waits for its end without holding a worker.

    The server's address is in KFP_ENDPOINT and its token where `KfpServer` looks for it, in the environment of
    scheduler and triggerer alike. A run of `run_name` that lives or succeeded is that run; one that failed or was
    cancelled is replaced when the task is cleared, and goes on from what its steps have finished. Stopping the task,
    or marking it, cancels the run, and so does `limit_s`, the longest that it may take. Returns the run's id.

    more_arguments: JSON that `merge_arguments` adds to `arguments`. service_account: the account of the run's pods, in
    place of the server's.
    """

    template_fields = ("run_name", "arguments")

    def __init__(
        self,
        *,
        package: str,
        run_name: str,
        arguments: Mapping[str, Any],
        more_arguments: str = "",
        service_account: str = "",
        namespace: str = "",
        limit_s: float,
        poll_s: float = POLL_S,
        patience_s: float = PATIENCE_S,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.package, self.run_name, self.arguments = package, run_name, dict(arguments)
        self.more_arguments, self.service_account = more_arguments, service_account
        self.namespace, self.limit_s, self.poll_s, self.patience_s = namespace, limit_s, poll_s, patience_s
        self._run_id = ""

    def execute(self, context: Mapping[str, Any]) -> str:

        with clear_failures(context):
            package = Path(self.package)
            arguments = merge_arguments(package, self.arguments, self.more_arguments)
            server = KfpServer(namespace=self.namespace)
            self._run_id = server.submit(package, self.run_name, arguments, service_account=self.service_account)
            self.log.info("run %s on %s is called '%s'", self._run_id, server.host, self.run_name)
            now = server.state(self._run_id)
        if now.is_terminal:
            return self.finish(context, {"run_id": self._run_id, "state": now.state, "message": now.message})
        end = time.time() + self.limit_s
        self.defer(
            trigger=KfpRunTrigger(self._run_id, self.namespace, end, self.poll_s, self.patience_s), method_name="finish"
        )
        raise AssertionError("unreachable")

    def finish(self, context: Mapping[str, Any], event: Mapping[str, str]) -> str:
        """Called with the run's last state: returns its id if it succeeded, and fails the task otherwise."""
        run_id, state, message = event["run_id"], event["state"], event["message"]
        with clear_failures(context):
            if state == UNREACHABLE:
                raise TransientError(message)
            if state == GONE:
                raise RunFailedError(
                    f"The Kubeflow Pipelines server no longer knows the run {run_id} ({message}); clear this task to "
                    f"submit another, which goes on from what is finished."
                )
            if state == OVERDUE:
                raise RunFailedError(
                    f"The run {run_id} had not ended after {self.limit_s / 3600:g} hours, and was cancelled; `univigu "
                    f"pipeline status {run_id}` shows how far it came, and clearing this task goes on from there."
                )
            if state == "CANCELED":
                raise RunCanceledError(
                    f"The run {run_id} was cancelled on the Kubeflow Pipelines server; clear this task to go on from "
                    f"what its steps have finished."
                )
            if state != "SUCCEEDED":
                raise RunFailedError(
                    f"The run {run_id} ended as {state} ({message or 'the server gives no reason'}); "
                    f"`univigu pipeline logs {run_id}` shows why, and clearing this task goes on from there."
                )
        return run_id

    def on_kill(self) -> None:
        """Cancel the run of a task that is stopped before it waits."""
        if self._run_id:
            KfpServer(namespace=self.namespace).cancel(self._run_id)


class KfpRunTrigger(BaseTrigger):
    """Looks at a run every `poll_s` seconds until it has ended; at the Unix time `end` it is cancelled.

    A server that does not answer, or refuses to, is asked again for `patience_s` seconds: the run goes on without us.
    """

    def __init__(self, run_id: str, namespace: str, end: float, poll_s: float, patience_s: float) -> None:
        super().__init__()
        self.run_id, self.namespace, self.end, self.poll_s, self.patience_s = run_id, namespace, end, poll_s, patience_s

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """What Airflow keeps of the trigger; no address and no token is in it."""
        path = f"{type(self).__module__}.{type(self).__qualname__}"
        return path, {name: getattr(self, name) for name in ("run_id", "namespace", "end", "poll_s", "patience_s")}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        answered = time.monotonic()
        while True:
            try:
                state, message = await asyncio.to_thread(self._look)
                answered = time.monotonic()
            except UniViGUError as error:  # a token that is renewed, or a gateway that starts, helps itself too
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
        """Cancel the run: a person stopped or marked the task. A triggerer that restarts does not come here."""
        await asyncio.to_thread(self._server().cancel, self.run_id)

    def _look(self) -> tuple[str, str]:
        now = self._server().state(self.run_id)
        return (now.state, now.message) if now.is_terminal else ("", "")

    def _server(self) -> Any:

        return KfpServer(namespace=self.namespace)
