"""The file that `univigu generate` and `univigu joint` write: its name, its checks, and its content.

A clip is written to a temporary file and renamed, so it is never incomplete.
"""

import errno
import os
import re
import unicodedata
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from components.cli.messages import say
from univigu.errors import BadInputError, DiskFullError, MissingInputError

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".mp4", ".webm", ".gif")
LONGEST = 60  # characters of a name that is made from a prompt
_MOST_BYTES = 150  # of such a name: a file's name has at most 255, and the temporary one is longer


def name_after(prompt: str) -> str:
    """A file name made from a prompt, without suffix: its words, joined by hyphens; `clip` if it has none."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt).lower())
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else word[:LONGEST]
        if len(longer) > LONGEST or len(longer.encode()) > _MOST_BYTES:
            break
        name = longer
    return name or "clip"


def check_output(path: Path | None) -> None:
    """Raise an error, before anything is computed, if the clip can't be written to `path`, or here if it is None."""
    folder = Path() if path is None else path.parent
    if path is not None and path.is_dir():
        raise BadInputError(f"'{path}' is a folder; give the name of the clip to write, such as {path / 'clip.mp4'}.")
    if not folder.is_dir():
        raise MissingInputError(f"There is no folder '{folder}' to write the clip to; create it first.")
    if path is not None and path.exists() and not path.is_file():
        return  # a device or a pipe may have any name
    if path is not None and path.suffix.lower() not in SUFFIXES:
        raise BadInputError(
            f"Clips are written as mp4, webm or gif, but '{path}' has another suffix; use '{path.stem}.mp4'."
        )
    if not os.access(folder, os.W_OK):
        raise BadInputError(f"The folder '{folder.resolve()}' is not writable; choose another place with -o.")


def write_clip(path: Path | None, prompt: str, frames: "np.ndarray", fps: float, scale: int | None) -> None:
    """Write frames (F, H, W, 3) to `path`, or to a new file here that is named after the prompt; say which.

    scale: the factor of enlargement; None enlarges small clips.
    """
    from univigu.clip_formats import encode_clip, enlarge, enlargement

    _, height, width, _ = frames.shape
    factor = enlargement(height, width) if scale is None else scale
    content = encode_clip(enlarge(frames, factor), fps, _format(path))
    chosen = path
    try:
        chosen = _reserve(Path(f"{name_after(prompt)}.mp4")) if path is None else path
        _write(chosen, content)
    except OSError as error:
        if path is None and chosen is not None:
            chosen.unlink(missing_ok=True)
        raise write_error(f"'{chosen or 'the clip'}'", error) from error
    enlarged = f", enlarged from {width}x{height}" if factor > 1 else ""
    off = " (`--scale 1` turns this off)" if enlarged and scale is None else ""
    say(f"{chosen}: {len(frames)} frames of {width * factor}x{height * factor} at {fps:g} fps{enlarged}{off}")


def write_error(what: str, error: OSError) -> Exception:
    """The error to raise where `what` can't be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"The disk is full, so {what} could not be written; free some space and run it again.")
    return BadInputError(f"Can't write {what} ({error.strerror}); choose another destination.")


def _format(path: Path | None) -> str:
    suffix = ".mp4" if path is None else path.suffix.lower()
    return suffix if suffix in SUFFIXES else ".mp4"  # a device


def _reserve(path: Path) -> Path:
    """`path`, or the first of path-2, path-3 and so on that doesn't exist, as a new empty file."""
    for number in count(1):
        candidate = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        try:
            candidate.open("xb").close()
            return candidate
        except FileExistsError:
            continue
    raise AssertionError


def _write(path: Path, content: bytes) -> None:
    special = path.exists() and not path.is_file()
    target = path if special else path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with target.open("wb") as stream:
            stream.write(content)
            stream.flush()
            if not special:
                os.fsync(stream.fileno())
        if not special:
            target.replace(path)
    finally:
        if not special:
            target.unlink(missing_ok=True)
