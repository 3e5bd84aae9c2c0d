"""Progress of long loops: a bar on a terminal, a line every few seconds everywhere else."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
LINE_EVERY_S = 5.0


def progress(items: Iterable[T], what: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield `items`, showing how far the loop has come on standard error."""
    from tqdm import tqdm

    total = total if total is not None else len(items) if hasattr(items, "__len__") else None
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, total=total, unit=unit, leave=False, disable=False)
        return
    started = shown = time.monotonic()
    done = 0
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - shown >= LINE_EVERY_S:
            shown = now
            print(tqdm.format_meter(done, total, now - started, prefix=what, unit=unit, ncols=0), file=sys.stderr)
