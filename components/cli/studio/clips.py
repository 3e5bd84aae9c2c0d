"""The clips of a run as the studio shows them: kept and quarantined ones, by page.

An index of a few bytes per clip is read once, and again when a step writes its output anew. Prompts, captions and
scores are read only for the clips of a page; a search in texts reads the columns that it searches.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from components.clips.archive import read_clips
from components.clips.near_duplicates import COPY_OF, DISTANCE
from components.pipeline.manifests import inside
from components.pipeline.stages import find_stage
from univigu.errors import CorruptDataError, MissingInputError

if TYPE_CHECKING:
    import numpy as np

CLIPS, CAPTIONS, PAIRS = "synthesize-videos", "caption-videos", "validate-pairs"
STEPS = (CLIPS, "validate-clips", CAPTIONS, PAIRS, "encode-latents")  # whose rejected rows are clips
_OF_PAIRS = (PAIRS, "encode-latents")  # their ids are STAGE-CLIP
PAGE = 24  # clips of a page
LONGEST_SEARCH = 200  # characters
KEPT, QUARANTINED = "kept", "quarantined"
SAME_VIDEO = "same_video"  # the reason of a clip with the same bytes as another one
FITTED, FITTED_PIXELS = 32, 8_000_000  # clips, and pixels of all of them, whose colours previews are fitted to
SAME, NEARLY = "The same video as", "Nearly the same video as"  # what a clip says about the one beside it
PRELOADED_PIXELS = 2_000_000  # of a clip whose first frame is shown before it is played


class Query(NamedTuple):
    """Which clips to show; an empty field doesn't filter."""

    verdict: str = ""  # `KEPT`, `QUARANTINED`, or a reason
    stage: int = 0
    text: str = ""  # in the prompt or the caption, in any case
    score: str = ""  # the name of a score, which the clips must have, within these bounds
    least: float | None = None
    most: float | None = None


class Found(NamedTuple):
    """A page of clips, and how many there are."""

    clips: list[dict[str, Any]]
    total: int
    page: int  # from 1
    pages: int


def find(root: Path, query: Query, page: int = 1) -> Found:
    """A page of the clips that a query asks for, sorted by their ids; the last one where `page` is too high."""
    index = _filter(root, _index(root, _stamps(root)), query)
    pages = max(1, -(-index.num_rows // PAGE))
    page = min(max(1, page), pages)
    rows = index.slice((page - 1) * PAGE, PAGE).to_pylist()
    return Found(_describe(root, rows), index.num_rows, page, pages)


def count_verdicts(root: Path) -> dict[str, int]:
    """The number of clips that were kept, of those that were quarantined, and of these by reason.

    Raises `MissingInputError` if no clips were made yet.
    """
    reasons = _index(root, _stamps(root))["reason"]
    counts = {one["values"]: one["counts"] for one in pc.value_counts(reasons).to_pylist()}
    kept = counts.pop("", 0)
    return {KEPT: kept, QUARANTINED: sum(counts.values()), **dict(sorted(counts.items()))}


def list_scores(root: Path) -> list[str]:
    """The names of all scores that clips have."""
    return sorted({name for scores in _scores(root, _stamps(root)).values() for name in scores})


def read_verdicts(root: Path, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The step that rejected each of some clips, and its reason; empty texts for one that is kept."""
    index = _index(root, _stamps(root))
    rows = index.filter(pc.is_in(index["id"], pa.array(list(ids), pa.string()))).to_pylist()
    return {row["id"]: (row["step"], row["reason"]) for row in rows}


def read_clip(root: Path, clip_id: str) -> bytes:
    """The mp4 of a clip; raises `MissingInputError` if it isn't among the clips that were stored."""
    path = _table(root, CLIPS, "clips")
    row = read_rows(root, CLIPS, "clips", "id", [clip_id]).get(clip_id)
    row = row or _of_json(read_rows(root, CLIPS, "rejected", "id", [clip_id]).get(clip_id, {}).get("row"))
    if not _is_stored(row):
        raise MissingInputError(f"The video of the clip '{clip_id}' is not stored; a check of its frames rejected it.")
    inside(path.parent, row["shard"])
    ((_, content),) = read_clips(path.parent, [row])
    return content


def some_frames(root: Path) -> "list[np.ndarray]":
    """The first frames, uint8 (F, H, W, 3) with F = 4k + 1, of some stored clips; none where no clips were made."""
    from univigu.video import decode_mp4

    path = _table(root, CLIPS, "clips")
    rows = _read(path, ["id", "shard", "member"], None).slice(0, FITTED).to_pylist() if path.is_file() else []
    found: list[np.ndarray] = []
    for _, content in read_clips(path.parent, rows):
        frames, _ = decode_mp4(content)
        frames = frames[: 4 * ((min(len(frames), 9) - 1) // 4) + 1]
        if sum(one.size for one in (*found, frames)) <= 3 * FITTED_PIXELS:
            found.append(frames)
    return found


# --- the index -------------------------------------------------------------------------------------------------------


def _table(root: Path, step: str, name: str) -> Path:
    return root / find_stage(step).home / f"{name}.parquet"


def _stamps(root: Path) -> tuple[tuple[int, int, int], ...]:
    """When the tables that the index is made of were written."""
    files = [_table(root, CLIPS, "clips"), _table(root, PAIRS, "pairs")]
    files += [_table(root, step, "rejected") for step in STEPS]
    found = [file.stat() if file.is_file() else None for file in files]
    return tuple((one.st_ino, one.st_size, one.st_mtime_ns) if one else (0, 0, 0) for one in found)


@lru_cache(maxsize=2)
def _index(root: Path, stamps: tuple[tuple[int, int, int], ...]) -> pa.Table:
    """A row per clip: `id`, `stage`, and the `step` that rejected it and its `reason`, or empty texts."""
    path = _table(root, CLIPS, "clips")
    if not path.is_file():
        raise MissingInputError(
            f"No clips are finished in {root} yet; `univigu run synthesize-videos` makes them, or `make demo`."
        )
    rejected = {clip_id: (stage, step, reason) for clip_id, stage, step, reason in _rejected(root)}
    pairs = _table(root, PAIRS, "pairs")
    for clip_id in _read(pairs, ["clip_id"], None)["clip_id"].to_pylist() if pairs.is_file() else ():
        if rejected.get(clip_id, (0, "", ""))[1] == CAPTIONS:
            del rejected[clip_id]  # someone wrote the caption that the captioner didn't find
    stored = _read(path, ["id", "stage"], None)
    ids, stages = stored["id"].to_pylist(), stored["stage"].to_pylist()
    rows = [(one, stage, *rejected.pop(one, (0, "", ""))[1:]) for one, stage in zip(ids, stages, strict=True)]
    rows += [(clip_id, *facts) for clip_id, facts in rejected.items()]
    columns = list(zip(*sorted(rows), strict=True)) or [(), (), (), ()]
    kinds = {"id": pa.string(), "stage": pa.int8(), "step": pa.string(), "reason": pa.string()}
    return pa.table([pa.array(one, kind) for one, kind in zip(columns, kinds.values(), strict=True)], list(kinds))


def _rejected(root: Path) -> Iterator[tuple[str, int, str, str]]:
    """The id, training stage (0 if unknown), step and reason of each rejected clip."""
    for step in STEPS:
        path = _table(root, step, "rejected")
        if path.is_file():
            for row in _read(path, ["id", "reason", "row"], None).to_pylist():
                yield _clip_id(step, row["id"]), int(_of_json(row["row"]).get("stage") or 0), step, row["reason"]


def _clip_id(step: str, row_id: str) -> str:
    stage, _, rest = row_id.partition("-")
    return rest if step in _OF_PAIRS and stage in ("1", "2") and rest else row_id


def _filter(root: Path, index: pa.Table, query: Query) -> pa.Table:
    if query.verdict == KEPT:
        index = index.filter(pc.equal(index["reason"], ""))
    elif query.verdict == QUARANTINED:
        index = index.filter(pc.not_equal(index["reason"], ""))
    elif query.verdict:
        index = index.filter(pc.equal(index["reason"], query.verdict))
    if query.stage:
        index = index.filter(pc.equal(index["stage"], query.stage))
    if query.text:
        found = pa.array(sorted(set(_search(root, query.text[:LONGEST_SEARCH]))), pa.string())
        index = index.filter(pc.is_in(index["id"], found))
    if query.score:
        least, most = (
            -math.inf if query.least is None else query.least,
            math.inf if query.most is None else query.most,
        )
        scores = {key: values.get(query.score) for key, values in _scores(root, _stamps(root)).items()}
        within = [key for key, value in scores.items() if value is not None and least <= value <= most]
        index = index.filter(pc.is_in(index["id"], pa.array(within, pa.string())))
    return index


@lru_cache(maxsize=1)
def _scores(root: Path, stamps: tuple[tuple[int, int, int], ...]) -> dict[str, dict[str, float]]:
    """The scores of each clip that are numbers."""
    places = [(CLIPS, "clips", "scores"), *((step, "rejected", "row") for step in STEPS)]
    found: dict[str, dict[str, float]] = {}
    for step, name, column in places:
        path = _table(root, step, name)
        for row in _read(path, ["id", column], None).to_pylist() if path.is_file() else ():
            scores = _of_json(row[column])
            scores = _of_json(scores.get("scores")) if column == "row" else scores
            numbers = {str(key): value for key, value in scores.items() if isinstance(value, int | float)}
            found.setdefault(_clip_id(step, row["id"]), numbers)
    return found


def _search(root: Path, text: str) -> Iterator[str]:
    """The ids of the clips whose prompt or caption contains a text, in any case."""
    places = [(CLIPS, "clips", "id", "prompt"), (CAPTIONS, "captions", "clip_id", "text")]
    places += [(PAIRS, "pairs", "clip_id", "caption")]  # it may be one that someone wrote
    places += [(step, "rejected", "id", "row") for step in STEPS]  # the rejected row is JSON, with the texts in it
    for step, name, key, column in places:
        path = _table(root, step, name)
        if path.is_file():
            contains = pc.match_substring(ds.field(column), text, ignore_case=True)
            yield from (_clip_id(step, one) for one in _read(path, [key], contains)[key].to_pylist())


# --- the clips of a page ---------------------------------------------------------------------------------------------


def _describe(root: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All that is known about some clips of the index."""
    ids = [row["id"] for row in rows]
    clips = read_rows(root, CLIPS, "clips", "id", ids)
    captions = read_rows(root, CAPTIONS, "captions", "clip_id", ids)
    pairs = read_rows(root, PAIRS, "pairs", "clip_id", ids)
    same = _same_videos(root, [clips[row["id"]] for row in rows if row["reason"] == SAME_VIDEO and row["id"] in clips])
    rejected = {step: _rejected_rows(root, step, ids) for step in {row["step"] for row in rows} - {""}}
    described = []
    for row in rows:
        refusal = rejected.get(row["step"], {}).get(row["id"], {})
        known = {**_of_json(refusal.get("row")), **clips.get(row["id"], {})}
        caption = captions.get(row["id"], {}).get("text") or known.get("caption") or ""
        scores = dict(_of_json(known.get("scores")))
        original = str(scores.pop(COPY_OF, ""))
        pixels = int(known.get("frames") or 0) * int(known.get("height") or 0) * int(known.get("width") or 0)
        described.append(
            {
                **row,
                "prompt": str(known.get("prompt") or ""),
                "caption": str(caption),
                "made": captions.get(row["id"], {}).get("text"),
                "sha256": str(known.get("sha256") or ""),
                "scores": {str(key): value for key, value in scores.items()},
                "split": pairs.get(row["id"], {}).get("split", ""),
                "twin": same.get(row["id"]) or _first_clip(root, original),
                "alike": NEARLY if DISTANCE in scores else SAME,
                "detail": refusal.get("detail") or "",
                "stored": _is_stored(known),
                "preload": "metadata" if 0 < pixels <= PRELOADED_PIXELS else "none",
            }
        )
    return described


def _is_stored(row: Mapping[str, Any]) -> bool:
    """Whether a clip's row says where its video is; near-duplicates are rejected when theirs is written already."""
    return isinstance(row.get("shard"), str) and isinstance(row.get("member"), str)


def _first_clip(root: Path, video: str) -> str:
    """The id of the first stored clip that has an id, or that was cut out of the imported video with it, or ""."""
    if not video:
        return ""
    ids = ds.field("id")
    rows = _read(_table(root, CLIPS, "clips"), ["id"], (ids == video) | pc.starts_with(ids, f"{video}-"))
    return min(rows["id"].to_pylist(), default="")


def _same_videos(root: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """For each of some rejected clips, the id of one with the same video that was kept, or else of another one."""
    if not rows:
        return {}
    same = ds.field("sha256").isin([row["sha256"] for row in rows])
    found = _read(_table(root, CLIPS, "clips"), ["id", "sha256"], same).to_pylist()
    verdicts = read_verdicts(root, [row["id"] for row in found])
    found.sort(key=lambda row: (verdicts[row["id"]][1] != "", row["id"]))
    others = {row["id"]: [one["id"] for one in found if one["sha256"] == row["sha256"]] for row in rows}
    return {clip_id: next((one for one in ids if one != clip_id), "") for clip_id, ids in others.items()}


def read_rows(root: Path, step: str, name: str, key: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rows of a step's table whose column `key` has one of `ids`, by it; none where there is no such table."""
    path = _table(root, step, name)
    if not path.is_file() or not ids:
        return {}
    return {row[key]: row for row in _read(path, None, ds.field(key).isin(list(ids))).to_pylist()}


def _rejected_rows(root: Path, step: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    names = [*ids, *(f"{stage}-{one}" for one in ids for stage in (1, 2) if step in _OF_PAIRS)]
    return {_clip_id(step, key): row for key, row in read_rows(root, step, "rejected", "id", names).items()}


def _read(path: Path, columns: Sequence[str] | None, condition: Any) -> pa.Table:
    try:
        return ds.dataset(path, format="parquet").to_table(columns=columns and list(columns), filter=condition)
    except (pa.ArrowException, OSError) as error:
        raise CorruptDataError(
            f"The table {path} can't be read ({str(error).splitlines()[0]}); run the step that makes it again."
        ) from error


def _of_json(value: Any) -> dict[str, Any]:
    """A JSON object as a dictionary; anything else is an empty one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}
