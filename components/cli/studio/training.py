"""The training runs of the work root: their held-out losses by time, and how they are stopped and resumed."""

import csv
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

from components.cli.options import profile_in_use
from components.cli.studio.work import Studio
from components.pipeline.notes import TRAINING, note_path
from components.pipeline.processes import sentence
from components.pipeline.stages import STAGES, find_stage
from components.pipeline.state import STATE, lock
from univigu.errors import BadInputError, BusyError, ConfigError

STEPS = tuple(stage.name for stage in STAGES if stage.together)  # those that train
LOSSES = ("video_mse", "text_ce")
LARGEST_CSV = 4 << 20  # bytes
AT_ONCE_S = 3.0  # within which a process that can't start has ended


class Losses(NamedTuple):
    """Held-out losses at the centres of bins of tau, after a training step: (tau, values of `LOSSES`) each."""

    name: str
    step: int
    rows: list[tuple[float, list[float]]]

    @property
    def most(self) -> list[float]:
        """The largest value of each of `LOSSES`."""
        return [max(values[number] for _, values in self.rows) for number in range(len(LOSSES))]


def read_losses(root: Path) -> list[Losses]:
    """The newest held-out losses by tau of each training step, also while it trains; none where it has none yet."""
    found = []
    for name in STEPS:
        paths = [root / STATE / "scratch" / name / "heldout.csv", root / find_stage(name).home / "heldout.csv"]
        path = next((path for path in paths if path.is_file() and path.stat().st_size < LARGEST_CSV), None)
        if path is not None and (losses := _read(name, path)):
            found.append(losses)
    return found


def _read(name: str, path: Path) -> Losses | None:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        newest = max(int(row["step"]) for row in rows)
        values = [
            (float(row["tau"]), [float(row[key]) for key in LOSSES]) for row in rows if int(row["step"]) == newest
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is being replaced, or of another release
    return Losses(name, newest, values)


def stop(root: Path, step: str) -> str:
    """Make the process of this machine that runs a training step save its progress and end; says so in a sentence.

    Raises `BadInputError` if there is none.
    """
    holders = _find_holders(root, _checked(step))
    if not holders:
        raise BadInputError(f"No process of this machine runs '{step}' in {root}; stop it where it runs.")
    for process in holders:
        process.send_signal(signal.SIGTERM)
    return f"'{step}' was told to stop: it saves its progress after the present step, and ends."


def resume(studio: Studio, step: str) -> str:
    """Start a training step as `univigu run` does, in a process that outlives the studio; says so in a sentence.

    It continues from its last checkpoint, if its settings are unchanged. Raises `BusyError` if it runs already, and
    `ConfigError` if it ends at once.
    """
    root, profile = studio.root, profile_in_use(studio.profile, studio.root)
    if not note_path(root, TRAINING, _checked(step)).is_file():
        raise BadInputError(f"'{step}' has not begun here yet; start it with `univigu run {step}` or `make demo`.")
    with lock(root, step, f"'{step}' is running already under {root}."):
        pass
    log = root / STATE / "studio" / f"{step}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "components.cli.main", "run", step, "--profile", profile, "--root", str(root)]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        code = process.wait(AT_ONCE_S)
    except subprocess.TimeoutExpired:
        threading.Thread(target=process.wait, daemon=True).start()  # so that its end is noticed
        return f"`univigu run {step} --profile {profile}` is running; what it prints is in {log}."
    if code:
        said = [sentence(line) for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        raise ConfigError(next((one for one in reversed(said) if one), f"'{step}' ended at once; see {log}."))
    return f"'{step}' is finished; there is nothing to resume."


def _checked(step: str) -> str:
    if step not in STEPS:
        raise BadInputError(f"Choose a training step: {' or '.join(STEPS)}.")
    return step


def _find_holders(root: Path, step: str) -> list[Any]:
    """The processes that hold the lock of a step."""
    import psutil

    path = str((root / STATE / "locks" / f"{step}.lock").resolve())
    try:
        with lock(root, step, ""):
            return []  # nothing holds it
    except BusyError:
        pass
    holders = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(one.path == path for one in process.open_files()):
                holders.append(process)
        except psutil.Error:  # it has ended, or belongs to another user
            continue
    return holders
