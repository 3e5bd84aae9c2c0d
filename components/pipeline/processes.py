"""Child processes that end with this one, and steps that several of them work on.

Each process that makes shards is `univigu run STEP --part K/N` on this machine, with its own GPU if there are GPUs. Its
output is printed with the part as a prefix. The run that follows keeps and commits the shards. The processes of a
training step work on the same batches, under torchrun, and one of them commits.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any, Self

from components.pipeline.stages import Stage, find_stage
from univigu.errors import ConfigError, PreemptedError, UniViGUError

GPUS = "CUDA_VISIBLE_DEVICES"
PARENTS = "UNIVIGU_PARENTS"  # ids of processes: when one of them ends, this process must end too
_POLL_S = 0.5
BYTES_ON_CPU = 2**31  # that a process needs which trains a small model: libraries, its batches, and the model
MOST_ON_CPU = 4  # processes that train together on the cores of one machine: more gain little, and each needs memory
PREFIX = "univigu: "  # of messages to the user


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if without_cuda():
        return []
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get(GPUS, "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def without_cuda() -> bool:
    """Whether the installed build of torch is for CPUs, as far as its version says; the import would take seconds."""
    return "torch" not in sys.modules and version("torch").endswith("+cpu")


def count_processes(stage: Stage, settings: Mapping[str, Any] | None = None) -> int:
    """The default number of processes of a step with these `settings`, its section of the profile.

    One per visible GPU for a step that needs GPUs and can use several, and one for any other step. Training without a
    GPU takes one process per core: a process with two threads takes 1.6 times as long as two with one thread each,
    because most operations of a small model are too short to share.
    """
    if not stage.resources.gpus or "RANK" in os.environ:
        return 1
    gpus = len(visible_gpus())
    if stage.sharded:
        return max(1, gpus)
    return _count_together(gpus or _count_on_cpu(settings), settings) if stage.together and settings else 1


def _count_together(most: int, settings: Mapping[str, Any]) -> int:
    """The largest number of processes up to `most` that can share a training step's batch."""
    batch, micro, sharing = (settings[key] for key in ("batch_size", "micro_batch_size", "sequence_parallel"))

    def fits(groups: int) -> bool:  # each has samples of its own
        share = batch // groups
        return batch % groups == 0 and share % min(micro or share, share) == 0

    return max((sharing * groups for groups in range(1, most // sharing + 1) if fits(groups)), default=1)


def _count_on_cpu(settings: Mapping[str, Any]) -> int:
    """The most processes that train on this machine's cores; one where the user has set the number of threads."""
    if "OMP_NUM_THREADS" in os.environ or settings["zero_stage"] or settings["precision"] != "fp32":
        return 1  # ZeRO and bf16 are for models that fill a machine's memory
    import psutil

    in_memory = psutil.virtual_memory().available // BYTES_ON_CPU
    return max(1, min(usable_cores(), MOST_ON_CPU, in_memory))


def usable_cores(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The cores that this process may use: those of its affinity, within a container's `limit` (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none
    with suppress(OSError, ValueError):  # no such file, or "max" for no limit
        quota, period = map(int, limit.read_text(encoding="ascii").split())
        cores = min(cores, max(1, quota // period))
    return cores


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


def start_child(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None, only_errors: bool = False
) -> "subprocess.Popen[str]":
    """Start a process that ends with this one; its `stdout` also carries its standard error.

    With `only_errors`, its standard output is this process's own, and `stderr` carries its standard error.
    """
    return subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=None if only_errors else subprocess.PIPE,
        stderr=subprocess.PIPE if only_errors else subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**child_environment(), **(environment or {})},
    )


def read_lines(process: "subprocess.Popen[str]", show: Callable[[str], object]) -> str:
    """Pass each line that a child prints to `show` until it ends; returns the last `sentence` among them."""
    last = ""
    for line in process.stdout or process.stderr or ():
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


class ChildProcesses:
    """Processes that SIGTERM to this one also stops, at whatever moment it arrives; none is left at the end of `with`.

    The handler raises nothing: an exception between the start of a process and its entry here would leave it running.
    """

    def __init__(self) -> None:
        self.all: list[subprocess.Popen[str]] = []
        self.received = False  # SIGTERM
        self._stopped = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        for process in self.all:
            process.wait()
        signal.signal(signal.SIGTERM, self._before)

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None, only_errors: bool = False
    ) -> "subprocess.Popen[str]":
        """Start one more, as `start_child` does."""
        process = start_child(arguments, environment, only_errors)
        self.all.append(process)
        if self._stopped:  # the signal came while it was started
            process.terminate()
        return process

    def _receive(self, *_: object) -> None:
        self.received = True
        self._stop()

    def _stop(self) -> None:
        """Send SIGTERM once: a second one would end a process that is saving its state."""
        if not self._stopped:
            self._stopped = True
            for process in self.all:
                process.terminate()


def make_parts(step: str, profile: str, root: Path, count: int) -> None:
    """Make all shards of a step with `count` processes, and commit nothing.

    If one fails, the others are stopped, and its message and exit code are raised as `UniViGUError`; finished shards
    are kept. Raises `ConfigError` for a step without shards, and `PreemptedError` when this process receives SIGTERM.
    """
    if not find_stage(step).sharded:
        raise ConfigError(f"'{step}' has no shards, so only one process can run it; omit --processes.")
    gpus = visible_gpus()
    output = _Output()
    with ChildProcesses() as children:
        for number in range(1, count + 1):
            where = {GPUS: gpus[(number - 1) % len(gpus)]} if gpus else {}
            command = [sys.executable, "-m", "components.cli.main", "run", step, "--profile", profile]
            process = children.start([*command, "--root", str(root), "--part", f"{number}/{count}"], where)
            output.pass_on(process, f"{step} {number}/{count} | ", number)
        failed = _wait(children.all)
    _raise_failure(step, children, output, failed)


def train_together(step: str, profile: str, root: Path, count: int) -> None:
    """Run a training step in `count` processes of torchrun, one of which commits its output.

    Without GPUs they share the cores. Raises like `make_parts`, and `ConfigError` for a step that trains nothing.
    """
    if not find_stage(step).together:
        raise ConfigError(
            f"'{step}' has no shards and trains nothing, so only one process can run it; omit --processes."
        )
    launcher = ["-m", "univigu.training.launch", "--standalone", f"--nproc-per-node={count}"]
    command = [sys.executable, *launcher, "-m", "components.cli.main", "run", step, "--profile", profile]
    environment = {"LOGLEVEL": os.environ.get("LOGLEVEL", "CRITICAL")}  # torchrun repeats what the processes say
    if not visible_gpus():
        environment["OMP_NUM_THREADS"] = str(max(1, usable_cores() // count))
    output = _Output()
    with ChildProcesses() as children:
        process = children.start([*command, "--root", str(root)], environment, only_errors=True)
        output.pass_on(process, "", 1)
        failed = _wait(children.all)
    _raise_failure(step, children, output, failed)


class _Output:
    """Prints what processes say, each line after a prefix, and keeps the last message of each by its number."""

    def __init__(self) -> None:
        self._readers: list[Thread] = []
        self._messages: dict[int, str] = {}

    def pass_on(self, process: "subprocess.Popen[str]", prefix: str, number: int) -> None:
        def show(line: str) -> None:
            if not sentence(line):
                print(f"{prefix}{line}", file=sys.stderr, flush=True)

        def read() -> None:
            if last := read_lines(process, show):
                self._messages[number] = last

        self._readers.append(Thread(target=read, daemon=True))
        self._readers[-1].start()

    def messages(self) -> dict[int, str]:
        """What processes that have ended said last."""
        for reader in self._readers:
            reader.join()
        return self._messages


def _wait(processes: "Sequence[subprocess.Popen[str]]") -> int | None:
    """Return when all have ended (None) or one has failed: its number, from 1. What ends later may be our doing."""
    waiting = dict(enumerate(processes, start=1))
    while waiting:
        for number, process in waiting.items():
            try:
                if process.wait(timeout=0.2):
                    return number
            except subprocess.TimeoutExpired:
                continue
            del waiting[number]
            break
    return None


def _raise_failure(step: str, children: ChildProcesses, output: _Output, failed: int | None) -> None:
    messages = output.messages()
    if children.received:
        raise PreemptedError("The step received SIGTERM; run it again to resume from what it has finished.")
    if failed is None:
        return
    code = children.all[failed - 1].returncode
    part = f"Part {failed} of '{step}'" if len(children.all) > 1 else f"'{step}'"
    message = messages.get(failed) or f"{part} ended with exit code {code}; its output says why."
    failure = UniViGUError(message)
    failure.exit_code = shell_code(code)
    raise failure
