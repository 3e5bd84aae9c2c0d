"""The Kubeflow pipeline on this machine: kfp's local runner, which starts a process a task."""

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
from components.orchestration.kfp_tasks import RUN_ID, STOP_S, last_failure
from components.pipeline.processes import child_environment
from components.pipeline.stages import STAGES
from components.pipeline.state import STATE
from univigu.errors import ConfigError, PreemptedError, UniViGUError

CLUSTER_ONLY = (
    *("root", "image", "gpu_image", "work_pvc", "train_backend"),
    *("training_nodes", "training_runtime", "training_queue"),
)
LOG = "kfp.log"


class TaskFailedError(UniViGUError):
    """A task failed, with the message and the exit code of the step's own command."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_locally(root: Path, arguments: Mapping[str, Any]) -> None:
    """Run the whole pipeline below `root`; raises what the failed step raised, or `PreemptedError` if told to stop.

    Steps that are finished are skipped, by kfp's cache below the root.
    """
    from components.orchestration.kfp_pipeline import compile_to

    if refused := [name for name in CLUSTER_ONLY if name in arguments]:
        raise ConfigError(f"On this machine there is no choice of {', '.join(refused)}; leave it out (or give --root).")
    with _temporary_folder() as folder:
        compile_to(folder / "pipeline.yaml")
        typed = typed_arguments(folder / "pipeline.yaml", arguments)
        _run_below(root, typed)


def _run_below(root: Path, typed: Mapping[str, Any]) -> None:
    from kfp import local

    from components.orchestration.kfp_pipeline import make_pipeline

    home = root.resolve() / STATE / "kfp"
    os.environ[RUN_ID] = uuid4().hex
    os.environ |= child_environment()  # kfp's runner passes it on to the tasks
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(home / "outputs"),
        enable_caching=True,
        cache_root=str(home / "cache"),
    )
    pipeline = make_pipeline(retries=0)
    with _stoppable(), _only_what_tasks_say(home / LOG), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that images and resources mean nothing here
        try:
            pipeline(**{"training_gpus": "0", **typed}, root=str(root.resolve()))
        except RuntimeError as error:
            failure = last_failure(str(root.resolve())) or {
                "message": f"A task ended without saying why; {home / LOG} holds all that it wrote.",
                "exit_code": UniViGUError.exit_code,
            }
            raise TaskFailedError(failure["message"], failure["exit_code"]) from error


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder that takes all temporary files of this process and of its tasks along: kfp leaves one of each task."""
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
def _only_what_tasks_say(log: Path) -> Iterator[None]:
    """Keep what kfp itself prints out of sight, in a log: it repeats each task's input and output."""
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
        builtins.print = plain  # kfp's tasks that run at once each swap it for one that indents, and leave one behind


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """On SIGTERM, stop the processes of the tasks as well, and wait until they have saved their state."""
    import psutil

    told = PreemptedError("The pipeline was told to stop; the same command goes on where it was.")
    stopped = False

    def stop(*_: Any) -> None:
        nonlocal stopped
        stopped = True
        processes = psutil.Process().children(recursive=True)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(processes, timeout=STOP_S)
        raise told

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except UniViGUError as error:
        raise (told if stopped else error) from error.__cause__  # kfp takes what was raised for a task's failure
    finally:
        signal.signal(signal.SIGTERM, before)
