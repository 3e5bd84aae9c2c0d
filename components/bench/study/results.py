"""The figures of a study, from the evaluations and probes of its finished arms: ``reports/study.json``.

Each figure is ``{"value", "low", "high", "n", "seeds"}``, with a 95 % interval over clips and seeds. It is under the
family and name of the arm or the probe. A family of which nothing has finished is left out.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from components.bench import machine
from components.bench.study.arms import STEPS, Arm, Probe, Study, arm_profile, changed_steps, data_profile
from components.bench.study.probes import read_probe
from components.bench.study.run import PROFILE, arm_root, read_failure, study_folder
from components.pipeline.digests import plain_json
from components.pipeline.manifests import verify
from components.pipeline.profiles import load_profile
from components.pipeline.stages import find_stage
from components.pipeline.tables import read_table
from univigu.errors import BadInputError
from univigu.evaluation.intervals import Score, attribute, mean, seeded_difference, seeded_mean
from univigu.files import read_yaml, write_json

REPORT = Path("reports/study.json")
COMPARED = ("captions", "generation", "joint")  # with the reference arm
BY_ATTRIBUTE = ("captions", "generation")
BASE = "generation_base"
LEFT_OUT = ("majority", "recogniser")  # they don't depend on the model

Claims = Mapping[str, bool]
Tasks = Mapping[str, Sequence[Claims]]  # by task: whether each item's claims are correct, in the order of the items
Figures = dict[str, Score]
Report = dict[str, Any]


class Evaluated(NamedTuple):
    """The finished evaluations of an arm."""

    arm: Arm
    tasks: Mapping[int, Tasks]  # by seed
    curves: Mapping[int, Sequence[tuple[int, float]]]  # by seed: step of stage 2, token accuracy on held-out pairs


class Probed(NamedTuple):
    """The finished results of a probe."""

    probe: Probe
    results: Mapping[int, Mapping[str, Any]]  # by seed, each as `probes.measure_probe` returns it


def write_report(study: Study, budget: str, root: Path) -> tuple[Report, list[Evaluated]]:
    """Write ``reports/study.json`` from all arms that have finished with this budget; returns it, and those arms.

    Raises `BadInputError`, and writes nothing, if none has.
    """
    evaluated = [one for arm in study.chosen(budget) if (one := read_arm(study, arm, budget, root)).tasks]
    if not evaluated:
        raise BadInputError(
            f"No arm of the study has finished with the budget '{budget}'; run `univigu study run --budget {budget}`."
        )
    probed = [one for arm in evaluated for one in read_probes(study, arm, budget, root)]
    about = {**_about(study, budget, root, evaluated), "probes": _about_probes(study, budget, probed)}
    report = {"about": about, **make_figures(study.reference, evaluated, probed)}
    (root / REPORT).parent.mkdir(parents=True, exist_ok=True)
    write_json(root / REPORT, report)
    return report, evaluated


def make_figures(reference: str, evaluated: Sequence[Evaluated], probed: Sequence[Probed] = ()) -> Report:
    """The figures by family, arm and score.

    A score is a task (``captions``, ``captions_without_video``, ``captions_in_4_steps``, ``generation``, ...), one of
    its attributes (``captions.digit``), its ``difference`` from the reference arm over the seeds that both have
    (``captions.difference``), or ``generation.kept``, the difference from the base that the arm began with. That of a
    probe is one of captions, their difference from those of the probe that it is against, or ``seconds_per_caption``,
    ``operations_per_video`` and the like.
    """
    known = {one.arm.name: one for one in evaluated}
    report: Report = {}
    for one in evaluated:
        figures = _scores(one)
        other = known.get(reference)
        if other and other is not one:
            figures |= _differences(one, other)
        report.setdefault(one.arm.family, {})[one.arm.name] = figures
    by_name = {one.probe.name: one for one in probed}
    for one in probed:
        figures = _probe_figures(one, by_name.get(one.probe.against))
        report.setdefault(one.probe.family, {})[one.probe.name] = figures
    return report


def read_arm(study: Study, arm: Arm, budget: str, root: Path) -> Evaluated:
    """The evaluations of an arm that are intact and made with its declared settings, by seed."""
    base = find_base(study, root)
    tasks, curves = {}, {}
    for seed in study.plan(budget).seeds if base else ():
        folder = arm_root(root, study, arm, budget, seed)
        if is_finished(folder, arm_profile(study, arm, budget, seed, base)):
            tasks[seed] = _read_items(folder / find_stage(STEPS[-1]).home)
            curves[seed] = _read_curve(folder / find_stage(STEPS[-2]).home / "heldout.csv")
    return Evaluated(arm, tasks, curves)


def read_probes(study: Study, one: Evaluated, budget: str, root: Path) -> list[Probed]:
    """The probes of an arm that have finished, each with the seeds whose evaluations count."""
    probed = []
    for probe in study.probes_of(one.arm, budget):
        folders = {seed: arm_root(root, study, one.arm, budget, seed) for seed in sorted(one.tasks)}
        found = {seed: result for seed, folder in folders.items() if (result := read_probe(folder, probe))}
        probed += [Probed(probe, found)] if found else []
    return probed


def find_base(study: Study, root: Path) -> str:
    """The base of the shared data, as the profile names it; "" if they weren't made with the declared profile."""
    path = study_folder(root, study) / "data" / PROFILE
    made = path.is_file() and read_yaml(path) == plain_json(data_profile(study))
    return load_profile(str(path))["base"] if made else ""


def is_finished(folder: Path, declared: Mapping[str, Any]) -> bool:
    """Whether an arm's evaluation is intact, and it and the trainings before it have the declared settings."""
    try:
        if read_yaml(folder / PROFILE) != plain_json(declared):
            return False
        values = load_profile(str(folder / PROFILE))
        one, two, evaluation = (verify(folder / find_stage(step).home, step) for step in STEPS)
    except (OSError, ValueError, BadInputError):
        return False
    read = (two["inputs"]["model"], evaluation["inputs"]["stage1"], evaluation["inputs"]["stage2"])
    settings = [plain_json({name: values[name] for name in find_stage(step).parameters}) for step in STEPS]
    return read == (one["digest"], one["digest"], two["digest"]) and settings == [
        made["parameters"] for made in (one, two, evaluation)
    ]


def status(study: Study, arm: Arm, budget: str, root: Path) -> dict[int, str]:
    """By seed: ``finished``, why the arm failed, or "" if it has not run to its end."""
    base = find_base(study, root)
    found = {}
    for seed in study.plan(budget).seeds:
        folder = arm_root(root, study, arm, budget, seed)
        done = bool(base) and is_finished(folder, arm_profile(study, arm, budget, seed, base))
        found[seed] = "finished" if done else read_failure(folder)
    return found


def _read_items(folder: Path) -> dict[str, list[Claims]]:
    tasks: dict[str, list[Claims]] = {}
    for row in read_table(folder, "items").to_pylist():  # sorted by task and item
        if row["task"] not in LEFT_OUT:
            tasks.setdefault(row["task"], []).append(json.loads(row["correct"]))
    return tasks


def _read_curve(path: Path) -> list[tuple[int, float]]:
    """The mean of the token accuracy over the bins of tau, by step."""
    found: dict[int, list[float]] = {}
    with path.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            found.setdefault(int(row["step"]), []).append(float(row["token_accuracy"]))
    return [(step, sum(values) / len(values)) for step, values in sorted(found.items())]


def _scores(one: Evaluated) -> Figures:
    runs = list(one.tasks.values())
    tasks = [task for task in runs[0] if all(task in run for run in runs)]
    if one.arm.weights == "random":  # its base is no generator
        tasks = [task for task in tasks if task != BASE]
    figures: Figures = {}
    for task in sorted(tasks):
        claims = [run[task] for run in runs]
        figures[task] = seeded_mean(claims)
        names = sorted({attribute(name) for run in claims for item in run for name in item})
        for name in names if task in BY_ATTRIBUTE else ():
            figures[f"{task}.{name}"] = seeded_mean([[_only(item, name) for item in run] for run in claims])
    if BASE in figures:
        ours, theirs = ([run[task] for run in runs] for task in ("generation", BASE))
        figures["generation.kept"] = seeded_difference(ours, theirs)
    return figures


def _differences(one: Evaluated, other: Evaluated) -> Figures:
    """The differences from the reference arm, over the seeds that both have."""
    seeds = sorted(one.tasks.keys() & other.tasks.keys())
    figures: Figures = {}
    for task in COMPARED if seeds else ():
        if all(task in side.tasks[seed] for side in (one, other) for seed in seeds):
            ours, theirs = ([side.tasks[seed][task] for seed in seeds] for side in (one, other))
            figures[f"{task}.difference"] = seeded_difference(ours, theirs)
    return figures


def _probe_figures(one: Probed, other: Probed | None) -> Figures:
    """The figures of a probe; other: the finished probe that it is against, if there is one."""
    runs = list(one.results.values())
    figures: Figures = {task: seeded_mean([run["claims"][task] for run in runs]) for task in sorted(runs[0]["claims"])}
    claims = [run["claims"]["captions"] for run in runs]
    for name in sorted({attribute(name) for run in claims for item in run for name in item}):
        figures[f"captions.{name}"] = seeded_mean([[_only(item, name) for item in run] for run in claims])
    for kind in ("seconds", "operations", "steps"):
        for name in runs[0][kind]:
            figures[f"{kind}_per_{name}"] = {**mean([x for run in runs for x in run[kind][name]]), "seeds": len(runs)}
    if other and (seeds := sorted(one.results.keys() & other.results.keys())):
        ours, theirs = ([side.results[seed]["claims"]["captions"] for seed in seeds] for side in (one, other))
        figures["captions.difference"] = seeded_difference(ours, theirs)
    return figures


def _only(item: Claims, name: str) -> dict[str, bool]:
    return {claim: right for claim, right in item.items() if attribute(claim) == name}


def _about(study: Study, budget: str, root: Path, evaluated: Sequence[Evaluated]) -> Report:
    """What the figures are of: the budget, the machine, and all arms with their settings and state."""
    seeds = {one.arm.name: sorted(one.tasks) for one in evaluated}
    return {
        "budget": budget,
        "profile": study.profile,
        "seeds": study.plan(budget).seeds,
        "reference": study.reference,
        "machine": machine(),
        "arms": {
            arm.name: {
                "family": arm.family,
                "question": arm.question,
                "settings": {**arm.settings, **getattr(arm, budget)},
                "weights": arm.weights,
                "steps": changed_steps(study, arm, budget),
                "seeds": seeds.get(arm.name, []),
                "failures": {
                    str(seed): failure
                    for seed in study.plan(budget).seeds
                    if seed not in seeds.get(arm.name, [])
                    and (failure := read_failure(arm_root(root, study, arm, budget, seed)))
                },
            }
            for arm in study.chosen(budget)
        },
    }


def _about_probes(study: Study, budget: str, probed: Sequence[Probed]) -> Report:
    """All probes of a budget with their settings and the seeds that have finished."""
    seeds = {one.probe.name: sorted(one.results) for one in probed}
    return {
        probe.name: {
            "family": probe.family,
            "question": probe.question,
            "of": probe.of or study.reference,
            "against": probe.against,
            "settings": {name: value for name, value in probe.changes().items() if name not in ("of", "against")},
            "seeds": seeds.get(probe.name, []),
        }
        for probe in study.probes
        if budget in probe.budgets
    }
