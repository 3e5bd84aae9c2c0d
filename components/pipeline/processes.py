"""Child processes that end with this one, and a step's shards made by several of them.

Each process that makes shards is `univigu run STEP --part K/N` on this machine, with its own GPU if there are GPUs. Its
output is printed with the part as a prefix. The run that follows keeps and commits the shards.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread

from components.pipeline.stages import Stage, find_stage
from univigu.errors import ConfigError, PreemptedError, UniViGUError

GPUS = "CUDA_VISIBLE_DEVICES"
PARENTS = "UNIVIGU_PARENTS"  # ids of processes: when one of them ends, this process must end too
_POLL_S = 0.5
PREFIX = "univigu: "  # of messages to the user


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get(GPUS, "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def count_processes(stage: Stage) -> int:
    """The default number of processes: one per visible GPU for a sharded step that needs GPUs, otherwise one."""
    if not (stage.sharded and stage.resources.gpus) or "RANK" in os.environ:
        return 1
    return max(1, len(visible_gpus()))


def end_with_parent() -> None:
    """Make this process receive SIGTERM when one of its parents has ended, in whatever way.

    Parents are the processes in `PARENTS` and the DVC process that runs this stage: otherwise a killed `dvc repro`
    would leave its step running. A step that was started from a shell has no parents in this sense.
    """
    named = [int(number) for number in os.environ.get(PARENTS, "").split(",") if number]
    parents = [*named, *_dvc()]
    if parents:
        Thread(target=_watch, args=(parents,), name="parents", daemon=True).start()


def child_environment() -> dict[str, str]:
    """The environment for a process that ends with this one (`end_with_parent`)."""
    return {**os.environ, PARENTS: f"{os.environ.get(PARENTS, '')},{os.getpid()}"}


def start_child(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
    """Start a process that ends with this one; its `stdout` also carries its standard error."""
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
    """Pass each line that a child prints to `show` until it ends; returns the last `sentence` among them."""
    last = ""
    for line in process.stdout or ():
        show(plain_line(line))
        last = sentence(line) or last
    return last


def plain_line(line: str) -> str:
    """A line of a command's output without its end; the message, if it is an object of `components.cli.logs`."""
    line = line.rstrip()
    if line.startswith("{") and '"message"' in line:
        with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            record = json.loads(line)
            if record.keys() >= {"level", "message", "process", "time"}:
                return str(record.get("traceback") or record["message"]).rstrip()
    return line


def sentence(line: str) -> str:
    """The message to the user in a line of a univigu command's output; "" for any other line."""
    line = plain_line(line)
    return line.removeprefix(PREFIX).strip() if line.startswith(PREFIX) else ""


def shell_code(code: int) -> int:
    """The exit code that a shell gives for a process: 128 plus the signal's number if a signal ended it."""
    return code if code >= 0 else 128 - code


def _watch(parents: Sequence[int]) -> None:
    import psutil

    try:
        found = [psutil.Process(number) for number in parents]
        while all(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in found):
            time.sleep(_POLL_S)
    except psutil.NoSuchProcess:
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _dvc() -> list[int]:
    """The DVC process that runs this stage (the nearest ancestor outside the stage), if DVC runs it."""
    if "DVC_STAGE" not in os.environ:
        return []
    import psutil

    for process in psutil.Process().parents():
        try:
            if "DVC_STAGE" not in process.environ():
                return [process.pid]
        except psutil.AccessDenied:  # it belongs to another user
            return [process.pid]
        except psutil.NoSuchProcess:
            continue
    return []


def make_parts(step: str, profile: str, root: Path, count: int) -> None:
    """Make all shards of a step with `count` processes, and commit nothing.

    If one fails, the others are stopped, and its message and exit code are raised as `UniViGUError`; finished shards
    are kept. Raises `ConfigError` for a step without shards, and `PreemptedError` when this process receives SIGTERM.
    """
    if not find_stage(step).sharded:
        raise ConfigError(f"'{step}' has no shards, so only one process can run it; omit --processes.")
    gpus = visible_gpus()
    messages: dict[int, str] = {}
    processes: list[subprocess.Popen[str]] = []
    readers: list[Thread] = []
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        for number in range(1, count + 1):
            where = {GPUS: gpus[(number - 1) % len(gpus)]} if gpus else {}
            command = [sys.executable, "-m", "components.cli.main", "run", step, "--profile", profile]
            process = start_child([*command, "--root", str(root), "--part", f"{number}/{count}"], where)
            processes.append(process)
            readers.append(Thread(target=_pass_on, args=(process, step, number, count, messages), daemon=True))
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
    _raise_failure(step, processes, messages)


def _stop(*_: object) -> None:
    raise PreemptedError("The step received SIGTERM; run it again to resume from the finished shards.")


def _pass_on(process: "subprocess.Popen[str]", step: str, number: int, count: int, messages: dict[int, str]) -> None:
    """Print a process's output with its part; its last message goes to `messages` for `_raise_failure`."""

    def show(line: str) -> None:
        if not sentence(line):
            print(f"{step} {number}/{count} | {line}", file=sys.stderr, flush=True)

    if last := read_lines(process, show):
        messages[number] = last


def _wait(processes: "Sequence[subprocess.Popen[str]]") -> None:
    """Return when all have ended or one has failed."""
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


def _raise_failure(step: str, processes: "Sequence[subprocess.Popen[str]]", messages: dict[int, str]) -> None:
    codes = {number: process.returncode for number, process in enumerate(processes, start=1) if process.returncode}
    if not codes:
        return
    number = min(messages, default=min(codes, key=lambda each: codes[each] < 0))  # the others were ended by our signal
    code = codes.get(number, 1)
    message = messages.get(number) or f"Part {number} of '{step}' ended with exit code {code}; its output says why."
    failure = UniViGUError(message)
    failure.exit_code = shell_code(code)
    raise failure
