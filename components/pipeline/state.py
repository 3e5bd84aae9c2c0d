"""What is kept below the work root's `.univigu` while steps run: locks."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from univigu.errors import BusyError

STATE = ".univigu"  # staging, locks and run records, below the work root


class Lock:
    """A lock that ends with the process. It is on a file, which somebody may remove: `require` notices."""

    def __init__(self, path: Path, kind: int, refusal: str) -> None:
        self.path, self.kind, self.refusal = path, kind, refusal
        self._stream: BinaryIO | None = None

    def acquire(self) -> None:
        """Take the lock; raises `BusyError` where another process holds it."""
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
            if self._is_there():  # else it was removed between opening and locking it
                return

    def require(self) -> None:
        """Raise `BusyError` where the lock's file was removed while it was held: another run may have had a new one."""
        if not self._is_there():
            raise BusyError(
                f"The lock {self.path} was removed while this run held it, so another may have worked in the same "
                "place; run it again: what is finished is kept."
            )

    def release(self) -> None:
        if self._stream:
            self._stream.close()

    def _is_there(self) -> bool:
        try:
            # pyrefly: ignore[missing-attribute]
            return os.path.samestat(os.fstat(self._stream.fileno()), self.path.stat())
        except FileNotFoundError:
            return False


@contextmanager
def lock(root: Path, name: str, refusal: str, kind: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> Iterator[Lock]:
    """Hold the lock called `name`; raises `BusyError(refusal)` where another process holds it.

    kind: of `fcntl`; without LOCK_NB it waits, for locks that are held for moments only.
    """
    held = Lock(root / STATE / "locks" / f"{name}.lock", kind, refusal)
    held.acquire()
    try:
        yield held
    finally:
        held.release()
