"""What Airflow's tasks are made of: a step as a process of its own, and a Kubeflow pipeline that is waited for.

The operator for Kubeflow Pipelines is deferrable: while a run is under way it holds no worker. It submits under a name
that follows from the DAG run, and notes the run's id before it waits, so that a task that is tried again, by itself or
after Airflow was killed, finds its run instead of starting another.
"""

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator, Variable
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from airflow.triggers.base import BaseTrigger, TriggerEvent

from univigu.errors import BusyError, ConfigError, PreemptedError, TransientError, UniViGUError

ROOT_VARIABLE = "univigu_root"
FAILURE = "failure"  # the XCom with a failed task's sentence
RUN_ID = "kfp_run_id"
KFP_ARGUMENTS = "UNIVIGU_KFP_ARGUMENTS"
POLL_S = 15.0
PATIENCE_S = 6 * 3600.0
UNREACHABLE = "UNREACHABLE"  # beside KFP's own states: the server did not answer for too long
TRY_AGAIN = frozenset(error.exit_code for error in (TransientError, BusyError, PreemptedError))


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
    from components.pipeline.kfp_server import typed_arguments

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


class StepFailedError(UniViGUError):
    """A step's process said why it failed, and that trying again will not help."""


class StepOperator(BaseOperator):
    """Runs one step as `univigu run STEP` in a process of its own, unless its output is there and up to date.

    The step's lines go to the task's log. It ends as the step does: a passing failure is tried again, any other fails
    at once with the step's own sentence. When the task is stopped the step is too, and goes on where it was next time.
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

    def execute(self, context: Mapping[str, Any]) -> None:
        from components.pipeline.freshness import finished
        from components.pipeline.kfp_tasks import command
        from components.pipeline.profiles import load_profile

        with clear_failures(context):
            root = work_root()
            if self.skip_finished and finished(self.step, load_profile(self.profile), root):
                self.log.info("finished before, with the same inputs, parameters and code")
                return
            self._run(command(self.step, self.profile, str(root)))

    def on_kill(self) -> None:
        """Ask the step to stop; a training step saves its state."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def _run(self, arguments: list[str]) -> None:
        said = ""
        with subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **self.env},
        ) as process:
            self._process = process
            for line in process.stdout or ():
                self.log.info("%s", line.rstrip())
                said = line.removeprefix("univigu: ").strip() if line.startswith("univigu: ") else said
        code = process.returncode
        if code < 0:
            raise PreemptedError(f"'{self.step}' was stopped by {signal.Signals(-code).name}; it goes on where it was.")
        if code:
            failure = PreemptedError if code in TRY_AGAIN else StepFailedError
            raise failure(said or f"'{self.step}' ended with exit code {code}; its log says why.")


class KfpRunOperator(BaseOperator):
    """Runs a compiled pipeline on a Kubeflow Pipelines server and waits for its end without holding a worker.

    The server's address is in KFP_ENDPOINT and its token where `KfpServer` looks for it, in the environment of
    scheduler and triggerer alike. A run of `run_name` that lives or succeeded is that run; one that failed or was
    cancelled is replaced when the task is cleared, and goes on from what its steps have finished. Stopping the task,
    or marking it, cancels the run. Returns the run's id.

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
        poll_s: float = POLL_S,
        patience_s: float = PATIENCE_S,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.package, self.run_name, self.arguments = package, run_name, dict(arguments)
        self.more_arguments, self.service_account = more_arguments, service_account
        self.namespace, self.poll_s, self.patience_s = namespace, poll_s, patience_s
        self._run_id = ""

    def execute(self, context: Mapping[str, Any]) -> str:
        from components.pipeline.kfp_server import KfpServer

        with clear_failures(context):
            package = Path(self.package)
            arguments = merge_arguments(package, self.arguments, self.more_arguments)
            server = KfpServer(namespace=self.namespace)
            # submitting is idempotent by name: a run that is under way, or has succeeded, is found again
            self._run_id = server.submit(package, self.run_name, arguments, service_account=self.service_account)
            context["task_state_store"].set(RUN_ID, self._run_id)
            context["ti"].xcom_push(key=RUN_ID, value=self._run_id)
            self.log.info("run %s on %s is called '%s'", self._run_id, server.host, self.run_name)
            now = server.state(self._run_id)
        if now.is_terminal:
            return self.finish(context, {"run_id": self._run_id, "state": now.state, "message": now.message})
        self.defer(
            trigger=KfpRunTrigger(self._run_id, self.namespace, self.poll_s, self.patience_s), method_name="finish"
        )
        raise AssertionError("unreachable")

    def finish(self, context: Mapping[str, Any], event: Mapping[str, str]) -> str:
        """Called with the run's last state: returns its id if it succeeded, and fails the task otherwise."""
        from components.pipeline.kfp_server import RunCanceledError, RunFailedError

        run_id, state, message = event["run_id"], event["state"], event["message"]
        with clear_failures(context):
            if state == UNREACHABLE:
                raise TransientError(message)
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
        from components.pipeline.kfp_server import KfpServer

        if self._run_id:
            KfpServer(namespace=self.namespace).cancel(self._run_id)


class KfpRunTrigger(BaseTrigger):
    """Looks at a run every `poll_s` seconds until it has ended.

    A server that does not answer is asked again for `patience_s` seconds: the run goes on without us.
    """

    def __init__(self, run_id: str, namespace: str, poll_s: float, patience_s: float) -> None:
        super().__init__()
        self.run_id, self.namespace, self.poll_s, self.patience_s = run_id, namespace, poll_s, patience_s

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """What Airflow keeps of the trigger; no address and no token is in it."""
        path = f"{type(self).__module__}.{type(self).__qualname__}"
        return path, {name: getattr(self, name) for name in ("run_id", "namespace", "poll_s", "patience_s")}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        answered = time.monotonic()
        while True:
            try:
                state, message = await asyncio.to_thread(self._look)
                answered = time.monotonic()
            except TransientError as error:
                state, message = "", ""
                self.log.warning("%s", error)
                if time.monotonic() - answered > self.patience_s:
                    state, message = UNREACHABLE, str(error)
            except UniViGUError as error:
                state, message = "LOST", str(error)
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
        from components.pipeline.kfp_server import KfpServer

        return KfpServer(namespace=self.namespace)
