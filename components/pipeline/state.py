"""What is kept below the work root's `.univigu` while steps run: locks."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
