"""Child processes: started so that they end with this one, read line by line, and a step's shards made by several.

Shards are made by processes of this machine, each with a GPU of its own where there are GPUs. Each is
`univigu run STEP --part K/N`; what it says comes out with its part in front. The run that follows keeps and commits
what they made.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Thread

from components.pipeline.stages import Stage, find_stage
from univigu.errors import ConfigError, PreemptedError, UniViGUError

GPUS = "CUDA_VISIBLE_DEVICES"
PARENTS = "UNIVIGU_PARENTS"  # processes that this one works for: the end of any of them is its own
_LOOK_EVERY_S = 0.5
_SAYS = "univigu: "  # begins what is meant for people


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get(GPUS, "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def count_processes(stage: Stage) -> int:
    """How many processes a step is worth here: one a visible GPU for a step in shards that asks for GPUs, else one."""
    if not (stage.sharded and stage.resources.gpus) or "RANK" in os.environ:
        return 1
    return max(1, len(visible_gpus()))


def end_with_parent() -> None:
    """Have this process receive SIGTERM when one that it works for has gone, however that ended.

    Those are what `PARENTS` names, and the DVC that runs this stage: a `dvc repro` that was killed would otherwise
    leave its step running. A step that a person started works for nobody.
    """
    named = [int(number) for number in os.environ.get(PARENTS, "").split(",") if number]
    parents = [*named, *_dvc()]
    if parents:
        Thread(target=_watch, args=(parents,), name="parents", daemon=True).start()


def child_environment() -> dict[str, str]:
    """The environment for a process that ends with this one (`end_with_parent`)."""
    return {**os.environ, PARENTS: f"{os.environ.get(PARENTS, '')},{os.getpid()}"}


def start_child(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
    """Start a process that ends with this one; all that it prints, errors too, is in its `stdout`."""
    return subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**child_environment(), **(environment or {})},
    )


def read_lines(process: "subprocess.Popen[str]", show: Callable[[str], object]) -> str:
    """Give `show` each line that a child prints, until it ends; returns the last `sentence` among them."""
    said = ""
    for line in process.stdout or ():
        show(line.rstrip())
        said = sentence(line) or said
    return said


def sentence(line: str) -> str:
    """What a command of ours says to people in a line of its output; empty for any other line."""
    return line.removeprefix(_SAYS).strip() if line.startswith(_SAYS) else ""


def shell_code(code: int) -> int:
    """The exit code that a shell gives for a process: 128 and the signal's number where a signal ended it."""
    return code if code >= 0 else 128 - code


def _watch(parents: Sequence[int]) -> None:
    import psutil

    try:
        found = [psutil.Process(number) for number in parents]
        while all(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in found):
            time.sleep(_LOOK_EVERY_S)
    except psutil.NoSuchProcess:
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _dvc() -> list[int]:
    """The nearest process above this one that is not part of a stage of DVC's, if this one is."""
    if "DVC_STAGE" not in os.environ:
        return []
    import psutil

    for process in psutil.Process().parents():
        try:
            if "DVC_STAGE" not in process.environ():
                return [process.pid]
        except psutil.AccessDenied:  # another user's
            return [process.pid]
        except psutil.NoSuchProcess:
            continue
    return []


def make_parts(step: str, profile: str, root: Path, count: int) -> None:
    """Make all shards of a step with `count` processes, and commit nothing.

    Where one fails, the others are stopped, and its sentence and exit code are raised as `UniViGUError`; what was
    finished by then is kept. Raises `ConfigError` for a step that doesn't work in shards, and `PreemptedError` when
    this process is told to stop (SIGTERM).
    """
    if not find_stage(step).sharded:
        raise ConfigError(f"'{step}' doesn't work in shards, so one process runs it; leave --processes out.")
    gpus = visible_gpus()
    said: dict[int, str] = {}
    processes: list[subprocess.Popen[str]] = []
    readers: list[Thread] = []
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        for number in range(1, count + 1):
            where = {GPUS: gpus[(number - 1) % len(gpus)]} if gpus else {}
            command = [sys.executable, "-m", "components.cli.main", "run", step, "--profile", profile]
            process = start_child([*command, "--root", str(root), "--part", f"{number}/{count}"], where)
            processes.append(process)
            readers.append(Thread(target=_pass_on, args=(process, step, number, count, said), daemon=True))
            readers[-1].start()
        _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            process.wait()
        for reader in readers:
            reader.join()
        signal.signal(signal.SIGTERM, before)
    _raise_failure(step, processes, said)


def _stop(*_: object) -> None:
    raise PreemptedError("The step was told to stop; run it again, and it goes on with what its processes finished.")


def _pass_on(process: "subprocess.Popen[str]", step: str, number: int, count: int, said: dict[int, str]) -> None:
    """Print what a process says; its last sentence, if it fails, is kept for `_raise_failure`."""

    def show(line: str) -> None:
        if not sentence(line):
            print(f"{step} {number}/{count} | {line}", file=sys.stderr, flush=True)

    if last := read_lines(process, show):
        said[number] = last


def _wait(processes: "Sequence[subprocess.Popen[str]]") -> None:
    """Return when all have ended, or the first has failed."""
    waiting = list(processes)
    while waiting:
        for process in waiting:
            try:
                if process.wait(timeout=0.2):
                    return
            except subprocess.TimeoutExpired:
                continue
            waiting.remove(process)
            break


def _raise_failure(step: str, processes: "Sequence[subprocess.Popen[str]]", said: dict[int, str]) -> None:
    codes = {number: process.returncode for number, process in enumerate(processes, start=1) if process.returncode}
    if not codes:
        return
    number = min(said, default=min(codes, key=lambda each: codes[each] < 0))  # a signal is what the others were sent
    code = codes.get(number, 1)
    message = said.get(number) or f"part {number} of '{step}' ended with exit code {code}; what it printed says why."
    failure = UniViGUError(message)
    failure.exit_code = shell_code(code)
    raise failure
