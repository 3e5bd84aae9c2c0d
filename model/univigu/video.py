"""Video files: H.264 in and out, and whatever people have, as pixels. It knows PyAV and numpy, and no torch.

Frames are uint8 RGB arrays of shape (F, H, W, 3) everywhere. A training clip is stored as 4:4:4 H.264 at a low rate
factor, which keeps the colours of a small picture; a clip made for a person is 4:2:0, which every player plays. One
encoder thread, no clock and no host: equal frames, equal bytes.

Pixels are FFmpeg's own: the matrix and range that a frame is tagged with (BT.601 and limited where it isn't, at any
size), the same chroma filter, alpha left out. HDR is tone-mapped to BT.709.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from univigu.decoding import MAX_PIXELS_READ, Video, open_video, read_frames, read_packets
from univigu.errors import BadInputError, VideoError
from univigu.tone_mapping import to_sdr

RATE_FACTOR = 6  # x264's crf: under one grey level of mean error on 32x32 clips, at about 2 KB a clip
MAX_SIDE = 1280  # larger user frames are scaled down while they are read: no model here looks at more pixels
MAX_FRAMES = 256
# On frames of a few macroblocks x264's lookahead weighs memory that nobody wrote, so equal frames gave other bytes.
_REPEATABLE = "mbtree=0:rc-lookahead=0:weightp=0"
_BT601, _LIMITED = 6, 1  # SMPTE 170M matrix and limited range, as swscale converts by default: tagged, so players agree
_SIDE_DATA_KINDS = 64  # FFmpeg 8.1 has fewer than 40
_HDR = {16: "pq", 18: "hlg"}  # transfer characteristics of ITU-T H.273: SMPTE ST 2084 and ARIB STD-B67
_BT2020_NCL, _UNTAGGED = 9, 2  # the matrix of HDR that doesn't name its own


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
            # pyrefly: ignore[missing-attribute]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            # pyrefly: ignore[bad-argument-type]
            return np.stack(frames), float(container.streams.video[0].average_rate)
    except (av.error.FFmpegError, ValueError, IndexError, TypeError) as error:
        raise BadInputError(f"A clip is no mp4 that was made here ({error}); make it again.") from error


# --- people's videos -------------------------------------------------------------------------------------------------


def read_video(
    source: bytes | Path, max_frames: int | None = MAX_FRAMES, pixels: int = MAX_PIXELS_READ
) -> tuple[np.ndarray, float]:
    """A video file of any common kind as frames uint8 (F, H, W, 3), upright, and the frame rate of what is returned.

    Pixels are made square, and a frame with a side over `MAX_SIDE` of them is scaled down. Of a video with more than
    `max_frames` frames, that many are kept, evenly spread over its whole length, and never more than twice as many are
    held in memory. Raises `MissingInputError` where there is no such file, and `VideoError` where it is not a whole,
    readable video within the bounds of `univigu.decoding`, or has more `pixels` than these in all its frames.
    """
    with open_video(source, pixels) as video:
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
        painter = _Painter(video)
        height, width = painter.size(first)
        hdr = painter.hdr(first)
    with open_video(source) as video:
        begin, last, end = _find_times(video, first)
    return VideoFacts(last - begin, end - begin, max(1, round(height)), max(1, round(width)), hdr)


def _find_times(video: Video, first: Any) -> tuple[float, float, float]:
    """When the first frame and the last one appear, and when the last one goes, in seconds, by the packets alone.

    first: the first frame that is shown; packets before it only prepare it. Where some packets don't say when they are
    shown, as in an AVI, all go by when they are decoded: the steps between are the same.
    """
    begin = first.pts if first.pts is not None else first.dts
    shown, others = [], []
    for packet, needed in read_packets(video):
        if packet.size:
            prepares = packet.pts is not None and begin is not None and packet.pts < begin
            (shown if needed and not prepares else others).append((packet.pts, packet.dts, packet.duration or 0))
    packets = shown or others
    kind = next((kind for kind in (0, 1) if all(packet[kind] is not None for packet in packets)), None)
    base = float(video.stream.time_base)
    if kind is None:
        return 0.0, (len(packets) - 1) * video.interval, len(packets) * video.interval
    spans = [(packet[kind] * base, packet[kind] * base + (packet[2] * base or video.interval)) for packet in packets]
    starts, ends = zip(*spans, strict=True)
    return min(starts), max(starts), max(ends)


def sample_video(source: bytes | Path, times: Sequence[float], height: int, width: int) -> np.ndarray:
    """The frames that a video file shows at `times`, uint8 (F, height, width, 3), whatever its frame rate does.

    times: seconds from the first frame, in order. Each frame is turned upright, its pixels made square, scaled to cover
    `height` x `width` and cut to it around the centre. All of the file is decoded. Raises as `read_video` does.
    """
    chosen: list[np.ndarray] = []
    with open_video(source) as video:
        painter = _Painter(video)
        held, begin = None, 0.0
        for at, frame in read_frames(video):
            begin = at if held is None else begin
            due = sum(time < at - begin for time in times[len(chosen) :])
            if due and held is not None:
                chosen += [painter.cover(held, height, width)] * due
            held = frame
        chosen += [painter.cover(held, height, width)] * (len(times) - len(chosen))
        return np.stack(chosen)


def _bounded(video: Video) -> Iterator[Callable[[], np.ndarray]]:
    """What makes each frame an upright RGB array, all of the first one's size, and none with a side over `MAX_SIDE`."""
    painter, size = _Painter(video), None
    for _, frame in read_frames(video):
        if size is None:
            height, width = painter.size(frame)
            scale = min(1.0, MAX_SIDE / max(height, width))
            size = max(1, round(height * scale)), max(1, round(width * scale))
        yield partial(painter.draw, frame, *size)


def _thin(frames: Iterable[Callable[[], np.ndarray]], limit: int | None) -> tuple[list[np.ndarray], float]:
    """At most `limit` of the frames, evenly spread, and the share that they are; makes and holds few others."""
    kept: list[np.ndarray] = []
    stride, total = 1, 0
    for frame in frames:
        if total % stride == 0:
            kept.append(frame())
        total += 1
        if limit is not None and len(kept) > 2 * limit:
            kept, stride = kept[::2], stride * 2
    if limit is not None and len(kept) > limit:
        kept = [kept[i] for i in np.linspace(0, len(kept) - 1, limit).round().astype(int)]
    return kept, len(kept) / max(total, 1)


# --- pixels ----------------------------------------------------------------------------------------------------------


def fit_frames(frames: np.ndarray, count: int, height: int, width: int) -> np.ndarray:
    """Frames (F, H, W, 3) as a model takes them: `count` evenly spaced ones (some twice if F is less), each scaled to
    cover `height` x `width` and cut to it around the centre. Frames that fit already come back as they are."""
    import av

    frames = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    if frames.shape[1:3] == (height, width):
        return frames
    # pyrefly: ignore[bad-argument-count]
    tall, wide = _covering_size(*frames.shape[1:3], height, width)
    pictures = [av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24") for array in frames]
    size = {"width": wide, "height": tall, "interpolation": _choose_filter(pictures[0], wide, tall).upper()}
    return np.stack([_cut(picture.to_ndarray(format="rgb24", **size), height, width) for picture in pictures])


def _covering_size(high: float, broad: float, height: int, width: int) -> tuple[int, int]:
    """The height and width that `high` x `broad` is scaled to, so that it covers `height` x `width`."""
    scale = max(height / high, width / broad)
    return max(height, round(high * scale)), max(width, round(broad * scale))


def _cut(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of a picture."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _choose_filter(frame: Any, width: int, height: int) -> str:
    """FFmpeg's own filter; for a smaller picture the one that averages, as others alias in a moving picture."""
    return "area" if width * height < frame.width * frame.height else "bicubic"


class _Painter:
    """The frames of one video as upright RGB pixels; what is known of its frames is kept from one to the next.

    PyAV ties a frame to its side data in a circle, which holds the frame's memory for long: it is asked for once.
    """

    def __init__(self, video: Video) -> None:
        self.video = video
        self.orientations: dict[int, tuple[bool, bool, bool]] = {}  # by the rotation, which each frame tells cheaply
        self.graphs: dict[tuple[Any, ...], Any] = {}  # the filter graph in use: frames may change their size or colours
        self.dolby_vision: bool | None = None

    def size(self, frame: Any) -> tuple[float, float]:
        """Height and width of a frame as it is shown, in square pixels."""
        height, width = frame.height, frame.width * self.video.pixel_aspect
        return (width, height) if self._orientation(frame)[0] else (height, width)

    def cover(self, frame: Any, height: int, width: int) -> np.ndarray:
        """A frame scaled to cover `height` x `width`, and cut to it around the centre."""
        return _cut(self.draw(frame, *_covering_size(*self.size(frame), height, width)), height, width)

    def draw(self, frame: Any, height: int, width: int) -> np.ndarray:
        """A frame scaled to `height` x `width`."""
        sideways, mirrored, upside_down = self._orientation(frame)
        pixels = self._to_rgb(frame, *((height, width) if sideways else (width, height)))
        pixels = pixels.swapaxes(0, 1) if sideways else pixels
        return pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]

    def hdr(self, frame: Any) -> str:
        """Which transfer function of HDR a frame has, by its own tag or else by its stream's; empty for none.

        Raises `VideoError` (`hdr`) for Dolby Vision that comes without a picture for other screens.
        """
        transfer = frame.color_trc if frame.color_trc != _UNTAGGED else self.video.transfer
        if self.dolby_vision is None:
            self.dolby_vision = transfer not in _HDR and bool(_side_data(frame, "DOVI_METADATA"))
        if self.dolby_vision:
            raise VideoError(f"{self.video.name} is in Dolby Vision alone; convert it to HDR10 or SDR.", "hdr")
        return _HDR.get(transfer, "")

    def _orientation(self, frame: Any) -> tuple[bool, bool, bool]:
        if frame.rotation not in self.orientations:
            self.orientations[frame.rotation] = _find_orientation(_side_data(frame, "DISPLAYMATRIX"))
        return self.orientations[frame.rotation]

    def _to_rgb(self, frame: Any, width: int, height: int) -> np.ndarray:
        hdr = self.hdr(frame)
        if hdr and frame.colorspace == _UNTAGGED:
            frame.colorspace = _BT2020_NCL
        key = hdr, frame.format.name, frame.colorspace, frame.color_range, frame.width, frame.height, width, height
        if key not in self.graphs:
            self.graphs.clear()
            self.graphs[key] = _make_graph(frame, width, height, "rgb48le" if hdr else "rgb24")
        self.graphs[key].push(frame)
        pixels = self.graphs[key].pull().to_ndarray()
        return to_sdr(pixels, hdr) if hdr else pixels


def _make_graph(frame: Any, width: int, height: int, pixel_format: str) -> Any:
    """An FFmpeg filter graph from frames like this one to RGB of that size and kind.

    Unlike PyAV's own way from YUV to RGB, it knows where a frame's chroma samples are.
    """
    import av

    graph = av.filter.Graph()
    graph.threads = 1
    scale = f"w={width}:h={height}:flags={_choose_filter(frame, width, height)}"
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000))
    nodes = source, graph.add("scale", scale), graph.add("format", pixel_format), graph.add("buffersink")
    graph.link_nodes(*nodes).configure()
    return graph


def _find_orientation(matrix: bytes) -> tuple[bool, bool, bool]:
    """What makes a frame upright, in this order: to swap rows and columns, to mirror it, to turn it upside down.

    The display matrix maps (x, y) to (a x + c y, b x + d y), y downwards (ISO/IEC 14496-12, 6.2.2); of the eight
    orientations of a picture, the one nearest to it counts. One of zeros, which some tools write, says nothing.
    """
    if len(matrix) < 36:
        return False, False, False
    a, b, _, c, d = np.frombuffer(matrix, "=i4", 5).astype(float)
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def _side_data(frame: Any, kind: str) -> bytes:
    """The bytes of one kind of a frame's side data, empty where it has none."""
    try:
        found = frame.side_data
    except ValueError:  # PyAV has no name for one of the kinds, such as the EXIF of a JPEG
        found = _drop_unnamed(frame).side_data
    return bytes(found[kind]) if kind in {data.type.name for data in found} else b""


def _drop_unnamed(frame: Any) -> Any:
    """A frame without the side data that PyAV has no name for."""
    import av
    from av.sidedata.sidedata import Type

    named = {kind.value for kind in Type}
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000))
    kinds = [kind for kind in range(_SIDE_DATA_KINDS) if kind not in named]
    filters = [graph.add("sidedata", f"mode=delete:type={kind}") for kind in kinds]
    graph.link_nodes(source, *filters, graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()
