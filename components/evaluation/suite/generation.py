"""Figures of generated clips, and of prompts that become a clip and then a caption again."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.clips.gate import judge, load_gate
from components.evaluation.pairs import read_text
from components.evaluation.scorers import clip as clip_scorer
from components.evaluation.suite.captions import LeftOut, Scores
from components.evaluation.suite.data import Dataset, Prompt
from components.evaluation.suite.features import VideoFeatures
from univigu.errors import BadInputError, UniViGUError
from univigu.evaluation.claims import score_item, summarise
from univigu.evaluation.frechet import frechet_distance
from univigu.evaluation.intervals import clustered_mean, jackknife, mean, share

if TYPE_CHECKING:
    import numpy as np

    from univigu.pipeline import UniViGUPipeline

CHECKS = {"flicker": "flicker", "motion": "displacement"}  # of `components.checks`, and the score that each gives
DIVERSE = 8  # clips that are compared with another one of their prompt
FEWEST = 2  # values that have an interval
Keep = Callable[[Prompt, "np.ndarray"], None]


@dataclass
class Generated:
    """What is kept of one generated clip: its figures, and the caption that the model writes for it."""

    prompt: Prompt
    failure: str = ""
    caption: str = ""
    seen: dict[str, str] = field(default_factory=dict)  # by the world's recogniser
    measured: dict[str, float] = field(default_factory=dict)
    features: Any = None
    embedded: Any = None  # by CLIP
    frames: Any = None  # of the first `DIVERSE`


@dataclass(frozen=True)
class Judges:
    """Networks from folders that the user named; None where there is none."""

    features: VideoFeatures | None = None
    clip: clip_scorer.ClipScorer | None = None


def generate_clips(
    pipeline: "UniViGUPipeline", dataset: Dataset, prompts: Iterable[Prompt], judges: Judges, keep: Keep
) -> list[Generated]:
    """Each prompt's clip, measured and captioned; `keep` is given the clips that don't fail."""
    gate = load_gate({name: {"mode": "score"} for name in CHECKS}, Path())
    made = []
    for prompt in prompts:
        row = Generated(prompt)
        made.append(row)
        try:
            frames = pipeline.generate(prompt.text, seed=[prompt.seed])
            (row.caption,) = pipeline.caption([frames[0]], seed=[prompt.seed])
        except UniViGUError as error:
            row.failure = str(error)
            continue
        (finding,) = judge(frames, [{}], gate)
        row.measured = {name: finding.scores[key] for name, key in CHECKS.items()}
        if dataset.world:
            (row.seen,) = dataset.world.recognise(frames)
        if judges.features:
            row.features = judges.features.read(frames[0])
        if judges.clip:
            (row.embedded,) = judges.clip.videos(frames)
        row.frames = frames[0] if len(made) <= DIVERSE else None
        keep(prompt, frames[0])
    return made


def score_generation(
    pipeline: "UniViGUPipeline", dataset: Dataset, made: Sequence[Generated], judges: Judges, seed: int
) -> tuple[Scores, LeftOut]:
    """``facts`` by the recogniser, ``flicker``, ``motion``, ``diversity``, ``r_precision`` by CLIP, and ``fvd``."""
    good = [row for row in made if not row.failure]
    values = {name: [row.measured[name] for row in good] for name in CHECKS} | {"diversity": _distances(pipeline, good)}
    scores = {name: mean(found, seed) for name, found in values.items() if len(found) >= FEWEST}
    left_out = {name: "fewer than two clips were made" for name in values if name not in scores}
    if dataset.world:
        right = [score_item(dataset.world.asked(row.prompt.text), row.seen) for row in made]
        by_attribute = summarise(right, seed)
        scores = {"facts": by_attribute.pop("mean")} | scores
        scores |= {f"fact.{name}": score for name, score in by_attribute.items()}
    else:
        left_out["facts"] = "no independent recogniser knows this world; give --clip to judge the clips by CLIP"
    if judges.clip is None:
        left_out["r_precision"] = "no --clip was given: a folder of a CLIP model"
    else:
        prompts = [row.prompt.text for row in made]
        nearest = iter(judges.clip.nearest([row.embedded for row in good], prompts))
        scores["r_precision"] = share([not row.failure and next(nearest) == row.prompt.text for row in made])
    found = _fvd(dataset, good, judges.features)
    if isinstance(found, str):
        left_out["fvd"] = found
    else:
        scores["fvd"] = found
    return scores, left_out


def score_cycle(dataset: Dataset, made: Sequence[Generated], seed: int) -> Scores:
    """``cycle``: the share of what a prompt states that the caption of its clip states too.

    Of a known world these are facts; otherwise content words, as stems. A clip that failed states nothing.
    """
    if dataset.world:
        world = dataset.world
        rows = [score_item(world.asked(row.prompt.text), world.read_text(row.caption)) for row in made]
    else:
        rows = [
            {"content:" + claim: claim in read_text(row.caption) for claim in read_text(row.prompt.text)}
            for row in made
        ]
    return {"cycle": clustered_mean(rows, seed)} if any(rows) else {}


def score_joint(
    pipeline: "UniViGUPipeline", dataset: Dataset, prompts: Iterable[Prompt], seed: int
) -> tuple[Scores, list[Generated]]:
    """``agreement`` of a clip with the text made jointly with it, in what the prompt leaves open, and the samples.

    The clip is read by the world's recogniser. Without one, the text's content words are looked up in the caption that
    the model writes for the clip, prompt included, so the model judges itself.
    """
    rows, made = [], []
    for prompt in prompts:
        row = Generated(prompt)
        made.append(row)
        try:
            arguments = {"seed": [prompt.seed], "output_type": "uint8", "return_dict": False}
            frames, (row.caption,) = pipeline.joint(prompt.text, **arguments)
            if dataset.world:
                (row.seen,) = dataset.world.recognise(frames)
            else:
                (again,) = pipeline.caption([frames[0]], seed=[prompt.seed])
        except UniViGUError as error:
            row.failure = str(error)
            rows.append({"failed": False} if not dataset.world else dict.fromkeys(dataset.world.ATTRIBUTES, False))
            continue
        if dataset.world:
            open_to_it = dataset.world.left_open(prompt.text, row.seen)
            rows.append(score_item({name: row.seen[name] for name in open_to_it}, dataset.world.read_text(row.caption)))
        else:
            found = read_text(again)
            rows.append({"content:" + claim: claim in found for claim in read_text(row.caption)})
    return ({"agreement": clustered_mean(rows, seed)} if any(rows) else {}), made


def _distances(pipeline: "UniViGUPipeline", made: Sequence[Generated]) -> list[float]:
    """The mean absolute difference of pixels between clips and another one of their prompt, in grey levels.

    The other one is among `made`, or is generated from the next seed; a clip whose other one fails is left out.
    """
    import numpy as np

    first = [row for row in made if row.frames is not None]
    found = []
    for row in first:
        other = next((one.frames for one in first if one is not row and one.prompt.text == row.prompt.text), None)
        if other is None:
            try:
                (other,) = pipeline.generate(row.prompt.text, seed=[row.prompt.seed + 1])
            except UniViGUError:
                continue
        found.append(float(np.abs(row.frames.astype(np.float32) - other.astype(np.float32)).mean()))
    return found


def _fvd(dataset: Dataset, made: Sequence[Generated], features: VideoFeatures | None) -> dict[str, float | int] | str:
    """The Fréchet distance of the generated clips from the dataset's, as many of each; or why there is none."""
    import numpy as np

    if features is None:
        return "no --features was given: a folder of a video network such as VideoMAE"
    real = []
    for clip in dataset.clips[: len(made)]:
        try:
            real.append(features.read(clip.read()))
        except BadInputError:
            continue
    count = min(len(real), len(made))
    if count < 2:
        return "the data has too few clips to compare the generated ones with"
    theirs, ours = np.stack(real[:count]), np.stack([row.features for row in made[:count]])
    return jackknife(lambda chosen: frechet_distance(ours[chosen], theirs[chosen]), count)
