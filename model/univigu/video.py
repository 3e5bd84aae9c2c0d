"""Video files: H.264 in and out, and whatever people have, read within bounds. It knows PyAV and numpy, and no torch.

Frames are uint8 RGB arrays of shape (F, H, W, 3) everywhere. A training clip is stored as 4:4:4 H.264 at a low rate
factor, which keeps the colours of a small picture; a clip made for a person is 4:2:0, which every player plays. One
encoder thread, no clock and no host: equal frames, equal bytes.
"""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

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


class NoVideoError(BadInputError):
    """A file that can be read, and has no moving pictures in it."""


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
    with _opened(source) as (container, stream, name):
        rate = float(stream.average_rate or stream.guessed_rate or 0) or 25.0
        frames, share = _thin(_bounded(_decode(container, stream, name)), max_frames)
    return np.stack(frames), rate * share


class VideoFacts(NamedTuple):
    """What a video file holds: when its last frame appears and goes, and its size upright, in square pixels."""

    last: float  # seconds from the first frame
    seconds: float  # what a file says of its last frame's duration is often a guess
    height: int
    width: int

    def frames(self, fps: float) -> int:
        """How many frames the video has at another frame rate."""
        return max(math.floor(self.last * fps + 0.1) + 1, round(self.seconds * fps))


def probe_video(source: bytes | Path) -> VideoFacts:
    """The facts of a video file, of which only the first frame is decoded; raises as `read_video` does."""
    shown: list[tuple[float, float]] = []
    first = None
    with _opened(source) as (container, stream, name):
        interval = 1 / (float(stream.average_rate or stream.guessed_rate or 0) or 25.0)
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                at = packet.pts if packet.pts is not None else packet.dts
                start = float(at * packet.time_base) if at is not None else len(shown) * interval
                shown.append((start, float((packet.duration or 0) * packet.time_base) or interval))
            if first is None:
                first = next(iter(packet.decode()), None)
        if first is None:
            raise BadInputError(f"There is not a single frame in {name}; give a video that plays.")
        height, width = first.height, max(1, round(first.width * _pixel_aspect(stream)))
        if _quarter_turns(first) % 2:
            height, width = width, height
    begin = min(shown)[0]
    return VideoFacts(max(shown)[0] - begin, max(start + length for start, length in shown) - begin, height, width)


def sample_video(source: bytes | Path, times: Sequence[float], height: int, width: int) -> np.ndarray:
    """The frames that a video file shows at `times`, uint8 (F, height, width, 3), whatever its frame rate does.

    times: seconds from the first frame, in order. Each frame is turned upright, its pixels made square, scaled to cover
    `height` x `width` and cut to it around the centre. All of the file is decoded. Raises as `read_video` does.
    """
    chosen: list[np.ndarray] = []
    with _opened(source) as (container, stream, name):
        interval = 1 / (float(stream.average_rate or stream.guessed_rate or 0) or 25.0)
        aspect = _pixel_aspect(stream)
        held, begin = None, 0.0
        for number, frame in enumerate(_decode(container, stream, name)):
            at = float(frame.time) if frame.time is not None else number * interval
            begin = at if held is None else begin
            due = sum(time < at - begin for time in times[len(chosen) :])
            if due and held is not None:
                chosen += [_cover(held, height, width, aspect)] * due
            held = frame
        chosen += [_cover(held, height, width, aspect)] * (len(times) - len(chosen))
    return np.stack(chosen)


@contextmanager
def _opened(source: bytes | Path) -> Iterator[tuple[Any, Any, str]]:
    """A video's container, its first stream with moving pictures, and what to call it; names what goes wrong in it."""
    import av

    name = "the video" if isinstance(source, bytes) else f"'{source}'"
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise MissingInputError(f"There is no video file {name}; check the path.")
    opened = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    try:
        with av.open(opened, options=options) as container:
            cover = av.stream.Disposition.attached_pic  # the picture of an album is no video
            streams = [stream for stream in container.streams.video if not stream.disposition & cover]
            if not streams:
                raise NoVideoError(f"There is no picture in {name}, only other streams; give a file with a video.")
            streams[0].codec_context.thread_count = 1
            streams[0].codec_context.options = {"err_detect": "explode"}
            yield container, streams[0], name
    except av.error.FFmpegError as error:
        raise BadInputError(
            f"It was not possible to read {name} as a video ({error.strerror}); check that it is whole and plays."
        ) from error


def _decode(container: Any, stream: Any, name: str) -> Iterator[Any]:
    """Each `av.VideoFrame` in order; raises `BadInputError` unless the whole of the video could be read."""
    stored = shown = 0
    end, last, interlaced = 0.0, 0.0, False
    for packet in container.demux(stream):
        stored += bool(packet.size) and not packet.is_discard  # what lies before a trimmed video's start is not shown
        for frame in packet.decode():
            if frame.is_corrupt:
                raise BadInputError(f"A frame in the middle of {name} is damaged; get the file afresh.")
            shown += 1
            interlaced = interlaced or frame.interlaced_frame
            if frame.time is not None:
                last = float((frame.duration or 0) * frame.time_base)
                end = max(end, float(frame.time) + last)
            yield frame
    if not shown:
        raise BadInputError(f"There is not a single frame in {name}; give a video that plays.")
    if shown < stored and not interlaced:  # a packet may hold one field of two
        raise BadInputError(f"Only {shown} of {stored} frames of {name} can be read; it is damaged, get it afresh.")
    promised = float(((stream.start_time or 0) + (stream.duration or 0)) * stream.time_base)
    if end and end + max(2 * last, 0.1) < promised:
        raise BadInputError(f"{name} ends after {end:.2f} of {promised:.2f} s; it is damaged, get it afresh.")


def _bounded(frames: Iterable[Any]) -> Iterator[np.ndarray]:
    """Each frame as an upright RGB array, all of the first one's size, and none with a side over `MAX_SIDE`."""
    size = None
    for frame in frames:
        if size is None:
            scale = min(1.0, MAX_SIDE / max(frame.width, frame.height))
            size = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
        turns = _quarter_turns(frame)
        if (frame.width, frame.height) != size:
            frame = frame.reformat(width=size[0], height=size[1], interpolation="AREA")
        yield np.rot90(frame.to_ndarray(format="rgb24"), k=turns)


def _quarter_turns(frame: Any) -> int:
    return round(frame.rotation / 90) % 4


def _pixel_aspect(stream: Any) -> float:
    """How many times as wide as high a pixel is."""
    return float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1) or 1.0


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
    pictures = (av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24") for array in frames)
    return np.stack([_cover(picture, height, width) for picture in pictures])


def _cover(frame: Any, height: int, width: int, pixel_aspect: float = 1.0) -> np.ndarray:
    """A frame turned upright, scaled to cover `height` x `width`, and cut to it around the centre: uint8 RGB."""
    turns = _quarter_turns(frame)
    high, broad = frame.height, frame.width * pixel_aspect
    if turns % 2:
        high, broad = broad, high
    scale = max(height / high, width / broad)
    tall, wide = max(height, round(high * scale)), max(width, round(broad * scale))
    top, left = (tall - height) // 2, (wide - width) // 2
    stored = (tall, wide) if turns % 2 else (wide, tall)
    scaled = frame.to_ndarray(format="rgb24", width=stored[0], height=stored[1], interpolation="AREA")
    return np.rot90(scaled, k=turns)[top : top + height, left : left + width]
