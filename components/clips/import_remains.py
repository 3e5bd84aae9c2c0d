"""What is left of an import after data were withdrawn: its outputs are written again without them.

An import's folder isn't known here, but its output has the clips, prompts and captions that stay. They are copied byte
for byte, with the rows that were quarantined before. Nothing is decoded, so no setting matters: the output keeps the
settings with which it was imported.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.clips.archive import read_clips, stream_tar
from components.clips.import_videos import TABLES, TAR, VIDEOS, copy_tables, count_changes, count_clips
from components.clips.near_duplicates import COPY_OF
from components.pipeline.manifests import read_manifest
from components.pipeline.stages import STAGES, find_stage
from components.pipeline.tables import read_table, write_table

if TYPE_CHECKING:
    from components.pipeline.step import Step

# What was quarantined before counts here, too, so the last section must be one without a limit of its share.
REMAINS = replace(
    VIDEOS,
    function="components.clips.import_remains:keep_remains",
    sources={},
    parameters=tuple(sorted(VIDEOS.parameters, key=lambda name: name == "import_options")),
    plugins={},
)


def remake_import(root: Path) -> dict[str, Any]:
    """Write the outputs of an import under `root` again, without what was withdrawn; returns the manifest of the clips.

    Raises as `run_stage` does.
    """
    from components.pipeline.runner import imported, run_adhoc_stage

    root = root.resolve()
    parameters = read_manifest(root / VIDEOS.home, find_stage("synthesize-videos").name)["parameters"]
    homes = {stage.home: stage for stage in STAGES}
    tables = [name for name, (_, home) in TABLES.items() if imported(homes[home], root)]
    manifest = run_adhoc_stage(REMAINS, parameters, root, {})
    copy_tables(tables, parameters, root)
    return manifest


def keep_remains(step: "Step") -> None:
    """Write the clips, prompts and captions of the output that this one replaces, without withdrawn ones."""
    before = read_manifest(step.previous, step.stage.name)
    rejected = [row for row in read_table(step.previous, "rejected").to_pylist() if not _is_withdrawn(step, row)]
    for row in rejected:
        step.reject(row["id"], row["reason"], row["detail"], json.loads(row["row"]))
    rows = sorted(read_table(step.previous, "clips").to_pylist(), key=lambda row: (row["shard"], row["id"]))
    step.rows_in = len(rows) + len(rejected)
    copy = partial(_copy_shard, step)
    clips = step.map_shards(rows, max(1, len(rows)), copy, unit="clips", group=lambda row: row["shard"])
    for name in ("prompts", "captions"):
        kept = (row for row in read_table(step.previous, name).to_pylist() if not step.withdrawn.covers(row))
        write_table(step.out, name, kept)
    used = len({row["generator_digest"] for row in clips})
    step.facts |= count_clips(clips) | count_changes(clips)
    step.facts |= {"videos": {**before["facts"]["videos"], "used": used}}
    step.write("clips", clips)


def _is_withdrawn(step: "Step", rejected: Mapping[str, Any]) -> bool:
    """Whether a row that was quarantined before is of something that was withdrawn since."""
    if step.parameters["import_options"]["source"] in step.withdrawn.sources:
        return True
    row = json.loads(rejected["row"])
    if not isinstance(row, dict):
        return False
    scores = row.get("scores")
    original = (json.loads(scores) if isinstance(scores, str) else scores or {}).get(COPY_OF, "")
    return step.withdrawn.covers(row) or any(video.startswith(original) for video in step.withdrawn.videos if original)


def _copy_shard(step: "Step", rows: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Copy the clips of a shard that stay into one tar."""
    stream_tar(folder / TAR, ((row["member"], content) for row, content in read_clips(step.previous, rows)))
    return [{**row, "shard": f"shards/{folder.name.removeprefix('.')}/{TAR}"} for row in rows]
