"""Captions against steps and seconds of stage 2, with one, two, four and eight texts for each pass over a video.

The arms are declared in ``text_draws.yaml``, and train and evaluate as those of a study do, on the demo's own data, in
``.univigu/text-draws``: a killed run resumes. Each number of steps is a training of its own, because the learning rate
falls to zero at its end. Two arms run at a time, each on one thread, and seconds are processor seconds of the whole
step, so that other programs don't count.

``arms`` has for each its draws, steps, the seconds of a step, and the mean of its captions' attributes with a 95 %
interval over clips; ``seconds_per_step`` has the seconds of a step by number of draws. ``steps_to`` has for each number
of draws the steps at which captions reach `TARGET`, and ``seconds_to`` the seconds, both interpolated between
neighbouring arms; null where no arm reaches it. `ratio` is the fewest steps of several draws over those of one, or
null. ``best`` is the best arm with the most steps that every number of draws was tried with, trained from three seeds:
its interval is over clips and seeds.

``noise`` says how much more draws can help: for arms of one draw, the variance of a sample's gradient in the task
understand, and which share of it comes ``from_draws``, that is from the noise and time of the text and not from the
clip. K draws divide only this share by K, and cost more, so ``left`` is what remains of the variance with each number
of draws.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.bench.study.arms import STEPS, Arm, Budget, Study, check_arms, load_study
from components.bench.study.results import read_arm
from components.bench.study.run import PROFILE, SOURCES, arm_root, run_study, study_folder
from components.pipeline.manifests import read_manifest
from components.pipeline.profiles import load_profile
from components.pipeline.stages import find_stage
from components.pipeline.state import STATE
from components.pipeline.tables import read_table
from univigu.errors import UniViGUError
from univigu.evaluation.intervals import seeded_mean
from univigu.files import link_or_copy, read_json_object

if TYPE_CHECKING:
    from torch import Tensor

    from univigu.training.data import LatentDataset

DECLARED = Path(__file__).with_suffix(".yaml")
TARGET = 0.9  # of captions.mean
TRIED = (1, 2, 4, 8)  # draws
CLIPS, DRAWS = 48, 8  # whose gradients are compared
TRAINING, SECTION = "train-stage-2", "train_stage_2"


def measure() -> dict[str, Any]:
    study, root = load_study(DECLARED), Path(STATE) / "text-draws"
    link_sources(study, Path("."), root)
    found = compare(run(study, "short", study.chosen("short"), root))
    (best,) = run(study, "full", [study.find(best_arm(found["arms"]))], root)
    single = [arm for arm in study.chosen("short") if draws_of(arm) == 1]
    noise = {arm.name: gradient_noise(arm_root(root, study, arm, "short", 0)) for arm in single}
    return found | {"best": best, "noise": noise}


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
        "arm": arm.name,
        "draws": draws_of(arm),
        "steps": steps,
        "seconds_per_step": round(max(seconds) / steps, 4),
        "captions": seeded_mean([one["captions"] for one in tasks.values()]),
    }


def draws_of(arm: Arm) -> int:
    """How many texts an arm has for each pass over a video."""
    return arm.settings.get(f"{SECTION}.text_draws", 1)


def best_arm(arms: Sequence[Mapping[str, Any]]) -> str:
    """The arm with the most captions right, of those with the most steps that every number of draws was tried with."""
    tried = {draws: {arm["steps"] for arm in arms if arm["draws"] == draws} for draws in {arm["draws"] for arm in arms}}
    steps = max(set.intersection(*tried.values()))
    return max((arm for arm in arms if arm["steps"] == steps), key=lambda arm: arm["captions"]["value"])["arm"]


def compare(arms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The report of all arms."""
    steps_to: dict[str, float | None] = {}
    seconds_to: dict[str, float | None] = {}
    per_step: dict[str, float] = {}
    for draws in sorted({arm["draws"] for arm in arms}):
        own = sorted((arm["steps"], arm["captions"]["value"]) for arm in arms if arm["draws"] == draws)
        # the largest: of a training that was resumed, only the last part is recorded
        per_step[str(draws)] = max(arm["seconds_per_step"] for arm in arms if arm["draws"] == draws)
        steps = crossing(own)
        steps_to[str(draws)] = steps
        seconds_to[str(draws)] = None if steps is None else round(steps * per_step[str(draws)], 1)
    one = steps_to.get("1")
    others = [steps for draws, steps in steps_to.items() if draws != "1" and steps is not None]
    ratio = round(min(others) / one, 4) if one and others else None
    return {
        "ratio": ratio,
        "target": TARGET,
        "steps_to": steps_to,
        "seconds_to": seconds_to,
        "seconds_per_step": per_step,
        "arms": list(arms),
        "evaluated_by": STEPS[-1],
    }


def gradient_noise(folder: Path) -> dict[str, Any]:
    """What the gradient of understand varies with, in the trained model of an arm: the text's draw, or the clip.

    An analysis of variance of the gradients of `CLIPS` training clips with `DRAWS` draws each, all weights together.
    """
    import torch

    from univigu import ObjectiveConfig, TrainingObjective, UniViGUPipeline
    from univigu.training.data import token_weights

    values = load_profile(str(folder / PROFILE))
    section = values[SECTION]
    pipeline = UniViGUPipeline.from_pretrained(folder / find_stage(TRAINING).home / "model")
    transformer, dataset = pipeline.transformer.train(), open_training_data(folder, values["text"]["prompt_length"])
    shape, weights = transformer.config, section["loss_weights"]
    config = ObjectiveConfig(
        shares={"understand": 1.0},
        text_shift=section["time_shift"]["text"],
        text_weight=weights["text"],
        ce_weight=weights["cross_entropy"],
        self_conditioning=0.0,
        form=section["objective"],
        seed=values["seed"],
    )
    counted = token_weights(
        dataset.target_ids, shape.vocab_size, shape.pad_token_id, section["token_weighting"], shape.eos_token_id
    )
    objective = TrainingObjective(transformer, config, counted)
    learned = [one for one in transformer.parameters() if one.requires_grad]

    def gradient(clip: int, draw: int) -> torch.Tensor:
        loss = objective(dataset.batch([clip], [draw]), 0)["loss"]
        found = torch.autograd.grad(loss, learned, allow_unused=True)
        return torch.cat([one.flatten() for one in found if one is not None])

    chosen = [len(dataset) * number // CLIPS for number in range(CLIPS)]
    squares, of_clips = 0.0, []
    for clip in chosen:
        gradients = [gradient(clip, draw) for draw in range(DRAWS)]
        of_clips.append(torch.stack(gradients).mean(0))
        squares += sum(float((one - of_clips[-1]).square().sum()) for one in gradients)
    return share_of_draws(squares, torch.stack(of_clips))


def open_training_data(folder: Path, prompt_length: int) -> "LatentDataset":
    """The training samples of stage 2 in a work root."""
    from univigu.training.data import EMPTY_PROMPT, LatentDataset, SampleRef

    home = folder / find_stage("encode-latents").home
    rows = [row for row in read_table(home, "latents").to_pylist() if (row["stage"], row["split"]) == (2, "train")]
    samples = [SampleRef(row["id"], home / row["shard"], row["row"], ()) for row in rows]
    return LatentDataset(samples, home / EMPTY_PROMPT, prompt_length)


def share_of_draws(squares: float, of_clips: "Tensor") -> dict[str, Any]:
    """The figures of `gradient_noise`.

    squares: the sum, over all clips and draws, of the squared distance of a gradient from the mean of its clip.
    of_clips: those means, (CLIPS, weights). The estimates of both variances are the unbiased ones.
    """
    from_draws = squares / (CLIPS * (DRAWS - 1))
    from_clips = float(of_clips.var(0).sum()) - from_draws / DRAWS
    total = from_draws + from_clips
    return {
        "from_draws": round(from_draws / total, 3),
        "left": {str(draws): round((from_clips + from_draws / draws) / total, 3) for draws in TRIED},
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
