"""Progress of long loops: a bar on a terminal, a line every few seconds everywhere else."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
LINE_EVERY_S = 5.0


class Meter:
    """How far a long loop has come, how fast it goes, and when it will end, on standard error."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        from tqdm import tqdm

        self.done = 0  # what was skipped included
        self._skipped = 0
        self._started = self._shown = time.monotonic()
        self._bar = tqdm(desc=what, total=total, unit=unit, leave=False, smoothing=0, disable=not sys.stderr.isatty())
        self._facts: dict[str, Any] = {"total": total, "prefix": what, "unit": unit, "ncols": 0}

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Count what has just been done."""
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and count and now - self._shown >= LINE_EVERY_S:
            self._shown = now
            since = {"elapsed": now - self._started, "initial": self._skipped}
            print(self._bar.format_meter(self.done, **since, **self._facts), file=sys.stderr)

    def skip(self, count: int) -> None:
        """Count what an earlier run has done: it says nothing about the speed of this one."""
        self.done += count
        self._skipped += count
        if not self._bar.disable:
            self._bar.initial += count
            self._bar.update(count)


def progress(items: Iterable[T], what: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield `items`, showing how far the loop has come on standard error."""
    # pyrefly: ignore[bad-argument-type]
    total = total if total is not None else len(items) if hasattr(items, "__len__") else None
    with Meter(what, total, unit) as meter:
        for item in items:
            yield item
            meter.advance()
