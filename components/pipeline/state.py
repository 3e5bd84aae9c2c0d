"""Locks in the folder `.univigu` of the work root, held while steps run."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from univigu.errors import BusyError

STATE = ".univigu"  # under the work root: staging, locks and run records


class Lock:
    """A lock on a file, released when the process ends. `require` detects that the file was removed."""

    def __init__(self, path: Path, kind: int, refusal: str) -> None:
        self.path, self.kind, self.refusal = path, kind, refusal
        self._stream: BinaryIO | None = None

    def acquire(self) -> None:
        """Take the lock; raises `BusyError` if another process holds it."""
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            stream = self.path.open("a+b")
            try:
                fcntl.flock(stream, self.kind)
            except BlockingIOError as error:
                stream.close()
                raise BusyError(self.refusal) from error
            self.release()
            self._stream = stream
            if self._exists():  # otherwise it was removed between opening and locking
                return

    def require(self) -> None:
        """Raise `BusyError` if the lock's file was removed: another run may hold a lock on a new one."""
        if not self._exists():
            raise BusyError(
                f"The lock {self.path} was removed while this run held it, so another run may have used the same "
                "files. Run it again; finished work is kept."
            )

    def release(self) -> None:
        if self._stream:
            self._stream.close()

    def _exists(self) -> bool:
        try:
            # pyrefly: ignore[missing-attribute]
            return os.path.samestat(os.fstat(self._stream.fileno()), self.path.stat())
        except FileNotFoundError:
            return False


@contextmanager
def lock(root: Path, name: str, refusal: str, kind: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> Iterator[Lock]:
    """Hold the lock called `name`; raises `BusyError(refusal)` if another process holds it.

    kind: flags of `fcntl.flock`; without LOCK_NB it waits, for locks that are held only briefly.
    """
    held = Lock(root / STATE / "locks" / f"{name}.lock", kind, refusal)
    held.acquire()
    try:
        yield held
    finally:
        held.release()
