"""Progress of long loops: a bar on a terminal, a line every few seconds everywhere else, nothing if UNIVIGU_QUIET=1.

What takes seconds without being a loop is an `activity`.
"""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
LINE_EVERY_S = 5.0


class Meter:
    """The progress, speed and remaining time of a long loop, on standard error."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        from tqdm import tqdm

        self.done = 0  # includes what was skipped
        self._skipped = 0
        self._started = self._shown = time.monotonic()
        self._quiet = _is_quiet()
        hidden = self._quiet or not sys.stderr.isatty()
        self._bar = tqdm(desc=what, total=total, unit=unit, leave=False, smoothing=0, disable=hidden)
        self._facts: dict[str, Any] = {"total": total, "prefix": what, "unit": unit, "ncols": 0}

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Add `count` items that were done now."""
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and not self._quiet and count and now - self._shown >= LINE_EVERY_S:
            self._shown = now
            since = {"elapsed": now - self._started, "initial": self._skipped}
            print(self._bar.format_meter(self.done, **since, **self._facts), file=sys.stderr)

    def skip(self, count: int) -> None:
        """Add `count` items that an earlier run has done; they don't count for the speed."""
        self.done += count
        self._skipped += count
        if not self._bar.disable:
            self._bar.initial += count
            self._bar.update(count)


def progress(items: Iterable[T], what: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield `items`, showing progress on standard error."""
    # pyrefly: ignore[bad-argument-type]
    total = total if total is not None else len(items) if hasattr(items, "__len__") else None
    with Meter(what, total, unit) as meter:
        for item in items:
            yield item
            meter.advance()


@contextmanager
def activity(what: str) -> Iterator[None]:
    """Say on standard error what the block does: at once on a terminal, where the line is removed at the end.

    Everywhere else the line appears if the block takes longer than `LINE_EVERY_S`. The block prints nothing itself.
    """
    line = f"{what} ..."
    if _is_quiet():
        yield
    elif sys.stderr.isatty():
        print(line, end="\r", file=sys.stderr, flush=True)
        try:
            yield
        finally:
            print(" " * len(line), end="\r", file=sys.stderr, flush=True)
    else:
        waiting = threading.Timer(LINE_EVERY_S, print, [line], {"file": sys.stderr, "flush": True})
        waiting.daemon = True
        waiting.start()
        try:
            yield
        finally:
            waiting.cancel()


def _is_quiet() -> bool:
    return os.environ.get("UNIVIGU_QUIET") == "1"
