"""What is kept below the work root's `.univigu` while steps run: locks, and records in JSON."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from univigu.errors import BusyError

STATE = ".univigu"  # staging, locks and run records, below the work root


@contextmanager
def lock(root: Path, name: str, what: str, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold a lock that ends with the process; raises `BusyError` where another process holds it."""
    path = root / STATE / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        try:
            fcntl.flock(stream, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                f"Another run of {what} is under way below {root}; wait for it, or give another --root."
            ) from error
        yield


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, sort_keys=True, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
