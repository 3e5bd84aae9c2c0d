"""Runs `univigu` many times: each time in a fork of this process, which has imported all that a run needs.

A fork starts in milliseconds where a new process takes seconds. It has none of this process's other threads, so these
must not matter: torch has none (`shim.preload`), Arrow makes its own again, and MLflow's store is opened in forks only.
"""

import atexit
import gc
import importlib
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from components.registry.dataset_versions import STEPS
from tests.chaos import shim

_LOOK_EVERY_S = 0.003
_OF_TRAINING = (
    "alembic",
    "components.evaluation.evaluate_model",
    "components.registry.promotion",
    "components.registry.register_model",
    "components.training.train_stage",
    "deepspeed",
    "mlflow.pyfunc",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "univigu.training.loop",
)


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `code` is negative where a signal ended it, as with `subprocess`."""

    code: int
    seconds: float
    out: str
    err: str
    calls: tuple[str, ...]  # "NUMBER WHAT PATH" of the call that was hit; of all calls where none was to be hit
    hung: bool

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL and not self.hung


def run(arguments: Sequence[str], place: Path, fault: shim.Fault, limit_s: float) -> Outcome:
    """Run `univigu ARGUMENTS` in `place/root`, with its temporary files in `place/tmp`, and a fault below `place`."""

    def command() -> None:
        from components.cli.main import main

        sys.argv = ["univigu", *arguments]
        main()

    return run_function(command, place, fault, limit_s)


def run_function(function: Callable[[], None], place: Path, fault: shim.Fault, limit_s: float) -> Outcome:
    """Run a function in a fork, as `run` does."""
    said = place.with_name(f"{place.name}.said")
    said.mkdir(exist_ok=True)
    files = [said / name for name in ("out", "err", "calls")]
    started = time.monotonic()
    child = os.fork()
    if not child:
        _be(function, place, fault, files)
    hung = not _wait(child, started + limit_s)
    if hung:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    seconds = time.monotonic() - started
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # processes that it left behind
    out, err, calls = (file.read_text(errors="replace") for file in files)
    return Outcome(os.waitstatus_to_exitcode(status), seconds, out, err, tuple(calls.splitlines()), hung)


def warm_up(profile: str, root: Path, steps: Collection[str]) -> None:
    """Make a dataset below `root`, and import what the steps after it import: forks have all of this for nothing."""
    if set(steps) - set(STEPS):
        for name in _OF_TRAINING:
            importlib.import_module(name)
    from components.cli.main import keep_libraries_quiet
    from components.pipeline.fingerprint import stage_code
    from components.pipeline.profiles import load_profile
    from components.pipeline.runner import run_stage
    from components.pipeline.stages import STAGES

    keep_libraries_quiet()
    values = load_profile(profile)
    for stage in STAGES:
        stage_code(stage, values)
    last = max((STEPS.index(name) for name in steps if name in STEPS), default=-1)
    for name in STEPS[: last + 1]:
        run_stage(name, values, root)
    gc.collect()
    gc.freeze()  # else the first collection in a fork copies every page


def _wait(child: int, deadline: float) -> bool:
    """Wait for a child, which is not reaped; whether it ended in time."""
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_EVERY_S)
    return True


def _be(function: Callable[[], None], place: Path, fault: shim.Fault, files: Sequence[Path]) -> NoReturn:
    """In the fork: be the process that a user would have started."""
    code = 1
    try:
        os.setsid()
        out, err, calls = (os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for file in files)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.environ["TMPDIR"] = str(place / "tmp")
        tempfile.tempdir = None
        os.chdir(place / "root")
        shim.arm(place, fault, calls)
        code = _call(function)
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _call(function: Callable[[], None]) -> int:
    """The exit code that Python would end with."""
    try:
        function()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
