"""What was made in the studio: a folder per result in ``.univigu/gallery`` of the work root, with all that made it.

`clip.mp4` keeps the frames as training clips are kept, `recipe.json` says what was asked of which model, and
`caption.txt` is the text, if there is one. A result is complete or absent, and survives a restart.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.cli.clip_files import name_after
from components.cli.studio.videos import write_mp4
from components.cli.studio.work import Studio
from components.pipeline.state import STATE
from univigu.clip_formats import SUFFIXES
from univigu.errors import CorruptDataError, MissingInputError
from univigu.files import read_json_object, write_json

if TYPE_CHECKING:
    import numpy as np

PAGE = 12  # results of a page
CLIP, RECIPE, CAPTION = "clip.mp4", "recipe.json", "caption.txt"
_ID = re.compile(r"\d{8}T\d{6}-[0-9a-f]{6}")


class Result(NamedTuple):
    """A result of the gallery."""

    id: str
    recipe: dict[str, Any]
    caption: str

    @property
    def name(self) -> str:
        """The name of its files, made from the prompt."""
        return name_after(str(self.recipe.get("prompt") or self.recipe.get("file") or ""))


def home(root: Path) -> Path:
    return root / STATE / "gallery"


def save(root: Path, frames: "np.ndarray", fps: float, recipe: Mapping[str, Any], caption: str) -> Result:
    """Add frames uint8 (F, H, W, 3) with their recipe and caption ("" for none)."""
    from univigu.video import encode_mp4

    now = datetime.now(UTC)
    result_id = f"{now:%Y%m%dT%H%M%S}-{now.microsecond:05x}{secrets.randbits(4):x}"  # sorted as they were made
    made = {**recipe, "made": now.isoformat(timespec="seconds"), "frames": len(frames), "fps": fps}
    folder = home(root) / result_id
    partial = folder.with_name(f".{result_id}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        (partial / CLIP).write_bytes(encode_mp4(frames, fps))
        write_json(partial / RECIPE, made)
        if caption:
            (partial / CAPTION).write_text(caption + "\n", encoding="utf-8")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Result(result_id, made, caption)


def list_results(root: Path, page: int) -> tuple[list[Result], int, int]:
    """The results of a page, the newest first, the number of this page (from 1), and the number of all pages."""
    folder = home(root)
    names = [one.name for one in folder.iterdir()] if folder.is_dir() else []
    ids = sorted(filter(_ID.fullmatch, names), reverse=True)
    pages = max(1, -(-len(ids) // PAGE))
    page = min(max(1, page), pages)
    found = []
    for result_id in ids[(page - 1) * PAGE : page * PAGE]:
        try:
            found.append(read(root, result_id))
        except (MissingInputError, CorruptDataError):
            continue  # removed or damaged meanwhile; the others are shown
    return found, page, pages


def read(root: Path, result_id: str) -> Result:
    """A result; raises `MissingInputError` if there is none, and `CorruptDataError` if its recipe can't be read."""
    folder = home(root) / result_id
    if not _ID.fullmatch(result_id) or not folder.is_dir():
        raise MissingInputError("There is no such result in the gallery; open its page again.")
    try:
        caption = folder / CAPTION
        text = caption.read_text(encoding="utf-8").strip() if caption.is_file() else ""
        return Result(result_id, read_json_object(folder / RECIPE), text)
    except (OSError, ValueError) as error:
        raise CorruptDataError(f"The result {folder} can't be read ({error}); delete the folder.") from error


def export(studio: Studio, name: str) -> tuple[Path, str]:
    """The file ``ID.SUFFIX`` of a result, made when it is asked for, and the name that it is saved under.

    SUFFIX: mp4 (with the recipe in its metadata as the tag `comment`), webm or gif, txt for the caption, or json for
    the recipe.
    """
    result_id, _, suffix = name.partition(".")
    result = read(studio.root, result_id)
    folder, saved_as = home(studio.root) / result_id, f"{result.name}.{suffix}"
    kept = {"txt": CAPTION, "json": RECIPE}.get(suffix)
    if kept:
        if not (folder / kept).is_file():
            raise MissingInputError("This result has no caption.")
        return folder / kept, saved_as
    if f".{suffix}" not in SUFFIXES:
        raise MissingInputError(f"Results are exported as mp4, webm or gif, and not as '{suffix}'.")
    path = studio.cache / "videos" / f"{result_id}-{_stamp(folder)}.{suffix}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        _encode(folder, result, path)
    return path, saved_as


def _stamp(folder: Path) -> str:
    return hashlib.sha256(str((folder / CLIP).stat().st_mtime_ns).encode()).hexdigest()[:8]


def _encode(folder: Path, result: Result, path: Path) -> None:
    from univigu.clip_formats import encode_clip, enlarge, enlargement
    from univigu.files import replaced
    from univigu.video import decode_mp4

    frames, fps = decode_mp4(folder / CLIP)
    if path.suffix == ".mp4":
        write_mp4(path, frames, fps, json.dumps({**result.recipe, "caption": result.caption}, ensure_ascii=False))
        return
    content = encode_clip(enlarge(frames, enlargement(*frames.shape[1:3])), fps, path.suffix)
    with replaced(path) as stream:
        stream.write(content)
