"""Which trials are run, in which order: the same ones for the same seed, spread over plans, calls and kinds."""

import errno
import random
from collections.abc import Iterator
from itertools import cycle

from tests.chaos.shim import Fault
from tests.chaos.trials import Bench, Stage, points

FAULTS = (Fault(0, errno.EIO), Fault(0, errno.ENOSPC), Fault(0, errno.EIO, True), Fault(0, errno.ENOSPC, True))
_KILLS_OF_HEAVY, _FAULTS, _DOUBLE_KILLS = 60, 24, 6  # of each plan, and of each kind of fault


def schedule(bench: Bench, seed: int) -> list[tuple[str, tuple[Fault, ...]]]:
    """Every trial: a plan's name and its faults, drawn without order: a part from the start is a fair sample."""
    drawn = random.Random(seed)
    found = [
        (drawn.random() ** (1 / stage.plan.weight), name, faults)
        for name, stage in bench.stages.items()
        for faults in _of(stage, seed)
    ]
    return [(name, faults) for _, name, faults in sorted(found, reverse=True)]


def stratified(bench: Bench, seed: int, each: int) -> list[tuple[str, tuple[Fault, ...]]]:
    """A short list: `each` trials of every plan, the kinds in turn."""
    drawn, kinds = random.Random(seed), cycle((Fault(0), *FAULTS))
    return [
        (name, (next(kinds)._replace(n=_anywhere(drawn, stage)),))
        for name, stage in bench.stages.items()
        for _ in range(each)
    ]


def _of(stage: Stage, seed: int) -> Iterator[tuple[Fault, ...]]:
    calls, drawn = len(stage.calls), random.Random(f"{seed} {stage.plan.name}")
    for n in points(calls, calls if stage.plan.light else _KILLS_OF_HEAVY, seed):
        yield (Fault(n),)
    for kind in FAULTS:
        for n in points(calls, _FAULTS, seed + kind.number + kind.lasting):
            yield (kind._replace(n=n),)
    for _ in range(_DOUBLE_KILLS):
        yield Fault(_anywhere(drawn, stage)), Fault(_anywhere(drawn, stage))


def _anywhere(drawn: random.Random, stage: Stage) -> int:
    return drawn.randint(1, len(stage.calls))
