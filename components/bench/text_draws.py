"""Captions against steps and seconds of stage 2, with one, two, four and eight texts for each pass over a video.

The arms are declared in ``text_draws.yaml``, and train and evaluate as those of a study do, on the demo's own data, in
``.univigu/text-draws``: a killed run resumes. Each number of steps is a training of its own, because the learning rate
falls to zero at its end. Two arms run at a time, each on one thread, and seconds are processor seconds of the whole
step, so that other programs don't count.

``arms`` has for each its draws, steps, the seconds of a step, and the mean of its captions' attributes with a 95 %
interval over clips. ``steps_to`` has for each number of draws the steps at which captions reach `TARGET`, and
``seconds_to`` the seconds, both interpolated between neighbouring arms; null where no arm reaches it. `ratio` is the
fewest steps of several draws over those of one, or null. ``best`` has the same of the number of draws that needs the
fewest steps (of one draw, if none reaches the target), trained from three seeds: its intervals are over clips and
seeds.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from components.bench.study.arms import STEPS, Arm, Budget, Study, check_arms, load_study
from components.bench.study.results import read_arm
from components.bench.study.run import SOURCES, arm_root, run_study, study_folder
from components.pipeline.manifests import read_manifest
from components.pipeline.profiles import load_profile
from components.pipeline.stages import find_stage
from components.pipeline.state import STATE
from univigu.errors import UniViGUError
from univigu.evaluation.intervals import seeded_mean
from univigu.files import link_or_copy, read_json_object

DECLARED = Path(__file__).with_suffix(".yaml")
TARGET = 0.9  # of captions.mean
TRAINING, SECTION = "train-stage-2", "train_stage_2"


def measure() -> dict[str, Any]:
    study, root = load_study(DECLARED), Path(STATE) / "text-draws"
    link_sources(study, Path("."), root)
    found = compare(run(study, "short", study.chosen("short"), root))
    best = best_draws(found["steps_to"])
    again = run(study, "full", [arm for arm in study.chosen("full") if draws_of(arm) == best], root)
    return found | {"best": {"draws": best, **compare(again)}}


def run(study: Study, budget: Budget, arms: list[Arm], root: Path) -> list[dict[str, Any]]:
    """Train and evaluate the arms with every seed of the budget; returns the figures of each."""
    check_arms(study, budget, arms)
    failed = [one for one in run_study(study, budget, arms, root, jobs=2) if one.failure]
    if failed:
        raise UniViGUError(f"The arm {failed[0].arm} failed ({failed[0].failure}); run the command again to resume.")
    return [read(study, arm, budget, root) for arm in arms]


def link_sources(study: Study, source: Path, root: Path) -> None:
    """Link what the data are made from into a work root of their own."""
    profile = load_profile(study.profile)
    for path in {Path(profile[key]) for key in SOURCES}:
        for file in [source / path] if (source / path).is_file() else sorted((source / path).rglob("*")):
            target = root / file.relative_to(source)
            if file.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(file, target)


def read(study: Study, arm: Arm, budget: Budget, root: Path) -> dict[str, Any]:
    """The figures of an arm that has finished with every seed of the budget."""
    steps = arm.settings[f"{SECTION}.steps"]
    tasks = read_arm(study, arm, budget, root).tasks
    roots = [arm_root(root, study, arm, budget, seed) for seed in tasks]
    digests = {read_manifest(one / find_stage(TRAINING).home, TRAINING)["digest"] for one in roots}
    records = map(read_json_object, (study_folder(root, study) / "trained").glob(f"*/{STATE}/runs/{TRAINING}.json"))
    seconds = [record["cpu_seconds"] for record in records if record["digest"] in digests]
    return {
        "draws": draws_of(arm),
        "steps": steps,
        "seconds_per_step": round(mean(seconds) / steps, 4),
        "captions": seeded_mean([one["captions"] for one in tasks.values()]),
    }


def draws_of(arm: Arm) -> int:
    """How many texts an arm has for each pass over a video."""
    return arm.settings.get(f"{SECTION}.text_draws", 1)


def best_draws(steps_to: Mapping[str, float | None]) -> int:
    """The number of draws that reaches the target in the fewest steps; 1 if none does."""
    return min(((steps, int(draws)) for draws, steps in steps_to.items() if steps is not None), default=(0.0, 1))[1]


def compare(arms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The report of all arms."""
    steps_to: dict[str, float | None] = {}
    seconds_to: dict[str, float | None] = {}
    for draws in sorted({arm["draws"] for arm in arms}):
        own = sorted((arm["steps"], arm["captions"]["value"]) for arm in arms if arm["draws"] == draws)
        per_step = [arm["seconds_per_step"] for arm in arms if arm["draws"] == draws]
        steps = crossing(own)
        steps_to[str(draws)] = steps
        seconds_to[str(draws)] = None if steps is None else round(steps * sum(per_step) / len(per_step), 1)
    one = steps_to.get("1")
    others = [steps for draws, steps in steps_to.items() if draws != "1" and steps is not None]
    ratio = round(min(others) / one, 4) if one and others else None
    return {
        "ratio": ratio,
        "target": TARGET,
        "steps_to": steps_to,
        "seconds_to": seconds_to,
        "arms": list(arms),
        "evaluated_by": STEPS[-1],
    }


def crossing(points: Sequence[tuple[int, float]]) -> float | None:
    """The number of steps at which a rising curve through (steps, score) reaches `TARGET`; None if it doesn't.

    It is the fewest steps that were tried, if they are enough already.
    """
    if points[0][1] >= TARGET:
        return float(points[0][0])
    for (before, low), (after, high) in pairwise(points):
        if high >= TARGET:
            return round(before + (after - before) * (TARGET - low) / (high - low), 1)
    return None
