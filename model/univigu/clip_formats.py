"""Clips for people, as mp4, webm or gif. Equal frames give equal bytes in each of them.

Training clips are always mp4, written by :func:`univigu.video.encode_mp4`.
"""

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from univigu.errors import BadInputError
from univigu.video import encode_mp4

SUFFIXES = (".mp4", ".webm", ".gif")
LEGIBLE = 256  # pixels of the shorter side up to which a small clip is enlarged for people
_QUALITY = "16"  # libvpx's crf: no visible loss on enlarged clips


def encode_clip(frames: np.ndarray, fps: float, suffix: str) -> bytes:
    """RGB frames uint8 (F, H, W, 3) as a file of the format that `suffix` names (one of `SUFFIXES`).

    An odd row or column at the lower or right edge is cut off from mp4 and webm, whose colours have half the
    resolution. Raises `BadInputError` for another suffix.
    """
    if suffix.lower() not in SUFFIXES:
        raise BadInputError(f"Clips are written as {', '.join(SUFFIXES)}, and not as '{suffix}'; use one of these.")
    even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    if suffix.lower() == ".mp4":
        return encode_mp4(even, fps, "yuv420p")
    return _encode_webm(even, fps) if suffix.lower() == ".webm" else _encode_gif(frames, fps)


def enlargement(height: int, width: int) -> int:
    """The whole factor by which a clip is enlarged for people: its shorter side gets at most `LEGIBLE` pixels."""
    return max(1, LEGIBLE // min(height, width))


def enlarge(frames: np.ndarray, factor: int) -> np.ndarray:
    """Frames (F, H, W, 3) with `factor` x `factor` pixels for each of theirs; a model that fits them gets its own."""
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def _encode_webm(frames: np.ndarray, fps: float) -> bytes:
    import av

    target = io.BytesIO()
    with av.open(target, "w", format="webm", options={"fflags": "+bitexact"}) as container:
        stream = _add_stream(container, "libvpx-vp9", frames, fps, "yuv420p")
        stream.options = {"crf": _QUALITY, "b": "0", "cpu-used": "4", "row-mt": "0"}
        for picture in _pictures(frames):
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return target.getvalue()


def _encode_gif(frames: np.ndarray, fps: float) -> bytes:
    """One palette for all frames, without dithering, so that plain areas stay plain; it loops for ever."""
    import av

    target = io.BytesIO()
    with av.open(target, "w", format="gif", options={"loop": "0"}) as container:
        stream = _add_stream(container, "gif", frames, fps, "pal8")
        for picture in _in_palette(frames, stream.codec_context.time_base):
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return target.getvalue()


def _in_palette(frames: np.ndarray, time_base: Fraction) -> Iterator[Any]:
    """The frames as pictures of at most 256 colours, chosen by FFmpeg's `palettegen` from all of them."""
    import av

    graph = av.filter.Graph()
    graph.threads = 1
    height, width = frames.shape[1:3]
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=time_base)
    split, palette = graph.add("split"), graph.add("palettegen", "reserve_transparent=0")
    use, sink = graph.add("paletteuse", "dither=none"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for number, picture in enumerate(_pictures(frames)):
        picture.pts, picture.time_base = number, time_base
        source.push(picture)
    source.push(None)
    for _ in frames:
        yield sink.pull()


def _add_stream(container: Any, codec: str, frames: np.ndarray, fps: float, pixel_format: str) -> Any:
    rate = Fraction(fps).limit_denominator(1001)
    stream = container.add_stream(codec, rate=rate)
    stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pixel_format
    stream.codec_context.thread_count, stream.codec_context.time_base = 1, 1 / rate
    return stream


def _pictures(frames: np.ndarray) -> Iterator[Any]:
    import av

    for array in frames:
        yield av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
