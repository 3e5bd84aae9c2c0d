"""Map a function over a stream with several processes: results in the order of the items, few items in memory."""

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
AHEAD = 3  # items per process that are in progress or wait to be yielded

_function: Callable[[Any], Any]
_loaded = False


def worker_count() -> int:
    """Number of cores this process may use, by affinity, its container's limit and LOKY_MAX_CPU_COUNT."""
    from joblib import cpu_count

    return cpu_count()


def map_in_order(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[tuple[T, R]]:
    """Yield each item with ``function(item)``, computed by `workers` processes, or by this process if there is one.

    function: must pickle; each process receives it once, so its caches persist between items. Items are consumed only
    as fast as results are taken: at most `AHEAD` per process are in memory. Raises what `function` raises, and
    `TransientError` if a process was killed.
    """
    if workers == 1:
        for item in items:
            yield item, function(item)
        return
    # Not forked: threads of pyarrow and of the tokenizer may hold locks that a forked process would wait for.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (function,))
    waiting: deque[tuple[T, Any]] = deque()
    gc.freeze()  # otherwise a tenth of the time goes to garbage collection over all imported libraries
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
            f"One of {workers} worker processes was killed, perhaps because memory ran out; run the step again with "
            "fewer processes (LOKY_MAX_CPU_COUNT=1)."
        ) from error
    finally:
        gc.unfreeze()
        pool.shutdown(wait=True, cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is already one process per core


def _apply(item: Any) -> Any:
    global _loaded
    result = _function(item)
    if not _loaded:  # what the first item loaded stays in use: exclude it from garbage collection
        _loaded = True
        gc.freeze()
    return result
