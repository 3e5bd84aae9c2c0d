"""Samples of an arm that the study's page shows: the best and the worst of its evaluation, as H.264 files.

Clips of captions are the held-out ones, with the caption of the evaluation. Generated videos and joint pairs are made
again from their prompts and seeds, because the evaluation keeps no clips, and read and scored again.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from components.bench.study.arms import STEPS
from components.evaluation.evaluate_model import load_benchmark, make_joint_row, make_row, shown_claims
from components.evaluation.samples import generate_clips, sample_jointly
from components.pipeline.manifests import read_manifest
from components.pipeline.stages import find_stage
from components.pipeline.tables import read_table
from univigu.errors import BadInputError
from univigu.files import read_json_object, write_json

if TYPE_CHECKING:
    import numpy as np

    from components.pipeline.step import Step
    from univigu.pipeline import UniViGUPipeline

HOME, INDEX = Path("probes/gallery"), "gallery.json"  # in the work root of an arm
OF_EACH = {"captions": 6, "generation": 4, "joint": 4}  # best, and as many worst

Row = dict[str, Any]


def make_gallery(pipeline: "UniViGUPipeline", step: "Step") -> None:
    """Write the best and worst samples of each task, and ``gallery.json`` with their texts and claims."""
    from univigu.video import encode_mp4

    name, video = step.settings.evaluate_model.benchmark, step.settings.video
    benchmark = load_benchmark(name)
    heldout = benchmark.open_heldout(step)
    size = (video.frames, video.height, video.width)
    chosen = choose(read_table(step.previous, "items").to_pylist())
    folder = step.root / HOME
    folder.mkdir(parents=True, exist_ok=True)
    shown: list[Row] = []
    for task, kind in (("captions", "captions"), ("generation", "generations"), ("joint", "joint")):
        by_id = {item["id"]: item for item in heldout[kind]}
        picked = [(rank, row) for rank, row in chosen.get(task, []) if row["clip_id"] in by_id]
        items = [by_id[row["clip_id"]] for _, row in picked]
        if not items:
            continue
        rows, clips = _samples(task, pipeline, benchmark, items, [row for _, row in picked], step.inputs["clips"], size)
        for (rank, _), item, row, clip in zip(picked, items, rows, clips, strict=True):
            file = f"{task}-{len(shown):02d}.mp4"
            (folder / file).write_bytes(encode_mp4(clip, video.fps, _pixel_format(clip)))
            true = true_caption(name, item) if task == "captions" else ""
            facts = {"task": task, "rank": rank, "file": file, "id": row["clip_id"], "true": true}
            shown.append({**facts, "prompt": row["prompt"], "text": row["text"], **shown_claims(row)})
    write_json(folder / INDEX, {"evaluation": _evaluation(step.root), "samples": shown})


def read_gallery(folder: Path) -> list[Row]:
    """The samples of an arm's work root, each with the ``content`` of its video; [] without those of its evaluation."""
    try:
        index = read_json_object(folder / HOME / INDEX)
        shown = index["samples"] if index["evaluation"] == _evaluation(folder) else []
        return [{**row, "content": (folder / HOME / Path(row["file"]).name).read_bytes()} for row in shown]
    except (OSError, ValueError, KeyError, BadInputError):
        return []


def _evaluation(folder: Path) -> str:
    """The digest of an arm's evaluation; raises `BadInputError` without one."""
    return read_manifest(folder / find_stage(STEPS[-1]).home, STEPS[-1])["digest"]


def choose(rows: Sequence[Row]) -> dict[str, list[tuple[str, Row]]]:
    """The best and worst rows of each task in the table `items`, with their rank; a row is only one of both."""
    chosen: dict[str, list[tuple[str, Row]]] = {}
    for task, count in OF_EACH.items():
        scored = [row for row in rows if row["task"] == task and json.loads(row["correct"])]
        ranked = sorted(scored, key=share_right)  # stable: of equals, the first in the held-out set
        worst = ranked[:count]
        best = [row for row in sorted(scored, key=lambda row: -share_right(row)) if row not in worst][:count]
        chosen[task] = [*(("best", row) for row in best), *(("worst", row) for row in worst)]
    return chosen


def share_right(row: Row) -> float:
    """The share of a row's claims that are correct."""
    correct = json.loads(row["correct"]).values()
    return sum(correct) / len(correct)


def true_caption(benchmark: str, item: Mapping[str, Any]) -> str:
    """A caption of a held-out clip that is true; "" where the benchmark has none."""
    if benchmark == "digits":
        from components.digits.evaluation import references

        return references(item)[0]
    return str(item.get("caption") or item.get("text") or "")


def _samples(
    task: str,
    pipeline: "UniViGUPipeline",
    benchmark: ModuleType,
    items: Sequence[Mapping[str, Any]],
    evaluated: Sequence[Row],
    clips: Path,
    size: tuple[int, int, int],
) -> tuple[Sequence[Row], "Sequence[np.ndarray]"]:
    """The rows and clips of a task's items."""
    if task == "captions":
        return evaluated, list(benchmark.render(items, clips))
    made = generate_clips(pipeline, items, size) if task == "generation" else sample_jointly(pipeline, items, size)
    seen = benchmark.reader(pipeline)(made["frames"], None)
    if task == "generation":
        rows = [
            make_row(task, item, benchmark.asked(item["prompt"]), found)
            for item, found in zip(items, seen, strict=True)
        ]
    else:
        texts = zip(items, seen, made["texts"], strict=True)
        rows = [make_joint_row(task, benchmark, item, found, text) for item, found, text in texts]
    return rows, list(made["frames"])


def _pixel_format(clip: "np.ndarray") -> str:
    """The format that plays everywhere, unless a side is odd."""
    return "yuv444p" if clip.shape[1] % 2 or clip.shape[2] % 2 else "yuv420p"
