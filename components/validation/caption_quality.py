"""The score that an independent reader gives each caption, in the step validate-pairs, if the profile asks for it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.checks.readers import load_reader
from components.clips.archive import read_clips
from components.pipeline.digests import tree_digest
from components.pipeline.manifests import inside
from components.pipeline.stages import find_stage
from components.pipeline.step import Step
from components.validation.validate_data import QUALITY
from univigu.errors import BadInputError, MissingInputError
from univigu.video import decode_mp4

RECOGNISER = "recogniser"


def score_captions(step: Step, rows: Sequence[dict[str, Any]]) -> None:
    """Add the score of its caption to each row of pairs; one without a caption gets the least that passes.

    Raises `MissingInputError` without the model or a video, and `BadInputError` if a video is not the one of its row.
    """
    quality = step.settings.validate_data.caption_quality
    model = _find_model(step, quality.model)
    reader = load_reader(model)
    captioned = sorted((row for row in rows if row["caption"]), key=lambda row: (row["shard"], row["id"]))
    for row in rows:
        row[QUALITY] = quality.least
    for row, frames in step.progress(_videos(step.root, captioned), len(captioned), unit="captions"):
        row[QUALITY] = round(reader(frames, row["caption"]), 4)
    scores = [row[QUALITY] for row in captioned]
    step.facts[QUALITY] = {
        "reader": RECOGNISER if model is None else tree_digest([model], relative_to=model),
        "captions": len(scores),
        "mean": round(sum(scores) / len(scores), 4) if scores else None,
        "below": sum(score < quality.least for score in scores),
    }


def _find_model(step: Step, name: str) -> Path | None:
    if not name:
        return None
    folder = inside(step.root, name)
    if not folder.is_dir():
        raise MissingInputError(
            f"'validate_data.caption_quality' needs a model, and there is no folder '{name}' under {step.root}; put it "
            "there, or set the mode to off."
        )
    return folder


def _videos(root: Path, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Any, Any]]:
    """Each row and the frames of its clip; one clip is in memory at a time.

    The videos are no input of the step: the rows, which are, name the digest of each.
    """
    for row, content in read_clips(root / find_stage("synthesize-videos").home, rows):
        if hashlib.sha256(content).hexdigest() != row["sha256"]:
            raise BadInputError(
                f"The video of clip '{row['clip_id']}' is not the one that was validated; run `univigu run "
                "validate-clips` again."
            )
        yield row, decode_mp4(content)[0]
