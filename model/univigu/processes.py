"""Which process wrote something, and whether it has ended: by machine, process namespace, number and start."""

import os
from functools import cache
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")


def this_process() -> str:
    """A name of this process that no other one has, on any machine; empty where the system isn't Linux."""
    scope, started = _scope(), _started(os.getpid())
    return f"{scope}:{os.getpid()}:{started}" if scope and started else ""


def has_ended(process: str) -> bool:
    """Whether the process of that name is known to have ended; False where this machine can't know it."""
    scope, _, rest = process.partition(":")
    number, _, started = rest.partition(":")
    if not scope or scope != _scope() or not number.isdecimal() or int(number) >= 2**31:
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    now = _started(int(number))
    return now is not None and now != started


@cache
def _scope() -> str:
    """The machine since its last boot, and the process namespace: where a process number says which process it is."""
    try:
        return f"{_BOOT.read_text().strip()}/{_NAMESPACE.stat().st_ino}"
    except OSError:
        return ""


def _started(number: int) -> str | None:
    """When a process began, in ticks since boot; `ended` for one that only waits to be collected; None if unknown."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] in "ZX" else fields[19]
