"""How threads share a processor's cores, so that two cores are used as two, alone on a machine or not.

Three things decide that; `univigu bench busy` measures them together against what processes do by default:

- A thread of OpenMP that waits for others spins for a while. Beside another busy program the thread that it waits for
  has no core, so by default most of both cores' time is spent on spinning. `bound_spinning` bounds it.
- Every thread that runs operations on tensors opens a team of OpenMP's of its own. With more threads than cores libgomp
  stops spinning for all of them. Threads of `side_threads` work alone.
- More threads don't always make a step shorter. `settle_threads` measures, and keeps the number for the whole run, as
  sums depend on it: a run that goes on after a kill ends with the same bits.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from univigu.errors import CorruptDataError
from univigu.files import read_json_object, write_json

# Few: spinning 30 times as long makes a step alone a fifth shorter, and one beside a busy program twice as long.
SPINS = "300"
WORTHWHILE = 0.95  # more threads are used where they take at most this part of the time
_TRIES, _MOST_TRIES, _TRIED_S = 3, 30, 5.0  # for some seconds: what else a machine does for one decides nothing
_MOST_THREADS = 4096


def bound_spinning() -> None:
    """Bound how long OpenMP's threads spin, here and in processes started later; call it before torch is imported.

    Leaves alone what a user has set (GOMP_SPINCOUNT, OMP_WAIT_POLICY).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def side_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Threads for work beside this one's, whose operations on tensors use one thread each."""
    if torch := sys.modules.get("torch"):
        torch.get_num_threads()  # settles this thread's number before _work_alone changes what new threads take
    return ThreadPoolExecutor(count, name, initializer=_work_alone)


def _work_alone() -> None:
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # of this thread


def settle_threads(step: Callable[[], object], note: Path) -> int:
    """Use the number of threads that makes `step` shortest, as told by the file `note` or measured and written there.

    Tries all cores, half of them and so on; takes fewer threads where more gain less than 5 %. With OMP_NUM_THREADS
    set, that is the number. Raises `CorruptDataError` where the note holds no number.
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
        raise CorruptDataError(f"{note} names no number of threads; start the step afresh with --restart.")
    return threads


def measure_threads(step: Callable[[], object], most: int) -> dict[int, float]:
    """The shortest time of `step` in seconds with 1, 2, 4 ... `most` threads, tried in turn for some seconds."""
    import torch

    numbers = {most >> halvings for halvings in range(most.bit_length())}
    seconds = dict.fromkeys(sorted(numbers, reverse=True), float("inf"))
    step()  # not measured: the first one allocates
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
    """The smallest number of threads whose time is within 5 % of the shortest."""
    bound = min(seconds.values()) / WORTHWHILE
    return min(number for number, taken in seconds.items() if taken <= bound)
