"""Run a function in several processes: calls from threads, or results over a stream in the order of its items."""

import gc
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from importlib import import_module
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from queue import LifoQueue
from threading import Thread
from types import ModuleType
from typing import Any, Generic, NamedTuple, Self, TypeVar

from univigu.errors import TransientError
from univigu.threads import side_threads

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 3  # items per process that are in progress or wait to be yielded
TRIES = 2  # of a call whose process is killed: the second time, memory may suffice


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
    waiting: deque[tuple[T, Future[R]]] = deque()
    gc.freeze()  # otherwise a tenth of the time goes to garbage collection over all imported libraries
    try:
        with side_threads(workers, "calls") as pool, Processes(function, workers) as call:
            try:
                for item in items:
                    waiting.append((item, pool.submit(call, item)))
                    if len(waiting) >= AHEAD * workers:
                        item, future = waiting.popleft()
                        yield item, future.result()
                for item, future in waiting:
                    yield item, future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    except ProcessDiedError as error:
        raise TransientError(
            f"One of {workers} worker processes was killed, perhaps because memory ran out; run the step again with "
            "fewer processes (LOKY_MAX_CPU_COUNT=1)."
        ) from error
    finally:
        gc.unfreeze()


class ProcessDiedError(Exception):
    """A call ended its process, and did so again in another one. The message says how."""


class Processes(Generic[R]):
    """Calls a function in other processes, from as many threads at a time; a process that dies costs only its call.

    function: must pickle; each process receives it once, when it is first needed, and its caches persist between calls.
    A call raises what the function raises, `ProcessDiedError` for a call that ends its process each time, and
    `TransientError` if no process can be started. Where the block is left by an exception, calls in progress are ended.
    """

    def __init__(self, function: Callable[..., R], count: int) -> None:
        self._function = function
        self._idle: LifoQueue[_Worker | None] = LifoQueue()  # the last one: a few calls start few processes
        for _ in range(count):
            self._idle.put(None)
        self._started: list[_Worker] = []
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended = True
        for worker in self._started:
            if kind:
                worker.process.terminate()
            else:
                worker.link.close()  # which the process notices when it waits for a call
        for worker in self._started:
            worker.process.join()

    def __call__(self, *arguments: Any) -> R:
        worker = self._idle.get()
        try:
            for _ in range(TRIES):
                worker = worker or self._start()
                try:
                    worker.link.send(arguments)
                    result = worker.link.recv()
                    break
                except (EOFError, OSError):
                    said, worker = worker.tell_end(), None
                if self._ended:
                    break
            if not worker:
                raise ProcessDiedError(said)
        finally:
            self._idle.put(worker)
        if isinstance(result, Exception):
            raise result
        return result

    def _start(self) -> "_Worker":
        # Not forked: threads of pyarrow and of the tokenizer may hold locks that a forked process would wait for.
        context = get_context("spawn")
        ForkingPickler.register(ModuleType, _reduce_module)
        link, other = context.Pipe()
        process = context.Process(target=_serve, args=(other, self._function), daemon=True)
        process.start()
        other.close()
        worker = _Worker(process, link)
        self._started.append(worker)
        if self._ended:
            process.terminate()
        try:
            link.recv()
        except (EOFError, OSError) as error:
            said = f"A worker process {worker.tell_end()} before it was ready"
            raise TransientError(f"{said}; its output says why. Run the command again.") from error
        return worker


class _Worker(NamedTuple):
    process: Any
    link: Connection

    def tell_end(self) -> str:
        """Wait for the end of a process that has gone, and say how it ended."""
        self.process.join()
        code = self.process.exitcode
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _reduce_module(module: ModuleType) -> tuple[Callable[[str], ModuleType], tuple[str]]:
    """How a module among the function's arguments pickles: by its name."""
    return import_module, (module.__name__,)


def _serve(link: Connection, function: Callable[..., Any]) -> None:
    """In a process: answer calls until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is already one process per core
    os.environ["OMP_NUM_THREADS"] = "1"
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        link.send(None)
        for number, arguments in enumerate(iter(link.recv, None)):
            try:
                result = function(*arguments)
            except Exception as error:
                error.add_note(traceback.format_exc())  # tracebacks don't pickle
                result = error
            link.send(result)
            if not number:  # what the first call loaded stays in use: exclude it from garbage collection
                gc.freeze()
    except (EOFError, OSError):
        return


def _end_with_parent() -> None:
    """End a call in progress, too, when the parent is killed: its results would go nowhere."""
    if parent := parent_process():
        parent.join()
        os._exit(1)
