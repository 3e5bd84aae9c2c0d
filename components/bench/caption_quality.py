"""Do captions say what their clips show? An independent reader answers before anything is trained on them.

On the built-in toy dataset the reader is its recogniser: `quality` is the share of what captions claim that it sees as
well. Otherwise it is a CLIP-like model from a folder: `quality` is the share of clips to whose frames no other caption
of the sample fits better (R-precision), and a clip's own score is the cosine similarity of frames and caption. CLIP
reads the first 77 tokens only, so it can't judge the end of a long caption. Neither reader writes captions here.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.clips.archive import open_clip, read_clips
from components.pipeline.manifests import verify
from components.pipeline.stages import find_stage
from components.pipeline.tables import read_table
from univigu.errors import ConfigError, MissingInputError

if TYPE_CHECKING:
    import numpy as np

LOWEST = 10  # clips in the report
Row = Mapping[str, Any]


def measure_captions(root: Path, model: Path | None, most: int) -> dict[str, Any]:
    """The quality of the captions under a work root, on at most `most` clips, which are spread over all.

    model: the folder of a CLIP-like model; None for the toy dataset's recogniser. Raises `MissingInputError` if there
    are no captions, and `ConfigError` if clips aren't the toy dataset's and no model is given.
    """
    rows = _sample(root.resolve(), most)
    scores, right = _by_clip(root, rows, model) if model else _by_recogniser(root, rows)
    order = sorted(range(len(rows)), key=lambda index: (scores[index], rows[index]["id"]))
    return {
        "reader": model.name if model else "recogniser",
        "captions": len(rows),
        "quality": right,
        "mean_score": round(sum(scores) / len(scores), 4),
        "lowest": [
            {"id": rows[index]["id"], "score": round(scores[index], 4), "caption": rows[index]["caption"]}
            for index in order[:LOWEST]
        ],
    }


def _sample(root: Path, most: int) -> list[dict[str, Any]]:
    """Rows of clips with a caption."""
    homes = {name: root / find_stage(name).home for name in ("synthesize-videos", "caption-videos")}
    for name, home in homes.items():
        verify(home, name)
    found = read_table(homes["caption-videos"], "captions").to_pylist()
    captions = {row["clip_id"]: row["text"] for row in found if row["status"] == "success"}
    clips = sorted(read_table(homes["synthesize-videos"], "clips").to_pylist(), key=lambda row: row["id"])
    rows = [{**row, "caption": captions[row["id"]]} for row in clips if row["id"] in captions]
    if not rows:
        raise MissingInputError(f"No clip under {root} has a caption; run `univigu run caption-videos` first.")
    count = min(most, len(rows))
    chosen = (rows[index * len(rows) // count] for index in range(count))
    return sorted(chosen, key=lambda row: row["shard"])


def _frames(root: Path, rows: Sequence[Row]) -> Iterator["np.ndarray"]:
    """The frames of each clip, uint8 (F, H, W, 3); one clip is in memory at a time."""
    for row, content in read_clips(root.resolve() / find_stage("synthesize-videos").home, rows):
        yield open_clip(row, content)[0]


def _by_recogniser(root: Path, rows: Sequence[Row]) -> tuple[list[float], dict[str, Any]]:
    from components.digits import benchmark, world
    from univigu.evaluation.intervals import clustered_mean

    size = (world.FRAMES, world.SIZE, world.SIZE)
    if any((row["frames"], row["height"], row["width"]) != size for row in rows):
        raise ConfigError("These clips aren't the toy dataset's; name the folder of a CLIP-like model with --clip.")
    scores, agreed = [], []
    for row, frames in zip(rows, _frames(root, rows), strict=True):
        (seen,) = benchmark.recognise(frames[None])
        said = benchmark.read_text(row["caption"])
        right = {name: value == seen[name] for name, value in said.items()}
        agreed.append(right)
        scores.append(sum(right.values()) / len(right) if right else 0.0)
    return scores, clustered_mean(agreed)


def _by_clip(root: Path, rows: Sequence[Row], model: Path) -> tuple[list[float], dict[str, Any]]:
    import torch

    from components.evaluation.scorers import clip
    from univigu.evaluation.intervals import share

    scorer = clip.load(model)
    videos = [scorer.videos(frames[None])[0] for frames in _frames(root, rows)]
    captions = [row["caption"] for row in rows]
    table = torch.nn.functional.normalize(torch.stack(videos), dim=-1) @ scorer.texts(captions).T
    own = table.diagonal()
    return own.tolist(), share((own >= table.max(dim=1).values).tolist())
