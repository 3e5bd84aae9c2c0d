"""Published benchmarks, in the layouts of their own repositories: what they are given, and what they read afterwards.

Their own scores need judges of their own (detectors, language models), which their own scripts run on what is written
here. Every file that a layout asks for must be there: a benchmark on a part of its clips is another benchmark.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.clips.import_files import list_videos
from components.evaluation.suite.data import Clip, Dataset, Prompt, make_dataset, read_clip, refuse
from components.prompts.records import Broken, open_jsonl, parse
from univigu.errors import BadInputError, MissingInputError

if TYPE_CHECKING:
    import numpy as np

LARGEST = 64 << 20  # bytes of a list of prompts
VDC_KINDS = ("background", "camera", "detailed", "main_object", "short")
VBENCH_SAMPLES = 5
VBENCH_FLICKER_SAMPLES = 25  # of a prompt of the dimension temporal_flickering
GET_WHOLE = "Get the benchmark again, whole."


@dataclass(frozen=True)
class Benchmark:
    """A benchmark whose own scripts score `written`, the file or folder that `save` writes below a folder."""

    name: str
    scored_by: str  # the command of its repository
    written: str
    rows: Sequence[Mapping[str, Any]] = ()

    def save_captions(self, folder: Path, clips: Sequence[Clip], texts: Sequence[str | None]) -> Path:
        """Write the captions as its scripts read them; a clip that failed has an empty one."""
        said = {clip.id: text or "" for clip, text in zip(clips, texts, strict=True)}
        path = folder / self.written
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.name == "DREAM-1K":
            lines = [
                json.dumps(_with_prediction(row, said[f"{row['vid']}"])) for row in self.rows if f"{row['vid']}" in said
            ]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            rows = [{"doc": {"video_id": name}, "resps": [[text]]} for name, text in said.items()]
            path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    def save_video(self, folder: Path, prompt: Prompt, frames: "np.ndarray", fps: float) -> Path:
        """Write a generated clip, uint8 (F, H, W, 3), under the name that VBench expects."""
        from univigu.video import encode_mp4

        path = folder / self.written / f"{prompt.text}-{prompt.sample}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_mp4(frames, fps))
        return path


def open_benchmark(folder: Path) -> Dataset | None:
    """The dataset of a published benchmark's folder, known by its list; None for another folder.

    Raises `BadInputError` that names what is missing or damaged.
    """
    openers: dict[str, Callable[[Path], Dataset]] = {
        "VBench_full_info.json": open_vbench,
        "DREAM-1k.jsonl": open_dream,
        "VDC_1k.jsonl": open_vdc,
    }
    for name, opener in openers.items():
        if (folder / name).is_file():
            if (folder / name).stat().st_size > LARGEST:
                raise BadInputError(
                    f"'{folder / name}' has more than {LARGEST >> 20} MiB, so it is no list of prompts."
                )
            return opener(folder / name)
    return None


def open_vbench(path: Path) -> Dataset:
    """VBench's prompts: five videos each, 25 where a dimension is ``temporal_flickering``, as ``PROMPT-INDEX.mp4``.

    The list is ``vbench/VBench_full_info.json`` of Vchitect/VBench, of objects ``{"prompt_en", "dimension": [...]}``;
    how often to sample and how to name the videos is in its ``prompts/README.md``.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"'{path}' is not JSON; get VBench's again.") from error
    if not isinstance(rows, list) or not rows:
        raise BadInputError(f"'{path}' is no list of prompts; get VBench's again.")
    faults, wanted = [], {}
    for number, row in enumerate(rows):
        text, dimensions = (row.get("prompt_en"), row.get("dimension")) if isinstance(row, dict) else (None, None)
        if not isinstance(text, str) or not text.strip() or not isinstance(dimensions, list) or not dimensions:
            faults.append(f"entry {number} has no prompt_en or no dimension")
        elif "/" in text or "\0" in text or len(f"{text}-24.mp4".encode()) > 255:
            faults.append(f"entry {number} can't be the name of a file")
        else:
            samples = VBENCH_FLICKER_SAMPLES if "temporal_flickering" in dimensions else VBENCH_SAMPLES
            wanted[text] = max(samples, wanted.get(text, 0))
    refuse(f"'{path}'", faults, "Get VBench's again.")
    prompts = [
        Prompt(f"{number:04d}-{sample}", text, number * VBENCH_FLICKER_SAMPLES + sample, sample)
        for number, (text, samples) in enumerate(wanted.items())
        for sample in range(samples)
    ]
    benchmark = Benchmark("VBench", "python evaluate.py --videos_path VIDEOS --dimension DIMENSION", "videos")
    return make_dataset("VBench", [], prompts, benchmark=benchmark)


def open_dream(path: Path) -> Dataset:
    """DREAM-1K's clips, ``VID.mp4``, and the descriptions of its annotators.

    The list is ``data/annotations/DREAM-1k.jsonl`` on the branch ``tarsier2`` of bytedance/tarsier: messages, of which
    the last one's ``reference`` is the description; ``data/fill_in_video_file.ipynb`` there names the videos. Its
    ``evaluation/evaluate.py`` reads the prediction from the ``text`` of that message.
    """
    rows, faults, clips = _rows(path), [], []
    videos = _videos(path.parent)
    for number, row in enumerate(rows):
        reference = _dream_reference(row)
        if not reference or "vid" not in row or "dataset" not in row or "idx" not in row:
            faults.append(f"line {number + 1} has no reference, vid, dataset or idx")
        elif (file := f"{row['vid']}.mp4") not in videos:
            faults.append(f"{file} is missing")
        else:
            clips.append(Clip(str(row["vid"]), (reference,), partial(read_clip, videos[file]), number))
    refuse(f"'{path.parent}'", faults, GET_WHOLE)
    benchmark = Benchmark(
        "DREAM-1K", "bash scripts/run_evaluation_only.sh PREDICTIONS dream", "predictions/dream.jsonl", rows
    )
    return make_dataset("DREAM-1K", clips, [], benchmark=benchmark)


def open_vdc(path: Path) -> Dataset:
    """VDC's clips and their detailed captions.

    The layout is that of the dataset wchai/Video-Detailed-Caption: ``VDC_1k.jsonl`` with ``video_id``, ``video_name``
    and five ``KIND_caption``, ``VDCScore_qa/KIND.jsonl`` with the questions, and ``videos``. ``--raw_file`` of
    ``post_eval/process_vdc_result.py`` in rese1f/aurora is what is written.
    """
    rows, faults, clips = _rows(path), [], []
    faults += [f"VDCScore_qa/{kind}.jsonl is missing" for kind in VDC_KINDS if not _questions(path, kind).is_file()]
    videos = _videos(path.parent)
    keys = ("video_id", "video_name", *(f"{kind}_caption" for kind in VDC_KINDS))
    for number, row in enumerate(rows):
        lacking = [key for key in keys if not isinstance(row.get(key), str) or not row[key].strip()]
        if lacking:
            faults.append(f"line {number + 1} has no {lacking[0]}")
        elif Path(row["video_name"]).name not in videos:
            faults.append(f"{Path(row['video_name']).name} is missing")
        else:
            file = videos[Path(row["video_name"]).name]
            clips.append(Clip(row["video_id"], (row["detailed_caption"],), partial(read_clip, file), number))
    refuse(f"'{path.parent}'", faults, GET_WHOLE)
    command = "python post_eval/process_vdc_result.py --raw_file CAPTIONS --tp_qa_path VDCScore_qa/detailed.jsonl"
    return make_dataset("VDC", clips, [], benchmark=Benchmark("VDC", command, "vdc.json"))


def _questions(path: Path, kind: str) -> Path:
    return path.parent / "VDCScore_qa" / f"{kind}.jsonl"


def _rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; raises `BadInputError` for a line that is none."""
    rows, faults = [], []
    for line, raw in open_jsonl(path):
        row = parse(raw)
        if isinstance(row, Broken) or not isinstance(row, dict):
            faults.append(f"line {line}: {row.why if isinstance(row, Broken) else 'no object'}")
        else:
            rows.append(row)
    refuse(f"'{path}'", faults, GET_WHOLE)
    if not rows:
        raise MissingInputError(f"'{path}' is empty. {GET_WHOLE}")
    return rows


def _videos(folder: Path) -> dict[str, Path]:
    """The videos at any depth of a folder, by file name."""
    try:
        names, _ = list_videos(folder)
    except MissingInputError:
        return {}
    return {Path(name).name: folder / name for name in names}


def _dream_reference(row: Mapping[str, Any]) -> str:
    try:
        reference = row["messages"][-1]["content"][-1]["reference"]
    except (KeyError, IndexError, TypeError):
        return ""
    return reference if isinstance(reference, str) else ""


def _with_prediction(row: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A row of DREAM-1K with the prediction where `evaluation/evaluate.py` reads it."""
    copied = json.loads(json.dumps(row))
    copied["messages"][-1]["content"][-1]["text"] = text
    return copied
