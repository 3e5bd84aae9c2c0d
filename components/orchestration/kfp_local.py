"""Run the Kubeflow pipeline on this machine, with kfp's local runner and one process per task."""

import builtins
import contextlib
import io
import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from components.orchestration.kfp_server import typed_arguments
from components.orchestration.kfp_tasks import PATIENCE, RUN_ID, STOP_S, last_failure
from components.pipeline.processes import child_environment
from components.pipeline.stages import STAGES
from components.pipeline.state import STATE
from univigu.errors import ConfigError, PreemptedError, UniViGUError

CLUSTER_ONLY = (
    *("root", "image", "gpu_image", "work_pvc", "train_backend"),
    *("training_nodes", "training_runtime", "training_queue", "training_priority"),
)
LOG = "kfp.log"


class TaskFailedError(UniViGUError):
    """A task failed; has the message and the exit code of the step's command."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_locally(root: Path, arguments: Mapping[str, Any]) -> None:
    """Run the whole pipeline in the work root; finished steps are skipped, by kfp's cache in the root.

    Raises `TaskFailedError` if a step fails, and `PreemptedError` after SIGTERM.
    """
    from components.orchestration.kfp_pipeline import compile_to

    if refused := [name for name in CLUSTER_ONLY if name in arguments]:
        raise ConfigError(
            f"A local run does not support the parameter {', '.join(refused)}; leave it out. The work root is --root."
        )
    with _temporary_folder() as folder:
        compile_to(folder / "pipeline.yaml")
        typed = typed_arguments(folder / "pipeline.yaml", arguments)
        _run_below(root, typed)


def _run_below(root: Path, typed: Mapping[str, Any]) -> None:
    from kfp import local

    from components.orchestration.kfp_pipeline import make_pipeline

    home = root.resolve() / STATE / "kfp"
    os.environ[RUN_ID] = uuid4().hex
    os.environ.setdefault(PATIENCE, "0")  # a person waits for the answer
    os.environ |= child_environment()  # kfp's runner passes its environment to the tasks
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(home / "outputs"),
        enable_caching=True,
        cache_root=str(home / "cache"),
    )
    pipeline = make_pipeline(retries=0)
    with _stop_tasks_on_sigterm(), _show_only_task_output(home / LOG), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kfp warns that images and resources have no effect locally
        try:
            pipeline(**{"training_gpus": "0", "train_backend": "pod", **typed}, root=str(root.resolve()))
        except RuntimeError as error:
            failure = last_failure(str(root.resolve())) or {
                "message": f"A task ended without an error message; see its output in {home / LOG}.",
                "exit_code": UniViGUError.exit_code,
            }
            raise TaskFailedError(failure["message"], failure["exit_code"]) from error


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder for all temporary files of this process and of its tasks, as kfp leaves a file per task behind."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop("TMPDIR")
            if before is not None:
                os.environ["TMPDIR"] = before


@contextlib.contextmanager
def _show_only_task_output(log: Path) -> Iterator[None]:
    """Write all output to a log, but show only our tasks' lines: kfp also prints each task's inputs and outputs."""
    names = "|".join((*(stage.name for stage in STAGES), "check-prerequisites", "cache-keys", "notify"))
    ours = re.compile(rf" *((?:{names})(?: \d+/\d+)? \| .*)", re.DOTALL)
    shown = sys.stdout

    class Filter(io.TextIOBase):
        def write(self, text: str) -> int:
            file.write(text)
            if match := ours.match(text):
                shown.write(match[1])
                shown.flush()
            return len(text)

    log.parent.mkdir(parents=True, exist_ok=True)
    plain = builtins.print
    try:
        with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(Filter()):
            yield
    finally:
        builtins.print = plain  # concurrent kfp tasks replace it by an indenting version, and may not restore it


@contextlib.contextmanager
def _stop_tasks_on_sigterm() -> Iterator[None]:
    """On SIGTERM, also stop the processes of the tasks, and wait until they have saved their state."""
    import psutil

    preempted = PreemptedError("The pipeline was stopped by SIGTERM; run the same command to resume it.")
    stopped = False

    def stop(*_: Any) -> None:
        nonlocal stopped
        stopped = True
        processes = psutil.Process().children(recursive=True)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(processes, timeout=STOP_S)
        raise preempted

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except UniViGUError as error:
        raise (preempted if stopped else error) from error.__cause__  # kfp treats the exception as a task's failure
    finally:
        signal.signal(signal.SIGTERM, before)
