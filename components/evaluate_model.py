"""Evaluate the trained model on what it has never seen: captions, generated videos, and both made jointly.

Which world it is measured in is one module, named in the profile (`benchmark`), which knows the held-out items, their
truth, and how a text and a video are read. Scoring is the library's. Nothing here depends on the clock or the batch.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from univigu.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from components.pipeline.runner import Step
    from univigu.pipeline import UniViGUPipeline

BENCHMARKS = {"digits": "components.digits.benchmark"}
KINDS = ("captions", "generations", "joint")  # the held-out items, and the profile's keys with how many of each
PAGE_SAMPLES = {"captions": 12, "generation": 9, "joint": 9}
SHEET_COLUMNS = 5
STEPS_TASK = re.compile(r"captions_in_(\d+)_steps")

Item = Mapping[str, Any]
Row = dict[str, Any]
Metrics = dict[str, dict[str, Any]]


def evaluate_model(step: "Step") -> None:
    """Held-out items -> ``metrics.json``, the table `items`, ``plots/``, ``report.html`` and ``gallery.webp``."""
    from components.training_figures import read_training

    settings = step["evaluate_model"]
    benchmark = load_benchmark(settings["benchmark"])
    heldout = benchmark.load_heldout(step.inputs["heldout"])
    chosen = {kind: first_items(heldout, kind, settings[kind]) for kind in KINDS}
    step.rows_in = sum(len(items) for items in chosen.values())
    step.facts |= {"benchmark": settings["benchmark"], "heldout_sha256": heldout["sha256"]}

    made, sampling = sample_everything(step, benchmark, chosen)
    rows = score_everything(benchmark, chosen, made)
    metrics = summarise_rows(rows, step["seed"])
    training = {name: read_training(step.inputs[name]) for name in ("stage1", "stage2")}
    metrics |= {name: figures["summary"] for name, figures in training.items() if figures["summary"]}

    step.write("items", rows)
    text = json.dumps(metrics, indent=1, sort_keys=True)
    (step.out / "metrics.json").write_text(text + "\n", encoding="utf-8")
    write_plots(step.out / "plots", metrics, training)
    write_page(step, benchmark, heldout, metrics, rows, made, training, page_notes(settings, sampling, metrics))


def load_benchmark(name: str) -> ModuleType:
    """The module that knows a world; raises `ConfigError` for a name that is not in `BENCHMARKS`."""
    if name not in BENCHMARKS:
        raise ConfigError(f"There is no benchmark '{name}'; choose one of {', '.join(BENCHMARKS)}.")
    return import_module(BENCHMARKS[name])


def first_items(heldout: Mapping[str, Any], kind: str, count: int) -> list[Item]:
    """The first `count` held-out items of a kind; raises `ConfigError` for none, and for more than there are."""
    if not 1 <= count <= len(heldout[kind]):
        raise ConfigError(
            f"The profile asks for {count} held-out items of '{kind}', and there are {len(heldout[kind])}; "
            "choose a number from 1 to that."
        )
    return heldout[kind][:count]


# --- samples ---------------------------------------------------------------------------------------------------------


def sample_everything(
    step: "Step", benchmark: ModuleType, chosen: Mapping[str, Sequence[Item]]
) -> tuple[dict[str, dict[str, Any]], Mapping[str, Any]]:
    """What the model and the base make of the held-out items, by task: ``frames`` (B, F, H, W, 3) and ``texts``.

    The model samples as it does by default; those settings come second.
    """
    import numpy as np
    import torch

    from components.generator import load_generator
    from univigu.pipeline import UniViGUPipeline

    settings = step["evaluate_model"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = UniViGUPipeline.from_pretrained(step.inputs["stage2"] / "model").to(device)
    pipeline.set_progress_bar_config(disable=True)
    base = load_generator(step.inputs["base"], "fp32")
    compared, video_steps = settings["compared_caption_steps"], pipeline.config.num_inference_steps
    makers: dict[str, tuple[str, Callable[[Sequence[Item]], dict[str, Any]]]] = {
        "captions": ("captions", lambda items: caption_clips(pipeline, benchmark.render(items), items, compared)),
        "generation": ("generations", lambda items: generate_clips(pipeline, items, step["video"])),
        "generation_base": ("generations", lambda items: generate_with_base(base, items, step, video_steps)),
        "joint": ("joint", lambda items: make_jointly(pipeline, items, step["video"])),
    }
    size = settings["batch_size"]
    work = [
        (task, chosen[kind][start : start + size])
        for task, (kind, _) in makers.items()
        for start in range(0, len(chosen[kind]), size)
    ]
    parts: dict[str, list[dict[str, Any]]] = {}
    for task, items in step.progress(work, unit="batches"):
        parts.setdefault(task, []).append(makers[task][1](items))
    made = {
        task: {
            name: np.concatenate([part[name] for part in batches])
            if name == "frames"
            else [text for part in batches for text in part[name]]
            for name in batches[0]
        }
        for task, batches in parts.items()
    }
    return made, pipeline.config


def caption_clips(
    pipeline: "UniViGUPipeline", frames: "np.ndarray", items: Sequence[Item], compared_steps: Sequence[int]
) -> dict[str, Any]:
    """Captions of clips, the same in other numbers of steps, and what the model says when it sees nothing of them."""
    import torch

    from univigu import wan

    latents = wan.encode_frames(pipeline.vae, torch.from_numpy(frames))
    seeds = [item["seed"] for item in items]
    texts = pipeline.caption_latents(latents, seed=seeds)
    return {
        "frames": frames,
        "texts": texts,
        "texts_without_video": pipeline.caption_latents(latents, seed=seeds, video_tau=0.0),
        **{
            f"texts_in_{n}_steps": texts
            if n == pipeline.config.caption_steps
            else pipeline.caption_latents(latents, n, seed=seeds)
            for n in compared_steps
        },
    }


def generate_clips(pipeline: "UniViGUPipeline", items: Sequence[Item], video: Mapping[str, Any]) -> dict[str, Any]:
    """This model's clips for the items' prompts."""
    prompts = [item["prompt"] for item in items]
    return {"frames": pipeline.generate(prompts, **_video_arguments(items, video))}


def make_jointly(pipeline: "UniViGUPipeline", items: Sequence[Item], video: Mapping[str, Any]) -> dict[str, Any]:
    """Clips and captions made together from the items' prompts."""
    prompts = [item["prompt"] for item in items]
    frames, texts = pipeline.joint(prompts, **_video_arguments(items, video))
    return {"frames": frames, "texts": texts}


def _video_arguments(items: Sequence[Item], video: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_frames": video["frames"],
        "height": video["height"],
        "width": video["width"],
        "seed": [item["seed"] for item in items],
        "batch_size": len(items),
    }


def generate_with_base(base: Any, items: Sequence[Item], step: "Step", video_steps: int) -> dict[str, Any]:
    """The base generator's clips for the same prompts and seeds in as many steps, by diffusers' own pipeline."""
    import numpy as np

    from components.generator import generate

    sampling = {
        "steps": video_steps,
        "guidance_scale": step["evaluate_model"]["base_guidance"],
        "arguments": {"max_sequence_length": step["text"]["prompt_length"]},
    }
    videos = generate(base, items, step["video"], sampling)
    return {"frames": (np.nan_to_num(videos) * 255).round().clip(0, 255).astype(np.uint8)}


# --- scores ----------------------------------------------------------------------------------------------------------


def score_everything(
    benchmark: ModuleType, chosen: Mapping[str, Sequence[Item]], made: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    """A row for each task and item: what is true or asked (`truth`), said or seen (`found`), and right (`correct`)."""
    from univigu.evaluation.claims import majority_values

    rows: list[Row] = []
    truths = [benchmark.truth(item) for item in chosen["captions"]]
    majority = majority_values(truths)
    seen = benchmark.recognise(made["captions"]["frames"])
    for index, (item, truth) in enumerate(zip(chosen["captions"], truths, strict=True)):
        for name in made["captions"]:
            if name != "frames":
                text = made["captions"][name][index]
                task = name.replace("texts", "captions", 1)
                rows.append(make_row(task, item, truth, benchmark.read_text(text), text))
        rows.append(make_row("majority", item, truth, majority))
        rows.append(make_row("recogniser", item, truth, seen[index]))
    for task in ("generation", "generation_base"):
        for item, found in zip(chosen["generations"], benchmark.recognise(made[task]["frames"]), strict=True):
            rows.append(make_row(task, item, benchmark.asked(item["prompt"]), found))
    texts = made["joint"]["texts"]
    others = texts[len(texts) // 2 :] + texts[: len(texts) // 2]
    seen = benchmark.recognise(made["joint"]["frames"])
    for item, video, text, other in zip(chosen["joint"], seen, texts, others, strict=True):
        rows.append(make_joint_row("joint", benchmark, item, video, text))
        rows.append(make_joint_row("joint_shuffled", benchmark, item, video, other))
        if asked := benchmark.asked(item["prompt"]):
            rows.append(make_row("joint_video", item, asked, video))
            rows.append(make_row("joint_text", item, asked, benchmark.read_text(text), text))
    return rows


def make_row(task: str, item: Item, truth: Mapping[str, str], found: Mapping[str, str], text: str | None = None) -> Row:
    """A row of the table `items`; `found` is kept only on the attributes that are scored."""
    from univigu.evaluation.claims import score_item

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
    """A row of the table `items` for a video and a text: both are found, and right is where they agree.

    Only the attributes that the prompt leaves open are scored, and there is no truth about those.
    """
    from univigu.evaluation.claims import score_item

    left_open, said = benchmark.left_open(item["prompt"]), benchmark.read_text(text)
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
    """Scores of each task's rows, by attribute and over all of them; `joint` calls the latter ``agreement``.

    ``joint_video`` and ``joint_text`` are held against what the prompt states; ``caption_steps`` has the mean of the
    captions by the number of Euler steps that they were made in.
    """
    from univigu.evaluation.claims import summarise

    correct: dict[str, list[dict[str, bool]]] = {}
    for row in rows:
        correct.setdefault(row["task"], []).append(json.loads(row["correct"]))
    metrics = {task: summarise(items, seed) for task, items in correct.items()}
    metrics["joint"]["agreement"] = metrics["joint"].pop("mean")
    metrics["joint"]["agreement_shuffled"] = metrics.pop("joint_shuffled")["mean"]
    compared = [(task, match[1]) for task in correct if (match := STEPS_TASK.fullmatch(task))]
    metrics["caption_steps"] = {steps: metrics.pop(task)["mean"] for task, steps in compared}
    return metrics


# --- what is left behind ----------------------------------------------------------------------------------------------


def write_plots(folder: Path, metrics: Metrics, training: Mapping[str, Mapping[str, Any]]) -> None:
    """CSV files for ``dvc plots``: accuracy by attribute, loss curves, and held-out losses by bin of tau."""
    folder.mkdir()
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
    """``report.html``, and ``gallery.webp`` with the same first samples for a README."""
    from components import report
    from components.pipeline.runner import MANIFEST
    from components.training_figures import training_charts

    settings, digests = step["evaluate_model"], step.input_digests
    by_task = {task: [row for row in rows if row["task"] == task] for task in PAGE_SAMPLES}

    def samples(task: str, clips: Mapping[str, str]) -> list[dict[str, Any]]:
        return [
            report.clip_sample(
                {label: made[source]["frames"][index] for label, source in clips.items()},
                benchmark.FPS,
                **shown_claims(row),
                prompt=row["prompt"],
                text=row["text"],
            )
            for index, row in enumerate(by_task[task][: PAGE_SAMPLES[task]])
        ]

    inputs = ("prompts", "checked_prompts", "clips", "checked_clips", "captions", "pairs")
    manifests = {name: json.loads((step.inputs[name] / MANIFEST).read_text(encoding="utf-8")) for name in inputs}
    page = report.render_report(
        about={
            "Model": digests["stage2"][:12],
            "Base": f"{step.inputs['base'].name} {digests['base'][:12]}",
            "Training pairs": digests["pairs"][:12],
            "Held-out set": f"{settings['benchmark']} {heldout['sha256'][:12]}",
        },
        scores=metrics,
        attributes=benchmark.ATTRIBUTES,
        samples={
            "captions": samples("captions", {"held-out clip": "captions"}),
            "generation": samples("generation", {"this model": "generation", "its base": "generation_base"}),
            "joint": samples("joint", {"video": "joint"}),
        },
        charts=training_charts(training) | {"captions": caption_steps_charts(metrics["caption_steps"])},
        funnel=report.funnel_steps(list(manifests.values())),
        rejected=report.rejected_examples(
            {manifest["step"]: step.read(name, "rejected").to_pylist() for name, manifest in manifests.items()}
        ),
        notes=notes,
    )
    (step.out / "report.html").write_text(page, encoding="utf-8")
    sheet = {
        "Captions of clips that training never saw": ("captions", "text"),
        "Videos generated from a prompt": ("generation", "prompt"),
        "Video and caption made together": ("joint", "text"),
    }
    groups = {
        title: [
            (frames, row[key]) for frames, row in zip(made[task]["frames"][:SHEET_COLUMNS], by_task[task], strict=False)
        ]
        for title, (task, key) in sheet.items()
    }
    (step.out / "gallery.webp").write_bytes(report.contact_sheet(groups, benchmark.FPS))


def shown_claims(row: Row) -> dict[str, dict[str, Any]]:
    """What the page's chips show of a row: the ``truth`` (a joint row's: its video), the ``found``, the ``correct``."""
    truth, found, correct = (json.loads(row[key]) for key in ("truth", "found", "correct"))
    if row["task"] == "joint":
        truth = {name: both["video"] for name, both in found.items()}
        found = {name: both["text"] for name, both in found.items()}
    return {"truth": truth, "found": found, "correct": correct}


def caption_steps_charts(scores: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How right captions are by the number of Euler steps that they are made in; no chart of fewer than two."""
    from components.report import line_chart

    points = sorted((int(steps), score["value"]) for steps, score in scores.items())
    return [line_chart("Mean over attributes", "steps", {"captions": points})] if len(points) > 1 else []


def page_notes(settings: Mapping[str, Any], sampling: Mapping[str, Any], metrics: Metrics) -> list[str]:
    """How the scores came about, in the page's words."""
    return [
        f"Captions: {metrics['captions']['mean']['n']} clips rendered from handwriting that no model was trained on; "
        f"Euler steps: {sampling['caption_steps']}; guidance {sampling['caption_guidance_scale']:g}, temperature "
        f"{sampling['caption_temperature']:g}.",
        "Without the video: the same model, clips, noise and settings, with the video replaced by noise. Commonest "
        "value: what is right most often when it is said of every clip.",
        f"Generated videos: {metrics['generation']['mean']['n']} prompts that state every attribute; "
        f"{sampling['num_inference_steps']} steps, guidance {sampling['guidance_scale']:g} for this model and "
        f"{settings['base_guidance']:g} for its base. "
        "What a video shows is read by the recogniser, a network that has no part in the training captions. Its "
        "own accuracy is measured on clips rendered from a known truth; generated clips are less clean, and it may err "
        "more often on those.",
        f"Joint: {metrics['joint']['agreement']['n']} prompts that leave attributes open. What the recogniser sees in "
        "the video is compared with what the caption says, on those attributes alone. The text is written when the "
        f"video is at {sampling['joint_text_at']:g} of its way, and the rest of the video follows it.",
        "Intervals: Wilson's for one attribute; for means over attributes a bootstrap over items, because the claims "
        "about one clip go together.",
    ]
