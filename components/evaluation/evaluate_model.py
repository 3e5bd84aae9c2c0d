"""The step evaluate-model: scores on held-out captions, generated videos, and videos and captions generated jointly.

The profile's `benchmark` names a module that knows the dataset: its held-out items, the truth about them, and how to
read a text and a video. `samples` runs the model and its base; the library computes the scores. Nothing here depends on
the clock or on the batch size.
"""

import json
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from components.evaluation import report
from components.evaluation.confusion import count_confusions, stated_values
from components.evaluation.report import line_chart
from components.evaluation.samples import PAGE_SAMPLES, SCORED_BY_MODELS, Item, sample_everything
from components.evaluation.training_curves import read_training, training_charts
from components.pipeline.manifests import MANIFEST
from univigu.confidence_reference import write_reference
from univigu.errors import ConfigError
from univigu.evaluation.claims import score_item, summarise

if TYPE_CHECKING:
    from components.pipeline.step import Step

BENCHMARKS = {
    "digits": "components.digits.benchmark",
    "pairs": "components.evaluation.pairs",
    "stories": "components.digits.stories.benchmark",
}
DATA = ("prompts", "checked_prompts", "clips", "checked_clips", "captions", "pairs")  # inputs, in the data's order
KINDS = ("captions", "generations", "joint")  # of held-out items; also the profile's keys for their numbers
SHEET_COLUMNS = 5
WORST = 6  # captions with the most mistakes on the page
HEADLINES = {  # names in metrics.json, short because each is the head of a column of `dvc exp show`
    "captions": ("captions", "mean"),
    "blind": ("captions_without_video", "mean"),
    "videos": ("generation", "mean"),
    "joint": ("joint", "agreement"),
    "gain": ("stage2", "video_gain"),
}
STEPS_TASK = re.compile(r"captions_in_(\d+)_steps")

Row = dict[str, Any]
Metrics = dict[str, dict[str, Any]]


def evaluate_model(step: "Step") -> None:
    """Held-out items -> ``scores.json``, the table `items`, ``plots/``, ``report.html`` and ``gallery.webp``.

    ``metrics.json`` has the few of the scores that DVC shows, ``confidence.json`` what `univigu caption` compares with.
    """
    name = step.settings.evaluate_model.benchmark
    benchmark = load_benchmark(name)
    heldout = benchmark.open_heldout(step)
    chosen = {kind: heldout[kind] for kind in KINDS}
    step.rows_in = sum(len(items) for items in chosen.values())
    step.facts |= {"benchmark": name, "heldout_sha256": heldout["sha256"]}

    made, sampling = sample_everything(step, benchmark, chosen)
    rows = score_everything(benchmark, chosen, made)
    metrics = summarise_rows(rows, step.settings.seed)
    training = {name: read_training(step.inputs[name]) for name in ("stage1", "stage2")}
    metrics |= {name: figures["summary"] for name, figures in training.items() if figures["summary"]}

    step.write("items", rows)
    write_reference(step.out, made["captions"]["measures"])
    for name, content in (("scores.json", metrics), ("metrics.json", headlines(metrics, benchmark.ATTRIBUTES[0]))):
        text = json.dumps(content, indent=1, sort_keys=True)
        (step.out / name).write_text(text + "\n", encoding="utf-8")
    funnel = report.funnel_steps([read_record(step.inputs[name]) for name in DATA])
    write_plots(step.out / "plots", metrics, training, stated_values(rows, benchmark.ATTRIBUTES[0]), funnel)
    notes = page_notes(step, benchmark, sampling, metrics)
    write_page(step, benchmark, heldout, metrics, rows, made, training, notes)
    write_gallery(step, rows, made)


def load_benchmark(name: str) -> ModuleType:
    """The benchmark's module; raises `ConfigError` for a name that is not in `BENCHMARKS`."""
    if name not in BENCHMARKS:
        raise ConfigError(f"There is no benchmark '{name}'; choose one of {', '.join(BENCHMARKS)}.")
    return import_module(BENCHMARKS[name])


# --- scores ----------------------------------------------------------------------------------------------------------


def score_everything(
    benchmark: ModuleType, chosen: Mapping[str, Sequence[Item]], made: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    """A row per task and item: the true or requested values (`truth`), those `found`, and which are `correct`."""
    rows: list[Row] = []
    truths = [benchmark.truth(item) for item in chosen["captions"]]
    majority = benchmark.majority(truths)
    for index, (item, truth) in enumerate(zip(chosen["captions"], truths, strict=True)):
        for name in made["captions"]:
            if name.startswith("texts"):
                text = made["captions"][name][index]
                task = name.replace("texts", "captions", 1)
                rows.append(make_row(task, item, truth, benchmark.read_text(text), text))
        rows.append(make_row("majority", item, truth, majority))
        if benchmark.HAS_RECOGNISER:
            rows.append(make_row("recogniser", item, truth, made["captions"]["seen"][index]))
    for task in SCORED_BY_MODELS:
        for item, found in zip(chosen["generations"], made[task]["seen"], strict=True):
            rows.append(make_row(task, item, benchmark.asked(item["prompt"]), found))
        for name, nearest in made[task].items():
            if name.startswith("nearest by "):
                scored = f"{task}_{name.removeprefix('nearest by ')}"
                for item, prompt in zip(chosen["generations"], nearest, strict=True):
                    rows.append(make_row(scored, item, {"retrieval": item["prompt"]}, {"retrieval": prompt}))
    texts = made["joint"]["texts"]
    others = texts[len(texts) // 2 :] + texts[: len(texts) // 2]
    for item, video, text, other in zip(chosen["joint"], made["joint"]["seen"], texts, others, strict=True):
        rows.append(make_joint_row("joint", benchmark, item, video, text))
        rows.append(make_joint_row("joint_shuffled", benchmark, item, video, other))
        if asked := benchmark.asked(item["prompt"]):
            rows.append(make_row("joint_video", item, asked, video))
            rows.append(make_row("joint_text", item, asked, benchmark.read_text(text), text))
    return rows


def make_row(task: str, item: Item, truth: Mapping[str, str], found: Mapping[str, str], text: str | None = None) -> Row:
    """A row of the table `items`; `found` is reduced to the attributes that are scored."""
    found = {name: found[name] for name in truth if name in found}
    return {
        "task": task,
        "clip_id": item["id"],
        "prompt": item.get("prompt"),
        "text": text,
        "truth": json.dumps(truth),
        "found": json.dumps(found),
        "correct": json.dumps(score_item(truth, found)),
        "open_attributes": [],
    }


def make_joint_row(task: str, benchmark: ModuleType, item: Item, video: Mapping[str, str], text: str) -> Row:
    """A row of the table `items` for a video and its text: an attribute is correct if both have the same value.

    Only the attributes that the prompt leaves open are scored; there is no truth about them.
    """
    left_open, said = benchmark.left_open(item["prompt"], video), benchmark.read_text(text)
    seen = {name: video[name] for name in left_open}
    return {
        "task": task,
        "clip_id": item["id"],
        "prompt": item["prompt"],
        "text": text,
        "truth": "{}",
        "found": json.dumps({name: {"video": seen[name], "text": said.get(name)} for name in left_open}),
        "correct": json.dumps(score_item(seen, said)),
        "open_attributes": left_open,
    }


def summarise_rows(rows: Sequence[Row], seed: int) -> Metrics:
    """The scores of each task's rows, by attribute and over all attributes; the latter is ``agreement`` for `joint`.

    ``joint_video`` and ``joint_text`` are compared with the values that the prompt states; ``caption_steps`` has the
    mean score of captions by their number of Euler steps.
    """
    correct: dict[str, list[dict[str, bool]]] = {}
    for row in rows:
        correct.setdefault(row["task"], []).append(json.loads(row["correct"]))
    metrics = {task: summarise(items, seed) for task, items in correct.items()}
    metrics["joint"]["agreement"] = metrics["joint"].pop("mean")
    metrics["joint"]["agreement_shuffled"] = metrics.pop("joint_shuffled")["mean"]
    compared = [(task, match[1]) for task in correct if (match := STEPS_TASK.fullmatch(task))]
    metrics["caption_steps"] = {steps: metrics.pop(task)["mean"] for task, steps in compared}
    return metrics


def headlines(metrics: Metrics, attribute: str) -> dict[str, float]:
    """The values of `HEADLINES`, and of one attribute of captions under its name, rounded to three digits.

    ``dvc exp show`` needs three characters beside each column: these six are what fits 100 characters with an
    experiment's name and its date, and none is also a name in ``params.yaml``, which would add the path of the file
    (DVC 3.67, dvc/commands/experiments/show.py, dvc/repo/experiments/show.py).
    """
    found: dict[str, float] = {}
    for name, (task, key) in {**HEADLINES, attribute: ("captions", attribute)}.items():
        score = metrics.get(task, {}).get(key)
        value = score["value"] if isinstance(score, dict) else score
        if value is not None:
            found[name] = round(value, 3)
    return found


# --- outputs ----------------------------------------------------------------------------------------------------------


def write_plots(
    folder: Path,
    metrics: Metrics,
    training: Mapping[str, Mapping[str, Any]],
    stated: Sequence[tuple[str, str]],
    funnel: Sequence[Mapping[str, Any]],
) -> None:
    """CSV files for ``dvc plots``: scores by attribute, loss curves, held-out losses by bin of tau, and confusions.

    ``funnel.csv`` has the rows in and out of each step of the data, for people who look in MLflow.
    """
    folder.mkdir()
    _write_csv(folder / "funnel.csv", [funnel_row(step) for step in funnel])
    if stated:
        _write_csv(folder / "confusion.csv", [{"true": truth, "stated": said} for truth, said in stated])
    scores = [
        {"score": group, "attribute": name, **score}
        for group, by_name in metrics.items()
        for name, score in by_name.items()
        if isinstance(score, dict)
    ]
    _write_csv(folder / "scores.csv", scores)
    for stage, figures in training.items():
        if figures["curves"]:
            _write_csv(folder / f"{stage}_curves.csv", _by_row(figures["curves"]))
        columns = {name: values for name, values in figures["heldout"].items() if isinstance(values, list)}
        if columns:
            _write_csv(folder / f"{stage}_heldout.csv", _by_row(columns))


def funnel_row(step: Mapping[str, Any]) -> dict[str, Any]:
    """A row of ``funnel.csv`` from a step of `report.funnel_steps`."""
    reasons = "; ".join(f"{reason} {count}" for reason, count in step["reasons"])
    return {key: step[key] for key in ("name", "rows_in", "rows_out", "quarantined")} | {"reasons": reasons}


def read_record(folder: Path) -> dict[str, Any]:
    """The manifest of an earlier step's output."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _by_row(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import csv

    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_page(
    step: "Step",
    benchmark: ModuleType,
    heldout: Mapping[str, Any],
    metrics: Metrics,
    rows: Sequence[Row],
    made: Mapping[str, Mapping[str, Any]],
    training: Mapping[str, Mapping[str, Any]],
    notes: Sequence[str],
) -> None:
    """Write ``report.html``."""
    digests = step.input_digests

    def samples(task: str, clips: Mapping[str, str]) -> list[dict[str, Any]]:
        return [
            report.clip_sample(
                {label: made[source]["previews"][index] for label, source in clips.items()},
                **shown_claims(row),
                prompt=row["prompt"],
                text=row["text"],
            )
            for index, row in enumerate(_rows_of(task, rows)[: PAGE_SAMPLES[task]])
        ]

    manifests = {name: read_record(step.inputs[name]) for name in DATA}
    page = report.render_report(
        about={
            "Model": digests["stage2"][:12],
            "Base": f"{step.inputs['base'].name} {digests['base'][:12]}",
            "Training pairs": digests["pairs"][:12],
            "Held-out set": f"{step.settings.evaluate_model.benchmark} {heldout['sha256'][:12]}",
        },
        scores=metrics,
        attributes=benchmark.ATTRIBUTES,
        samples={
            "captions": samples("captions", {"held-out clip": "captions"}),
            "worst": worst_captions(step, benchmark, heldout["captions"], rows),
            "generation": samples("generation", {"this model": "generation", "its base": "generation_base"}),
            "joint": samples("joint", {"video": "joint"}),
        },
        charts=training_charts(training) | {"captions": caption_steps_charts(metrics["caption_steps"])},
        funnel=report.funnel_steps(list(manifests.values())),
        rejected=report.rejected_examples(
            {manifest["step"]: step.read(name, "rejected").to_pylist() for name, manifest in manifests.items()}
        ),
        notes=notes,
        confusion=count_confusions(rows, benchmark.ATTRIBUTES[0]),
    )
    (step.out / "report.html").write_text(page, encoding="utf-8")


def worst_captions(
    step: "Step", benchmark: ModuleType, items: Sequence[Item], rows: Sequence[Row]
) -> list[dict[str, Any]]:
    """The captions with the most mistakes, beside their clips; none if all are right."""
    ranked = sorted(zip(items, _rows_of("captions", rows), strict=True), key=lambda pair: -count_mistakes(pair[1]))
    worst = [(item, row) for item, row in ranked[:WORST] if count_mistakes(row)]
    if not worst:
        return []
    clips = benchmark.render([item for item, _ in worst], step.inputs["clips"])
    return [
        report.clip_sample(
            {"held-out clip": report.preview(clip, step.settings.video.fps)},
            **shown_claims(row),
            prompt=row["prompt"],
            text=row["text"],
        )
        for clip, (_, row) in zip(clips, worst, strict=True)
    ]


def count_mistakes(row: Row) -> int:
    """How many attributes of a row are wrong."""
    return sum(not right for right in json.loads(row["correct"]).values())


def write_gallery(step: "Step", rows: Sequence[Row], made: Mapping[str, Mapping[str, Any]]) -> None:
    """Write ``gallery.webp``, the first samples of the page as a picture for a README."""
    sheet = {
        "Captions of held-out clips": ("captions", "text"),
        "Videos generated from a prompt": ("generation", "prompt"),
        "Video and caption generated jointly": ("joint", "text"),
    }
    groups = {
        title: [
            report.Card(clip, row[key], [name for name, right in json.loads(row["correct"]).items() if not right])
            for clip, row in zip(made[task]["previews"][:SHEET_COLUMNS], _rows_of(task, rows), strict=False)
        ]
        for title, (task, key) in sheet.items()
    }
    (step.out / "gallery.webp").write_bytes(report.contact_sheet(groups))


def _rows_of(task: str, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["task"] == task]


def shown_claims(row: Row) -> dict[str, dict[str, Any]]:
    """The values of a row that the page shows: ``truth`` (for a joint row, its video's), ``found`` and ``correct``."""
    truth, found, correct = (json.loads(row[key]) for key in ("truth", "found", "correct"))
    if row["task"] == "joint":
        truth = {name: both["video"] for name, both in found.items()}
        found = {name: both["text"] for name, both in found.items()}
    return {"truth": truth, "found": found, "correct": correct}


def caption_steps_charts(scores: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The chart of the captions' score by their number of Euler steps; none if there are fewer than two points."""
    points = sorted((int(steps), score["value"]) for steps, score in scores.items())
    return [line_chart("Mean over attributes", "steps", {"captions": points})] if len(points) > 1 else []


def describe_joint(sampling: Mapping[str, Any]) -> str:
    """How a model with these sampling settings makes joint samples, as a sentence."""
    if not (part := sampling.get("joint_in_step", 0.0)):  # a model from before has none
        at = sampling["joint_text_at"]
        return f"The text is written when the video is at time τ = {at:g}; the rest of the video is conditioned on it."
    start = sampling["joint_text_at"] * (1 - part)
    return (
        f"Text and video are denoised together while the video's time τ goes from {start:g} to {start + part:g} (eq "
        f"18), the text's times with a shift of {sampling['joint_text_shift']:g}. From the text's τ = "
        f"{sampling['joint_prompt_until']:g} on, the video is conditioned on it."
    )


def page_notes(step: "Step", benchmark: ModuleType, sampling: Mapping[str, Any], metrics: Metrics) -> list[str]:
    """The page's notes on how the scores were measured."""
    words, settings = benchmark.WORDS, step.settings.evaluate_model
    return [
        f"Captions: {metrics['captions']['mean']['n']} {words['captions']}. They are sampled in "
        f"{sampling['caption_steps']} Euler steps, with guidance {sampling['caption_guidance_scale']:g} and "
        f"temperature {sampling['caption_temperature']:g}.",
        "Without the video: the same model, clips, noise and settings, but with noise in place of the video. Most "
        f"common value: {words['majority']}",
        f"Generated videos: {metrics['generation']['mean']['n']} {words['generation']}. This model uses "
        f"{sampling['num_inference_steps']} steps with guidance {sampling['guidance_scale']:g}, its base "
        f"{settings.base_steps} steps with guidance {settings.base_guidance:g}. {words['reader']}",
        f"Joint: {metrics['joint']['agreement']['n']} {words['joint']} {describe_joint(sampling)}",
        "Intervals: Wilson intervals for single attributes. For means over attributes, a bootstrap over items, because "
        "the claims about one clip are correlated.",
    ]
