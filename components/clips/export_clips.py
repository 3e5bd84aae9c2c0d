"""Export clips with their texts in the layouts that other tools read; `univigu data import` reads them, too.

- ``folder``: ``ID.mp4`` with ``ID.txt`` beside it (the caption, or the prompt of a clip without one) and `metadata.csv`
- ``hf``: ``ID.mp4`` and `metadata.jsonl`, the VideoFolder of Hugging Face's `datasets`
- ``webdataset``: tars with ``ID.mp4``, ``ID.txt`` and ``ID.json`` for each clip

A clip's row has its texts, its training stage, licence and source, and where in which file it comes from. The mp4s are
exported unchanged, and an import keeps their bytes.
"""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from components.clips.archive import read_clips, stream_tar
from components.pipeline.manifests import verify
from components.pipeline.progress import progress
from components.pipeline.stages import find_stage
from components.pipeline.tables import read_table
from univigu.errors import ConfigError, CorruptDataError

Item = tuple[dict[str, Any], bytes]  # a row, and its mp4
PER_TAR = 1000  # clips
COLUMNS = (
    *("file_name", "caption", "prompt", "stage", "licence", "source"),
    *("frames", "height", "width", "fps", "parent_sha256", "start", "end"),
)


def export_clips(root: Path, target: str, folder: Path) -> int:
    """Write all clips of the work root into the new folder `folder`; returns their number.

    target: a name in `TARGETS`. The folder appears when everything is in it. Raises `ConfigError` for another target
    or a folder that is not empty, `MissingInputError` without clips, and `CorruptDataError` for clips that don't have
    the digests of their rows.
    """
    if target not in TARGETS:
        raise ConfigError(f"'{target}' is not a layout to export to; choose one of {', '.join(TARGETS)}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder; choose a new one to export to.")
    home, rows = _read_rows(root)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        TARGETS[target](partial, progress(_read_items(home, rows), "export", len(rows), "clips"))
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(rows)


def _read_rows(root: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the clips, and the row of each with its texts; captions that failed are left out."""
    homes = {name: root.resolve() / find_stage(name).home for name in ("synthesize-videos", "caption-videos")}
    clips = homes["synthesize-videos"]
    verify(clips, "synthesize-videos")
    captions: dict[str, str] = {}
    if (homes["caption-videos"] / "manifest.json").is_file():
        verify(homes["caption-videos"], "caption-videos")
        found = read_table(homes["caption-videos"], "captions").to_pylist()
        captions = {row["clip_id"]: row["text"] for row in found if row["status"] == "success"}
    prompts = {row["id"]: row for row in _prompts(root)}
    rows = []
    for clip in read_table(clips, "clips").to_pylist():
        about, scores = prompts.get(clip["prompt_id"], {}), json.loads(clip["scores"])
        more = {
            "caption": captions.get(clip["id"]) or "",
            "licence": about.get("licence"),
            "source": about.get("source"),
        }
        span = {"parent_sha256": clip["generator_digest"], "start": scores.get("start"), "end": scores.get("end")}
        rows.append({**clip, **more, **(span if "start" in scores else {})})
    return clips, rows


def _prompts(root: Path) -> list[dict[str, Any]]:
    home = root.resolve() / find_stage("curate-prompts").home
    return read_table(home, "prompts").to_pylist() if (home / "prompts.parquet").is_file() else []


def _read_items(home: Path, rows: list[dict[str, Any]]) -> Iterator[Item]:
    """Each exported row with its mp4, whose digest is checked."""
    for row, content in read_clips(home, sorted(rows, key=lambda row: row["shard"])):
        if hashlib.sha256(content).hexdigest() != row["sha256"]:
            raise CorruptDataError(f"The clip {row['id']} in {home} is damaged; run the step that makes it again.")
        yield {**row, "file_name": f"{row['id']}.mp4"}, content


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that are exported and known."""
    return {name: row[name] for name in COLUMNS if row.get(name) not in (None, "")}


def _text(row: Mapping[str, Any]) -> bytes:
    return (row["caption"] or row["prompt"]).encode()


def write_folder(folder: Path, items: Iterable[Item]) -> None:
    """Write clips with their texts beside them, and `metadata.csv`."""
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, COLUMNS)
        table.writeheader()
        for row, content in items:
            (folder / row["file_name"]).write_bytes(content)
            (folder / row["file_name"]).with_suffix(".txt").write_bytes(_text(row))
            table.writerow(_shown(row))


def write_hf(folder: Path, items: Iterable[Item]) -> None:
    """Write clips and `metadata.jsonl`."""
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as stream:
        for row, content in items:
            (folder / row["file_name"]).write_bytes(content)
            stream.write(json.dumps(_shown(row), ensure_ascii=False) + "\n")


def write_webdataset(folder: Path, items: Iterable[Item]) -> None:
    """Write tars of `PER_TAR` clips."""
    left = iter(items)
    for number in count():
        first = next(left, None)
        if first is None:
            return
        stream_tar(folder / f"clips-{number:06d}.tar", _members(chain([first], islice(left, PER_TAR - 1))))


def _members(items: Iterable[Item]) -> Iterator[tuple[str, bytes]]:
    for row, content in items:
        about = {name: value for name, value in _shown(row).items() if name != "file_name"}
        yield f"{row['id']}.json", json.dumps(about, ensure_ascii=False, sort_keys=True).encode()
        yield f"{row['id']}.mp4", content
        yield f"{row['id']}.txt", _text(row)


TARGETS: Mapping[str, Callable[[Path, Iterable[Item]], None]] = {
    "folder": write_folder,
    "webdataset": write_webdataset,
    "hf": write_hf,
}
