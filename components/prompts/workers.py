"""Work on a stream by several processes: the results come in the order of the items, and few of them wait in memory."""

import gc
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from univigu.errors import TransientError

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 3  # items for each process that are under way or wait to be taken

_function: Callable[[Any], Any]
_loaded = False


def worker_count() -> int:
    """How many cores this process may use: by affinity, by its container's limit, or as LOKY_MAX_CPU_COUNT says."""
    from joblib import cpu_count

    return cpu_count()


def map_in_order(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[tuple[T, R]]:
    """Yield each item with ``function(item)``, computed by `workers` processes; by this process itself if it's one.

    function: anything that pickles; each process gets it once, so what it has cached is kept from item to item. Items
    are taken only as fast as results are: at most `AHEAD` a process are in memory. Raises what `function` raises, and
    `TransientError` where a process was killed.
    """
    if workers == 1:
        for item in items:
            yield item, function(item)
        return
    # Not forked: threads of pyarrow and of the tokenizer may hold locks that a copy of this process would wait for.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (function,))
    waiting: deque[tuple[T, Any]] = deque()
    gc.freeze()  # else the collector looks through all imported libraries again and again: a tenth of the time
    try:
        for item in items:
            waiting.append((item, pool.submit(_apply, item)))
            if len(waiting) >= AHEAD * workers:
                item, future = waiting.popleft()
                yield item, future.result()
        for item, future in waiting:
            yield item, future.result()
    except BrokenProcessPool as error:
        raise TransientError(
            f"One of {workers} worker processes was killed, perhaps for want of memory; run it again, with fewer of "
            "them (LOKY_MAX_CPU_COUNT=1)."
        ) from error
    finally:
        gc.unfreeze()
        pool.shutdown(wait=True, cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is enough


def _apply(item: Any) -> Any:
    global _loaded
    result = _function(item)
    if not _loaded:  # what the first item made it load stays, and needs no collecting
        _loaded = True
        gc.freeze()
    return result
