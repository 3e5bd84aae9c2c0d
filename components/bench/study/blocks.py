"""Shared data of a study without a block of scenes: for arms whose training must not see it.

The clips are excluded as people exclude them, by lines of ``data/edits.json``, which the gate of pairs obeys.
"""

from collections.abc import Mapping
from pathlib import Path

from components.bench.study.arms import Block
from components.pipeline.edits import EXCLUDE, VERSION, Edit
from components.pipeline.stages import EDITS, find_stage
from components.pipeline.tables import read_table
from univigu.errors import BadInputError
from univigu.files import write_json

CLIPS, CAPTIONS = "synthesize-videos", "caption-videos"


def exclude(root: Path, block: Block) -> int:
    """Exclude every clip of a work root whose prompt or caption states a scene of the block; returns their number.

    Raises `BadInputError` if there is none, because the training would be that of the whole data.
    """
    texts = {
        row["clip_id"]: row["text"] for row in read_table(root / find_stage(CAPTIONS).home, "captions").to_pylist()
    }
    clips = read_table(root / find_stage(CLIPS).home, "clips").to_pylist()
    left_out = [
        row for row in clips if any(states(text, block) for text in (row["prompt"], texts.get(row["id"])) if text)
    ]
    if not left_out:
        raise BadInputError(f"No clip under {root} states a scene of the block {dict(block)}; choose a larger block.")
    edits = [
        Edit(number=number, action=EXCLUDE, id=row["id"], of=row["sha256"], by="study")
        for number, row in enumerate(left_out, 1)
    ]
    lines = [edit.model_dump(exclude_defaults=True) for edit in edits]
    write_json(root / EDITS, {"version": VERSION, "entries": lines})
    return len(left_out)


def states(text: str, block: Mapping[str, list[str]]) -> bool:
    """Whether a text states one of the block's values for each of its attributes."""
    from components.digits import world  # imports torch

    said = world.read_text(text)
    return all(said[name] & set(values) for name, values in block.items())
