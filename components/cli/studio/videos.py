"""Videos as every browser plays them: H.264 in 4:2:0 with the index in front, made when a page asks for them."""

import hashlib
import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from components.cli.studio import clips, runs
from components.cli.studio.work import Studio
from univigu.errors import MissingInputError

if TYPE_CHECKING:
    import numpy as np


_PAIR = re.compile(r"[0-9a-f]{32}")


def find_video(studio: Studio, kind: str, name: str) -> Path:
    """The file of a video that a page shows; raises `MissingInputError` if there is none.

    kind: `clip` of the data, `sample` of a training run, or `pair`: one of two that are compared.
    """
    if kind == "clip":
        return _playable(studio, clips.read_clip(studio.root, name))
    if kind == "sample":
        return _playable(studio, runs.read_sample_video(studio, name))
    if kind == "pair" and _PAIR.fullmatch(name) and pair_video(studio, name).is_file():
        return pair_video(studio, name)
    raise MissingInputError(f"The studio shows no such video of the kind '{kind}'; open its page again.")


def pair_video(studio: Studio, name: str) -> Path:
    """Where a video of a pair is; its name must be one that we drew."""
    return studio.cache / "pairs" / f"{name}.mp4"


def _playable(studio: Studio, content: bytes) -> Path:
    """A training clip, whose colours have their full resolution, as a file that plays everywhere; it is kept."""
    from univigu.video import decode_mp4

    path = studio.cache / "videos" / f"{hashlib.sha256(content).hexdigest()}.mp4"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(path, *decode_mp4(content))
    return path


def write_mp4(path: Path, frames: "np.ndarray", fps: float, comment: str = "") -> None:
    """Write frames uint8 (F, H, W, 3), enlarged for people, as an mp4 with its index in front.

    comment: text for the file's metadata. The file is complete or absent.
    """
    from univigu.clip_formats import encode_clip, enlarge, enlargement

    _, height, width, _ = frames.shape
    write_streamable(path, encode_clip(enlarge(frames, enlargement(height, width)), fps, ".mp4"), comment)


def write_streamable(path: Path, content: bytes, comment: str = "") -> None:
    """Write an mp4 with its index in front, so that it plays while it is fetched.

    comment: text for the file's metadata. The file is complete and on the disk, or absent.
    """
    import av

    from univigu.files import sync

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    try:
        # FFmpeg moves the index by reading the file again, so it needs one on disk
        with av.open(io.BytesIO(content), "r") as source, av.open(str(partial), "w", "mp4", options=options) as target:
            if comment:
                target.metadata["comment"] = comment
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
