"""Video files: H.264 in and out, and whatever people have, read within bounds. It knows PyAV and numpy, and no torch.

Frames are uint8 RGB arrays of shape (F, H, W, 3) everywhere. A training clip is stored as 4:4:4 H.264 at a low rate
factor, which keeps the colours of a small picture; a clip made for a person is 4:2:0, which every player plays. One
encoder thread, no clock and no host: equal frames, equal bytes.
"""

import io
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from univigu.errors import BadInputError, MissingInputError

RATE_FACTOR = 6  # x264's crf: under one grey level of mean error on 32x32 clips, at about 2 KB a clip
MAX_SIDE = 1280  # larger user frames are scaled down while they are read: no model here looks at more pixels
MAX_FRAMES = 256
# Demuxers that hold media themselves. Playlists (HLS, concat ...) are left out: they can name other files and hosts.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,flv,asf,ogg,yuv4mpegpipe"
# On frames of a few macroblocks x264's lookahead weighs memory that nobody wrote, so equal frames gave other bytes.
_REPEATABLE = "mbtree=0:rc-lookahead=0:weightp=0"
_BT601, _LIMITED = 6, 1  # SMPTE 170M matrix and limited range, as swscale converts by default: tagged, so players agree


def encode_mp4(frames: np.ndarray, fps: float, pixel_format: str = "yuv444p") -> bytes:
    """Frames uint8 (F, H, W, 3), RGB, as an H.264 mp4; `pixel_format` "yuv420p" (even sizes only) plays everywhere.

    Raises `BadInputError` for frames of another shape or kind, for none, and for a frame rate that isn't positive.
    """
    import av

    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise BadInputError(
            f"A video needs frames of shape (F, H, W, 3) as uint8, and got {frames.shape} as {frames.dtype}; mend them."
        )
    if not (np.isfinite(fps) and fps > 0):
        raise BadInputError(f"A video can't have {fps} frames per second; give a positive number.")
    _, height, width, _ = frames.shape
    if pixel_format == "yuv420p" and (height % 2 or width % 2):
        raise BadInputError(f"A yuv420p video needs even sides, and got {height}x{width}; use yuv444p or crop it.")
    target = io.BytesIO()
    with av.open(target, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.options = {"crf": str(RATE_FACTOR), "preset": "medium", "x264-params": _REPEATABLE}
        context = stream.codec_context
        context.thread_count = 1
        context.colorspace, context.color_range = _BT601, _LIMITED
        for array in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return target.getvalue()


def decode_mp4(source: bytes | Path) -> tuple[np.ndarray, float]:
    """Every frame of a video of ours, uint8 (F, H, W, 3), and its frames per second; raises as `read_video` does."""
    frames, fps = read_video(source, max_frames=None)
    return frames, fps


def read_video(source: bytes | Path, max_frames: int | None = MAX_FRAMES) -> tuple[np.ndarray, float]:
    """A video file of any common kind as frames uint8 (F, H, W, 3), upright, and the frame rate of what is returned.

    Of a video with more than `max_frames` frames, that many are kept, evenly spread over its whole length, and never
    more than twice as many are held in memory. A frame with a side over `MAX_SIDE` pixels is scaled down.
    Raises `MissingInputError` where there is no such file, and `BadInputError` where it is not a whole, readable video.
    """
    import av

    name = "the video" if isinstance(source, bytes) else f"'{source}'"
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise MissingInputError(f"There is no video file {name}; check the path.")
    opened = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    try:
        with av.open(opened, options=options) as container:
            if not container.streams.video:
                raise BadInputError(f"There is no picture in {name}, only other streams; give a file with a video.")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"err_detect": "explode"}
            rate = float(stream.average_rate or stream.guessed_rate or 0) or 25.0
            frames, share = _thin(_pictures(container, stream, name), max_frames)
            promised = stream.frames
    except av.error.FFmpegError as error:
        raise BadInputError(
            f"It was not possible to read {name} as a video ({error.strerror}); check that it is whole and plays."
        ) from error
    if not frames:
        raise BadInputError(f"There is not a single frame in {name}; give a video that plays.")
    total = round(len(frames) / share)
    if promised and total < promised:
        raise BadInputError(f"Only {total} of {promised} frames of {name} can be read; it is damaged, get it afresh.")
    return np.stack(frames), rate * share


def _pictures(container: Any, stream: Any, name: str) -> Iterator[np.ndarray]:
    """Each frame as an upright RGB array, all of the first one's size."""
    size = None
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise BadInputError(f"A frame in the middle of {name} is damaged; get the file afresh.")
        if size is None:
            scale = min(1.0, MAX_SIDE / max(frame.width, frame.height))
            size = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
        if (frame.width, frame.height) != size:
            frame = frame.reformat(width=size[0], height=size[1], interpolation="AREA")
        yield np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90) % 4)


def _thin(frames: Iterable[np.ndarray], limit: int | None) -> tuple[list[np.ndarray], float]:
    """At most `limit` of the frames, evenly spread, and the share that they are; holds at most twice as many."""
    kept: list[np.ndarray] = []
    stride, total = 1, 0
    for frame in frames:
        if total % stride == 0:
            kept.append(frame)
        total += 1
        if limit is not None and len(kept) > 2 * limit:
            kept, stride = kept[::2], stride * 2
    if limit is not None and len(kept) > limit:
        kept = [kept[i] for i in np.linspace(0, len(kept) - 1, limit).round().astype(int)]
    return kept, len(kept) / max(total, 1)


def fit_frames(frames: np.ndarray, count: int, height: int, width: int) -> np.ndarray:
    """Frames (F, H, W, 3) as a model takes them: `count` evenly spaced ones (some twice if F is less), each scaled to
    cover `height` x `width` and cut to it around the centre. Frames that fit already come back as they are."""
    import av

    frames = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    if frames.shape[1:3] == (height, width):
        return frames
    scale = max(height / frames.shape[1], width / frames.shape[2])
    tall, wide = max(height, round(frames.shape[1] * scale)), max(width, round(frames.shape[2] * scale))
    top, left = (tall - height) // 2, (wide - width) // 2
    fitted = []
    for array in frames:
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
        scaled = picture.to_ndarray(format="rgb24", width=wide, height=tall, interpolation="AREA")
        fitted.append(scaled[top : top + height, left : left + width])
    return np.stack(fitted)
