"""Trials: a command is broken at a call, and given again; what it leaves is held against a run that nothing broke."""

import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from components.pipeline.manifests import MANIFEST
from components.pipeline.stages import find_stage
from tests.chaos import oracles, roots, server
from tests.chaos.plans import Plan, make_sources, plans
from tests.chaos.shim import Fault

NONE = Fault(0)
_LIMIT_S = 300.0  # of a run that nothing breaks
_SLACK_S, _SLACK = 60.0, 20  # a run that takes that much longer than without a fault hangs


@dataclass
class Stage:
    """What is known of a plan: the root it starts from, what it leaves, its write-side calls, how long it takes."""

    plan: Plan
    before: Path
    state: dict[str, str]
    calls: tuple[str, ...]
    seconds: float


@dataclass
class Bench:
    """The work roots that trials start from, below one folder, and what runs without faults did there."""

    folder: Path
    stages: dict[str, Stage] = field(default_factory=dict)
    sound: set[str] = field(default_factory=set)  # `fingerprint` of what a fault left, and from where all went well

    @property
    def profile(self) -> Path:
        return self.folder / "profile.yaml"

    def root_after(self, name: str) -> Path:
        return self.folder / "roots" / (name or "sources").replace(" ", "-")


@dataclass(frozen=True)
class Trial:
    """What happened at one trial. Nothing in `findings`: all is well. `hit` is empty where the call never came."""

    plan: str
    faults: tuple[Fault, ...]
    hit: str
    findings: tuple[str, ...]


def set_up(folder: Path, names: Sequence[str] = ()) -> Bench:
    """Make the root that each plan starts from, up to the last plan that is wanted (all: none is named)."""
    bench = Bench(folder)
    make_sources(bench.root_after(""), bench.profile)
    roots.copy(bench.root_after(""), folder / "warm")
    wanted = needed(plans(bench.profile), names)
    server.warm_up(str(bench.profile), folder / "warm", {plan.step or plan.name for plan in wanted})
    for plan in wanted:
        learn(bench, plan)
    return bench


def needed(found: Sequence[Plan], names: Sequence[str]) -> list[Plan]:
    """The plans that are named, and those whose roots they start from, in their order."""
    by_name = {plan.name: plan for plan in found}
    wanted = set(names or by_name)
    for plan in reversed(found):
        if plan.name in wanted and plan.after:
            wanted.add(plan.after)
    return [plan for plan in found if plan.name in wanted]


def elsewhere(bench: Bench, names: Sequence[str]) -> Iterator[Trial]:
    """Run plans one after another in a root of another path: each must come to the same bytes there."""
    place = bench.folder / "another place" / "much deeper"
    roots.prepare(bench.root_after(""), place)
    for name in names:
        outcome = server.run(bench.stages[name].plan.arguments, place, NONE, _LIMIT_S)
        yield Trial(name, (), "elsewhere", tuple(oracles.after_again(outcome, place, bench.stages[name].state)))


def learn(bench: Bench, plan: Plan) -> Stage:
    """Run a plan without faults, and note all about it."""
    place = bench.folder / "trial"  # the same path as in all trials: MLflow notes where its artifacts are
    roots.prepare(bench.root_after(plan.after), place)
    outcome = server.run(plan.arguments, place, NONE, _LIMIT_S)
    if outcome.code:
        sys.exit(f"{plan.name} without a fault ends with {outcome.code}: {outcome.err}")
    stage = Stage(plan, bench.root_after(plan.after), roots.state(place / "root"), outcome.calls, outcome.seconds)
    bench.stages[plan.name] = stage
    if not bench.root_after(plan.name).exists():
        roots.copy(place / "root", bench.root_after(plan.name))
    return stage


def attempt(bench: Bench, name: str, faults: Sequence[Fault]) -> Trial:
    """Break a plan by one fault after another, then run it without; look at all that it promises."""
    stage, place = bench.stages[name], bench.folder / "trial"
    limit = _SLACK_S + _SLACK * stage.seconds
    roots.prepare(stage.before, place)
    findings: list[str] = []
    hit = ""
    for fault in faults:
        outcome = server.run(stage.plan.arguments, place, fault, limit)
        if not outcome.calls:
            return Trial(name, tuple(faults), hit, tuple(findings))
        hit = outcome.calls[0]
        findings += oracles.after_fault(outcome, fault, place, stage.plan.step, stage.state)
    left = name + roots.fingerprint(place)
    if left not in bench.sound and not _decided(stage, place):
        done = _committed(stage, place)
        _forget_what_could_not_be_removed(faults, place)
        outcome = server.run(stage.plan.arguments, place, NONE, limit)
        wrong = oracles.after_again(outcome, place, stage.state)
        if done:  # the run that was broken had made its output, so the second one was one more run
            wrong = [line for line in wrong if not line.startswith("registry: ")]
        findings += wrong
        bench.sound |= set() if wrong else {left}
    return Trial(name, tuple(faults), hit, tuple(findings))


def _committed(stage: Stage, place: Path) -> bool:
    """Whether a step's output is another than the one that it started from."""
    if not stage.plan.step:
        return False
    manifest = Path(find_stage(stage.plan.step).home) / MANIFEST
    now, before = place / "root" / manifest, stage.before / manifest
    return now.exists() and not (before.exists() and now.samefile(before))


def _forget_what_could_not_be_removed(faults: Sequence[Fault], place: Path) -> None:
    """A disk that fails from then on keeps temporary files, which no later run can know as its own."""
    if any(fault.lasting for fault in faults):
        shutil.rmtree(place / "tmp")
        (place / "tmp").mkdir()


def _decided(stage: Stage, place: Path) -> bool:
    """Whether a command about models has done all that it was asked: given again, it would be asked for more."""
    return not stage.plan.step and not roots.differences(stage.state, roots.state(place / "root"))


def points(calls: int, most: int, seed: int) -> list[int]:
    """Which calls to break: all, or `most` of them, one from each of as many equal stretches."""
    if calls <= most:
        return list(range(1, calls + 1))
    drawn = random.Random(seed)
    edges = [1 + calls * number // most for number in range(most + 1)]
    return [drawn.randrange(start, end) for start, end in pairwise(edges)]
