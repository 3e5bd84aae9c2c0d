"""How threads share the cores of a CPU, so that all cores are used well, also beside other busy programs.

Three settings matter; `univigu bench busy` measures them together against the defaults:

- An OpenMP thread spins for a while when it waits for other threads. Beside another busy program, the thread that it
  waits for may have no core, and by default most of the time is spent spinning. `bound_spinning` limits it.
- Every Python thread that runs tensor operations starts an OpenMP team of its own. With more threads than cores,
  libgomp stops spinning in all of them. Threads of `side_threads` therefore have no team.
- More threads don't always make a step shorter. `settle_threads` measures, and keeps the number for the whole run,
  because sums depend on it: a run that resumes after a kill ends with the same bits.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from univigu.errors import CorruptDataError
from univigu.files import read_json_object, write_json

# Low: with 30 times as many, a step takes a fifth less time on an idle machine, and twice the time on a busy one.
SPINS = "300"
WORTHWHILE = 0.95  # more threads are used only if they take at most this share of the time
_TRIES, _MOST_TRIES, _TRIED_S = 3, 30, 5.0  # several seconds, so that a short load on the machine has no effect
_MOST_THREADS = 4096
PART = 16  # samples that a thread makes or encodes at a time on a CPU

Part = TypeVar("Part")
Result = TypeVar("Result")


def bound_spinning() -> None:
    """Limit how long OpenMP threads spin, here and in child processes; call it before torch is imported.

    Settings of the user (GOMP_SPINCOUNT, OMP_WAIT_POLICY) are kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def side_threads(count: int, name: str) -> ThreadPoolExecutor:
    """A pool of threads for background work, whose tensor operations use one thread each."""
    if torch := sys.modules.get("torch"):
        torch.get_num_threads()  # fixes this thread's number before _work_alone changes the default for new threads
    return ThreadPoolExecutor(count, name, initializer=_work_alone)


def _work_alone() -> None:
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # for this thread


def in_parts(batch: Sequence[Part]) -> list[Sequence[Part]]:
    """A batch in parts for `map_on_cores`: one for a GPU, and of a fixed size for CPUs, whatever their number."""
    import torch

    size = len(batch) if torch.cuda.is_available() else PART
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def map_on_cores(function: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """`function` of each part, several at a time on a CPU: one per core, each in a thread without a team.

    A team divides each operation, and waits after each; parts wait once. The results don't depend on the number of
    cores, because the parts are given, and a single one has no team either. With a GPU, or with one thread
    (OMP_NUM_THREADS), one part follows another.
    """
    import torch

    cores = torch.get_num_threads()
    if torch.cuda.is_available() or cores == 1:
        return [function(part) for part in parts]
    with side_threads(max(1, min(cores, len(parts))), "parts") as pool:
        return list(pool.map(function, parts))


def settle_threads(step: Callable[[], object], note: Path) -> int:
    """Use the number of threads that makes `step` fastest, read from the file `note`, or measured and written there.

    Tries all cores, half of them, and so on, and prefers fewer threads where more gain less than 5 %. OMP_NUM_THREADS
    takes precedence. Returns the number. Raises `CorruptDataError` where the note has no valid number.
    """
    import torch

    if note.is_file():
        chosen = _noted(note)
    elif "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() == 1:
        chosen = torch.get_num_threads()
        write_json(note, {"threads": chosen})
    else:
        seconds = measure_threads(step, torch.get_num_threads())
        chosen = fewest_worthwhile(seconds)
        write_json(note, {"threads": chosen, "seconds": {f"{number}": seconds[number] for number in sorted(seconds)}})
    torch.set_num_threads(chosen)
    return chosen


def _noted(note: Path) -> int:
    try:
        threads = read_json_object(note).get("threads")
    except ValueError:
        threads = None
    if type(threads) is not int or not 1 <= threads <= _MOST_THREADS:
        raise CorruptDataError(f"{note} has no valid number of threads; start the step again with --restart.")
    return threads


def measure_threads(step: Callable[[], object], most: int) -> dict[int, float]:
    """The shortest time of `step` in seconds for each number of threads: `most`, half of it, and so on down to 1."""
    import torch

    numbers = {most >> halvings for halvings in range(most.bit_length())}
    seconds = dict.fromkeys(sorted(numbers, reverse=True), float("inf"))
    step()  # not measured, because it allocates memory
    rounds, began = 0, time.perf_counter()
    while rounds < _TRIES or (rounds < _MOST_TRIES and time.perf_counter() - began < _TRIED_S):
        for number in seconds:
            torch.set_num_threads(number)
            started = time.perf_counter()
            step()
            seconds[number] = min(seconds[number], time.perf_counter() - started)
        rounds += 1
    return seconds


def fewest_worthwhile(seconds: Mapping[int, float]) -> int:
    """The smallest number of threads whose time is within 5 % of the shortest time."""
    bound = min(seconds.values()) / WORTHWHILE
    return min(number for number, taken in seconds.items() if taken <= bound)
