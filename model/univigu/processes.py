"""Identify a process by machine, process namespace, id and start time, and check later whether it has ended."""

import os
from functools import cache
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")


def this_process() -> str:
    """A globally unique name of this process; empty where the system isn't Linux."""
    scope, started = _scope(), _started(os.getpid())
    return f"{scope}:{os.getpid()}:{started}" if scope and started else ""


def has_ended(process: str) -> bool:
    """Whether the process with that name has ended; False where this machine can't tell."""
    scope, _, rest = process.partition(":")
    number, _, started = rest.partition(":")
    if not scope or scope != _scope() or not number.isdecimal() or int(number) >= 2**31:
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it exists, and belongs to another user
        pass
    now = _started(int(number))
    return now is not None and now != started


@cache
def _scope() -> str:
    """The machine's boot id and the process namespace, within which a process id and start time are unique."""
    try:
        return f"{_BOOT.read_text().strip()}/{_NAMESPACE.stat().st_ino}"
    except OSError:
        return ""


def _started(number: int) -> str | None:
    """A process's start time in ticks since boot; "ended" for a zombie; None if unknown."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] in "ZX" else fields[19]
