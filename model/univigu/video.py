"""Video files: H.264 in and out, and whatever people have, as pixels. It knows PyAV and numpy, and no torch.

Frames are uint8 RGB arrays of shape (F, H, W, 3) everywhere. A training clip is stored as 4:4:4 H.264 at a low rate
factor, which keeps the colours of a small picture; a clip made for a person is 4:2:0, which every player plays. One
encoder thread, no clock and no host: equal frames, equal bytes.

Pixels are FFmpeg's own: the matrix and range that a frame is tagged with (BT.601 and limited where it isn't, at any
size), the same chroma filter, alpha left out. HDR is tone-mapped to BT.709 by swscale's perceptual intent.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from univigu.decoding import Video, open_video, read_frames, read_packets
from univigu.errors import BadInputError, VideoError

RATE_FACTOR = 6  # x264's crf: under one grey level of mean error on 32x32 clips, at about 2 KB a clip
MAX_SIDE = 1280  # larger user frames are scaled down while they are read: no model here looks at more pixels
MAX_FRAMES = 256
# On frames of a few macroblocks x264's lookahead weighs memory that nobody wrote, so equal frames gave other bytes.
_REPEATABLE = "mbtree=0:rc-lookahead=0:weightp=0"
_BT601, _LIMITED = 6, 1  # SMPTE 170M matrix and limited range, as swscale converts by default: tagged, so players agree


_HDR = {16: "pq", 18: "hlg"}  # transfer characteristics of ITU-T H.273: SMPTE ST 2084 and ARIB STD-B67
_BT2020_NCL, _BT2020, _UNTAGGED = 9, 9, 2  # matrix and primaries of HDR that doesn't name its own


def encode_mp4(frames: np.ndarray, fps: float, pixel_format: str = "yuv444p") -> bytes:
    """Frames uint8 (F, H, W, 3), RGB, as an H.264 mp4; `pixel_format` "yuv420p" (even sizes only) plays everywhere.

    Raises `BadInputError` for frames of another shape or kind, for none, and for a frame rate that isn't positive.
    """
    import av

    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise BadInputError(
            f"A video needs frames of shape (F, H, W, 3) as uint8, and got {frames.shape} as {frames.dtype}; fix them."
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
    """Every frame of a video that `encode_mp4` made, uint8 (F, H, W, 3), and its frames per second.

    Whoever needs to know that the bytes are whole compares their hash. Raises `BadInputError` for what is no video.
    """
    import av

    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), format="mp4") as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            return np.stack(frames), float(container.streams.video[0].average_rate)
    except (av.error.FFmpegError, ValueError, IndexError, TypeError) as error:
        raise BadInputError(f"A clip is no mp4 that was made here ({error}); make it again.") from error


# --- people's videos -------------------------------------------------------------------------------------------------


def read_video(source: bytes | Path, max_frames: int | None = MAX_FRAMES) -> tuple[np.ndarray, float]:
    """A video file of any common kind as frames uint8 (F, H, W, 3), upright, and the frame rate of what is returned.

    Pixels are made square, and a frame with a side over `MAX_SIDE` of them is scaled down. Of a video with more than
    `max_frames` frames, that many are kept, evenly spread over its whole length, and never more than twice as many are
    held in memory. Raises `MissingInputError` where there is no such file, and `VideoError` where it is not a whole,
    readable video within the bounds of `univigu.decoding`.
    """
    with open_video(source) as video:
        frames, share = _thin(_bounded(video), max_frames)
        return np.stack(frames), share / video.interval


class VideoFacts(NamedTuple):
    """What a video file holds: when its last frame appears and goes, and its size upright, in square pixels."""

    last: float  # seconds from the first frame
    seconds: float  # what a file says of its last frame's duration is often a guess
    height: int
    width: int
    hdr: str  # "pq" or "hlg"; empty for a standard dynamic range

    def frames(self, fps: float) -> int:
        """How many frames the video has at another frame rate."""
        return max(math.floor(self.last * fps + 0.1) + 1, round(self.seconds * fps))


def probe_video(source: bytes | Path) -> VideoFacts:
    """The facts of a video file, of which only the first frame is decoded; raises as `read_video` does."""
    with open_video(source) as video:
        _, first = next(read_frames(video))
        height, width = _upright_size(first, video.pixel_aspect)
        hdr = _find_hdr(first, video)
    with open_video(source) as video:
        begin, last, end = _find_times(video)
    return VideoFacts(last - begin, end - begin, max(1, round(height)), max(1, round(width)), hdr)


def _find_times(video: Video) -> tuple[float, float, float]:
    """When the first frame and the last one appear, and when the last one goes, in seconds, by the packets alone."""
    shown, others = [], []
    for packet, needed in read_packets(video):
        if packet.size:
            at = packet.pts if packet.pts is not None else packet.dts
            start = float(at * packet.time_base) if at is not None else len(shown) * video.interval
            length = float((packet.duration or 0) * packet.time_base) or video.interval
            (shown if needed else others).append((start, start + length))
    starts, ends = zip(*(shown or others), strict=True)
    return min(starts), max(starts), max(ends)


def sample_video(source: bytes | Path, times: Sequence[float], height: int, width: int) -> np.ndarray:
    """The frames that a video file shows at `times`, uint8 (F, height, width, 3), whatever its frame rate does.

    times: seconds from the first frame, in order. Each frame is turned upright, its pixels made square, scaled to cover
    `height` x `width` and cut to it around the centre. All of the file is decoded. Raises as `read_video` does.
    """
    chosen: list[np.ndarray] = []
    with open_video(source) as video:
        to_rgb, aspect = _converter(video), video.pixel_aspect
        held, begin = None, 0.0
        for at, frame in read_frames(video):
            begin = at if held is None else begin
            due = sum(time < at - begin for time in times[len(chosen) :])
            if due and held is not None:
                chosen += [_cover(held, height, width, aspect, to_rgb)] * due
            held = frame
        chosen += [_cover(held, height, width, aspect, to_rgb)] * (len(times) - len(chosen))
        return np.stack(chosen)


def _bounded(video: Video) -> Iterator[np.ndarray]:
    """Each frame as an upright RGB array, all of the first one's size, and none with a side over `MAX_SIDE`."""
    to_rgb, size = _converter(video), None
    for _, frame in read_frames(video):
        if size is None:
            height, width = _upright_size(frame, video.pixel_aspect)
            scale = min(1.0, MAX_SIDE / max(height, width))
            size = max(1, round(height * scale)), max(1, round(width * scale))
        yield _draw(frame, *size, to_rgb)


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


# --- pixels ----------------------------------------------------------------------------------------------------------

ToRGB = Callable[[Any, int, int], np.ndarray]  # a frame, the width and height to scale it to -> (height, width, 3)


def fit_frames(frames: np.ndarray, count: int, height: int, width: int) -> np.ndarray:
    """Frames (F, H, W, 3) as a model takes them: `count` evenly spaced ones (some twice if F is less), each scaled to
    cover `height` x `width` and cut to it around the centre. Frames that fit already come back as they are."""
    import av

    frames = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    if frames.shape[1:3] == (height, width):
        return frames
    pictures = (av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24") for array in frames)
    return np.stack([_cover(picture, height, width, 1.0, _to_rgb) for picture in pictures])


def _cover(frame: Any, height: int, width: int, pixel_aspect: float, to_rgb: ToRGB) -> np.ndarray:
    """A frame turned upright, scaled to cover `height` x `width`, and cut to it around the centre: uint8 RGB."""
    high, broad = _upright_size(frame, pixel_aspect)
    scale = max(height / high, width / broad)
    tall, wide = max(height, round(high * scale)), max(width, round(broad * scale))
    top, left = (tall - height) // 2, (wide - width) // 2
    return _draw(frame, tall, wide, to_rgb)[top : top + height, left : left + width]


def _draw(frame: Any, height: int, width: int, to_rgb: ToRGB) -> np.ndarray:
    """A frame turned upright, scaled to `height` x `width`: uint8 RGB."""
    sideways, mirrored, upside_down = _find_orientation(frame)
    pixels = to_rgb(frame, *((height, width) if sideways else (width, height)))
    pixels = pixels.swapaxes(0, 1) if sideways else pixels
    return pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]


def _upright_size(frame: Any, pixel_aspect: float) -> tuple[float, float]:
    """Height and width of a frame as it is shown, in square pixels."""
    height, width = frame.height, frame.width * pixel_aspect
    return (width, height) if _find_orientation(frame)[0] else (height, width)


def _find_orientation(frame: Any) -> tuple[bool, bool, bool]:
    """What makes a frame upright, in this order: to swap rows and columns, to mirror it, to turn it upside down.

    The display matrix maps (x, y) to (a x + c y, b x + d y), y downwards (ISO/IEC 14496-12, 6.2.2); of the eight
    orientations of a picture, the one nearest to it counts. One of zeros, which some tools write, says nothing.
    """
    matrix = _side_data(frame, "DISPLAYMATRIX")
    if len(matrix) < 36:
        return False, False, False
    a, b, _, c, d = np.frombuffer(matrix, "=i4", 5).astype(float)
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def _side_data(frame: Any, kind: str) -> bytes:
    """The bytes of one kind of a frame's side data, empty where it has none."""
    try:
        return bytes(frame.side_data[kind])
    except KeyError:
        return b""


def _to_rgb(frame: Any, width: int, height: int) -> np.ndarray:
    return frame.to_ndarray(format="rgb24", width=width, height=height, interpolation=_filter(frame, width, height))


def _filter(frame: Any, width: int, height: int) -> str:
    """FFmpeg's own filter; for a smaller picture the one that averages, as others alias in a moving picture."""
    return "AREA" if width * height < frame.width * frame.height else "BICUBIC"


def _find_hdr(frame: Any, video: Video) -> str:
    """Which transfer function of HDR a frame has, by its own tag or else by its stream's; empty for none.

    Raises `VideoError` (`hdr`) for Dolby Vision without a picture for other screens.
    """
    transfer = frame.color_trc if frame.color_trc != _UNTAGGED else video.transfer
    if transfer not in _HDR and _side_data(frame, "DOVI_METADATA"):
        raise VideoError(f"{video.name} is in Dolby Vision alone; convert it to HDR10 or SDR.", "hdr")
    return _HDR.get(transfer, "")


def _converter(video: Video) -> ToRGB:
    """What makes RGB pixels of this video's frames: of HDR, what a BT.709 screen can show."""
    tone_maps: dict[tuple[Any, ...], Any] = {}

    def to_rgb(frame: Any, width: int, height: int) -> np.ndarray:
        hdr = _find_hdr(frame, video)
        if not hdr:
            return _to_rgb(frame, width, height)
        key = hdr, frame.format.name, frame.width, frame.height, width, height
        tone_maps[key] = graph = tone_maps.get(key) or _tone_map(frame, width, height)
        frame.color_trc = next(number for number, name in _HDR.items() if name == hdr)
        frame.colorspace = _BT2020_NCL if frame.colorspace == _UNTAGGED else frame.colorspace
        frame.color_primaries = _BT2020 if frame.color_primaries == _UNTAGGED else frame.color_primaries
        graph.push(frame)
        return graph.pull().to_ndarray()

    return to_rgb


def _tone_map(frame: Any, width: int, height: int) -> Any:
    """An FFmpeg filter graph from frames like this one to RGB of that size."""
    import av

    graph = av.filter.Graph()
    to_sdr = "out_transfer=bt709:out_primaries=bt709:intent=perceptual"
    scale = f"w={width}:h={height}:flags={_filter(frame, width, height).lower()}:{to_sdr}"
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000))
    nodes = source, graph.add("scale", scale), graph.add("format", "rgb24"), graph.add("buffersink")
    graph.link_nodes(*nodes).configure()
    return graph
