"""One evaluation: the samples of each task, their figures, and the report of both."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from components.evaluation.scorers import clip as clip_scorer
from components.evaluation.suite import generation
from components.evaluation.suite.captions import LeftOut, Scores, score_captions
from components.evaluation.suite.data import Clip, Dataset
from components.evaluation.suite.features import load_features
from components.pipeline.progress import progress
from univigu.errors import BadInputError, ConfigError, UniViGUError
from univigu.evaluation.intervals import mean, share

if TYPE_CHECKING:
    from torch import Tensor

    from univigu.evaluation.likelihood import Likelihood
    from univigu.pipeline import UniViGUPipeline

T = TypeVar("T")
TASKS = ("caption", "generate", "joint")
FEWEST = 2  # samples: one has no interval


@dataclass(frozen=True)
class Choice:
    """What to evaluate: the tasks (none: all that the data allows), how many samples of each, and with which judges."""

    tasks: Sequence[str] = ()
    count: int = 100
    seed: int = 0
    retrieval: int = 100  # clips among which each has to be found; 0: none
    embedder: Path | None = None
    features: Path | None = None
    clip: Path | None = None
    samples: Path | None = None  # where a benchmark's own files are written


@dataclass(frozen=True)
class Captioned:
    """One clip's caption, or its failure."""

    clip: Clip
    text: str | None = None
    failure: str = ""
    latents: "Tensor | None" = None
    likelihood: "Likelihood | None" = None


def choose_tasks(dataset: Dataset, asked: Sequence[str]) -> list[str]:
    """The tasks to evaluate, in their order; all that the dataset has samples for, if none is asked for.

    Raises `ConfigError` for an unknown task, and `BadInputError` for one without at least two samples.
    """
    counts = {"caption": len(dataset.clips), "generate": len(dataset.prompts), "joint": len(dataset.joint)}
    if unknown := [task for task in asked if task not in TASKS]:
        raise ConfigError(f"There is no task '{unknown[0]}'; choose from {', '.join(TASKS)}.")
    # a published benchmark is not one of the joint task, unless that is asked for
    offered = [task for task in TASKS if counts[task] and not (dataset.benchmark and task == "joint")]
    chosen = [task for task in TASKS if task in (asked or offered)]
    if not chosen:
        raise BadInputError(f"'{dataset.name}' has no clips and no prompts; there is nothing to evaluate on.")
    if few := [task for task in chosen if counts[task] < FEWEST]:
        raise BadInputError(
            f"'{dataset.name}' has {counts[few[0]]} samples for the task '{few[0]}', and an interval needs at least "
            f"{FEWEST}; give more, or leave the task out."
        )
    return chosen


def evaluate(pipeline: "UniViGUPipeline", dataset: Dataset, choice: Choice) -> dict[str, Any]:
    """The report: ``scores`` by task, what was ``left_out`` of each and why, ``failed`` samples, and all ``samples``.

    Each score is ``{value, low, high, n}`` with a 95 % interval. Raises the first failure where all samples of a task
    fail, and `BadInputError` as `choose_tasks` does.
    """
    tasks = choose_tasks(dataset, choice.tasks)
    dataset = dataset.first(choice.count)
    judges = generation.Judges(
        load_features(choice.features) if choice.features and "generate" in tasks else None,
        clip_scorer.load(choice.clip) if choice.clip and "generate" in tasks else None,
    )
    report: dict[str, Any] = {"scores": {}, "left_out": {}, "failed": [], "samples": [], "written": []}
    if "caption" in tasks:
        _evaluate_captions(pipeline, dataset, choice, report)
    made = None
    if "generate" in tasks or ("joint" in tasks and dataset.prompts):
        made = _generate(pipeline, dataset, judges, choice, report)
    if "generate" in tasks and made is not None:
        _add(report, "generate", *generation.score_generation(pipeline, dataset, made, judges, choice.seed))
    if "joint" in tasks:
        prompts = _shown(dataset.joint, "joint", "prompts")
        scores, jointly = generation.score_joint(pipeline, dataset, prompts, choice.seed)
        _note_generated(report, "joint", jointly)
        cycle = generation.score_cycle(dataset, made, choice.seed) if made else {}
        _add(report, "joint", cycle | scores, {})
    return report


def _evaluate_captions(pipeline: "UniViGUPipeline", dataset: Dataset, choice: Choice, report: dict[str, Any]) -> None:
    rows = _caption(pipeline, _shown(dataset.clips, "caption", "clips"), choice)
    _note(report, "caption", [(row.clip.id, row.text or "", row.failure) for row in rows])
    texts = [row.text for row in rows]
    scores, left_out = score_captions(dataset, dataset.clips, texts, choice.embedder, choice.seed)
    more, without = _score_likelihood(pipeline, rows, choice)
    _add(report, "caption", scores | more, left_out | without)
    if dataset.benchmark and choice.samples:
        report["written"].append(str(dataset.benchmark.save_captions(choice.samples, dataset.clips, texts)))


def _caption(pipeline: "UniViGUPipeline", clips: Iterable[Clip], choice: Choice) -> list[Captioned]:
    from univigu.evaluation.likelihood import encode_clip, measure_text

    likely = pipeline.transformer.config.prediction == "categorical"
    rows = []
    for number, clip in enumerate(clips):
        try:
            latents = encode_clip(pipeline, clip.read())
            (text,) = pipeline.caption_latents(latents, seed=[choice.seed + clip.seed])
        except UniViGUError as error:
            rows.append(Captioned(clip, failure=str(error)))
            continue
        found = measure_text(pipeline, latents, clip.references[0], number, choice.seed) if likely else None
        kept = latents if number < choice.retrieval else None
        rows.append(Captioned(clip, text, latents=kept, likelihood=found))
    return rows


def _score_likelihood(pipeline: "UniViGUPipeline", rows: Sequence[Captioned], choice: Choice) -> tuple[Scores, LeftOut]:
    """``token_accuracy`` (and by bin of tau), ``video_gain`` (the accuracy's, and the loss's in nats a token) and
    ``retrieval.*`` by likelihood.

    They are about the first reference of each clip, which the model reads; a clip that failed counts as 0.
    """
    import numpy as np

    from univigu.evaluation.likelihood import BINS, retrieve

    names = ("token_accuracy", "video_gain", "video_gain_nats", "retrieval.text_of_clip", "retrieval.clip_of_text")
    if pipeline.transformer.config.prediction != "categorical":
        kind = pipeline.transformer.config.prediction
        return {}, dict.fromkeys(names, f"the model's prediction is '{kind}', which gives no likelihood of a text")
    found = [row.likelihood for row in rows]
    accuracy = np.stack([one.accuracy if one else np.zeros(BINS) for one in found])
    without = np.stack([one.accuracy_without if one else np.zeros(BINS) for one in found])
    scores = {
        "token_accuracy": mean(accuracy.mean(1), choice.seed),
        "token_accuracy_without_video": mean(without.mean(1), choice.seed),
        "video_gain": mean((accuracy - without).mean(1), choice.seed),
        "video_gain_nats": mean([one.gain if one else 0.0 for one in found], choice.seed),
    }
    scores |= {f"token_accuracy.tau_{(at + 0.5) / BINS:.2f}": mean(accuracy[:, at], choice.seed) for at in range(BINS)}
    seen = [row for row in rows[: choice.retrieval] if row.latents is not None]
    if len(seen) < FEWEST:
        return scores, dict.fromkeys(names[3:], "fewer than two clips to find one among")
    latents = [row.latents for row in seen if row.latents is not None]
    ranked = retrieve(pipeline, latents, [row.clip.references[0] for row in seen], choice.seed)
    lost = [False] * (len(rows[: choice.retrieval]) - len(seen))  # a clip that failed finds nothing
    scores["retrieval.text_of_clip"] = share([*ranked.text_of_clip, *lost])
    scores["retrieval.clip_of_text"] = share([*ranked.clip_of_text, *lost])
    return scores, {}


def _generate(
    pipeline: "UniViGUPipeline", dataset: Dataset, judges: generation.Judges, choice: Choice, report: dict[str, Any]
) -> list[generation.Generated]:
    def keep(prompt: Any, frames: Any) -> None:
        if dataset.benchmark and choice.samples:
            dataset.benchmark.save_video(choice.samples, prompt, frames, pipeline.config.fps)

    prompts = _shown(dataset.prompts, "generate", "prompts")
    made = generation.generate_clips(pipeline, dataset, prompts, judges, keep)
    _note_generated(report, "generate", made)
    if dataset.benchmark and choice.samples:
        report["written"].append(str(choice.samples / dataset.benchmark.written))
    return made


def _note_generated(report: dict[str, Any], task: str, made: Sequence[generation.Generated]) -> None:
    _note(report, task, [(row.prompt.id, row.caption, row.failure) for row in made])


def _note(report: dict[str, Any], task: str, rows: Sequence[tuple[str, str, str]]) -> None:
    """Add samples to the report, with those that failed; raises the first failure if all did."""
    failed = [{"task": task, "id": name, "why": why} for name, _, why in rows if why]
    if len(failed) == len(rows):
        raise BadInputError(f"All {len(rows)} samples of the task '{task}' failed, the first so: {failed[0]['why']}")
    report["failed"] += failed
    report["samples"] += [{"task": task, "id": name, "text": text} for name, text, _ in rows]


def _add(report: dict[str, Any], task: str, scores: Scores, left_out: LeftOut) -> None:
    report["scores"][task] = scores
    if left_out:
        report["left_out"][task] = left_out


def _shown(items: Sequence[T], what: str, unit: str) -> Iterable[T]:
    return progress(items, what, unit=unit)
