"""Video files: writing and reading H.264 clips, and reading users' videos. It needs PyAV and numpy, not torch.

Frames are uint8 RGB arrays of shape (F, H, W, 3) everywhere. A training clip is stored as 4:4:4 H.264 at a low rate
factor, which keeps the colours of small frames; a clip for users is 4:2:0, which every player supports. The encoder has
one thread and writes neither time nor host: equal frames give equal bytes.

Pixels equal FFmpeg's: with the matrix and range of the frame's tags (BT.601 and limited range without tags, at any
size), the same chroma filter, and no alpha. HDR is tone-mapped to BT.709.
"""

import io
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from univigu.decoding import MAX_PIXELS_READ, Video, open_video, read_frames, read_packets
from univigu.errors import BadInputError, VideoError
from univigu.packets import Seen, find_times, list_stamps, note_packets, skip_unused
from univigu.tone_mapping import to_sdr

RATE_FACTOR = 6  # x264's crf: a mean error below one grey level on 32x32 clips, at 2 to 6 KB per clip
# At 832x480 and that rate factor, "medium" takes 4.5 times as long for files of the same size, whose mean error on
# noisy frames is 1.8 grey levels instead of 2.0; the files of "ultrafast" are 2.5 times as large.
PRESET = "superfast"
MAX_SIDE = 1280  # larger frames are scaled down when read: no model here uses more pixels
MAX_FRAMES = 256
# On frames of a few macroblocks, x264's lookahead reads uninitialised memory, so equal frames gave different bytes.
_REPEATABLE = "mbtree=0:rc-lookahead=0:weightp=0"
_BT601, _LIMITED = 6, 1  # SMPTE 170M matrix and limited range, as swscale converts by default: tagged, so players agree
_SIDE_DATA_KINDS = 64  # FFmpeg 8.1 has fewer than 40
_HDR = {16: "pq", 18: "hlg"}  # transfer characteristics of ITU-T H.273: SMPTE ST 2084 and ARIB STD-B67
_BT2020_NCL, _UNTAGGED = 9, 2  # BT.2020 is the matrix of HDR frames without a tag


def encode_mp4(frames: np.ndarray, fps: float, pixel_format: str = "yuv444p") -> bytes:
    """RGB frames uint8 (F, H, W, 3) as an H.264 mp4; `pixel_format` "yuv420p" (even sizes only) plays everywhere.

    Raises `BadInputError` for frames of another shape or dtype, for no frames, and for an invalid frame rate.
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
        stream.options = {"crf": str(RATE_FACTOR), "preset": PRESET, "x264-params": _REPEATABLE}
        context = stream.codec_context
        context.thread_count = 1
        context.colorspace, context.color_range = _BT601, _LIMITED
        for array in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return target.getvalue()


def decode_mp4(source: bytes | Path) -> tuple[np.ndarray, float]:
    """All frames of a video that `encode_mp4` made, uint8 (F, H, W, 3), and its frame rate.

    It does not detect damaged bytes: compare their hash. Raises `BadInputError` where the bytes are not a video.
    """
    import av

    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), format="mp4") as container:
            # pyrefly: ignore[bad-argument-type, missing-attribute]
            return _convert(container.decode(video=0)), float(container.streams.video[0].average_rate)
    except (av.error.FFmpegError, ValueError, IndexError, TypeError) as error:
        raise BadInputError(f"A clip is no mp4 that was made here ({error}); make it again.") from error


# --- users' videos ---------------------------------------------------------------------------------------------------


def read_video(
    source: bytes | Path, max_frames: int | None = MAX_FRAMES, pixels: int = MAX_PIXELS_READ
) -> tuple[np.ndarray, float]:
    """A video file of any common format as upright frames uint8 (F, H, W, 3), and the frame rate of these frames.

    Pixels are made square, and frames with a side over `MAX_SIDE` are scaled down. Of a longer video, `max_frames`
    frames are kept, evenly spread over its length; at most twice as many are held in memory. Raises
    `MissingInputError` where there is no such file, and `VideoError` where it is not a complete, readable video within
    the limits of `univigu.decoding`, or its frames have more than `pixels` in total.
    """
    with open_video(source, pixels) as video:
        frames, share = _thin(_bounded(video), max_frames)
        return np.stack(frames), share / video.interval


class VideoFacts(NamedTuple):
    """The facts of a video file: when its last frame starts and ends, and its upright size in square pixels."""

    count: int  # frames
    last: float  # seconds from the first frame to the last
    seconds: float  # the duration, which is often inexact: files guess that of the last frame
    height: int
    width: int
    hdr: str  # "pq" or "hlg"; empty for standard dynamic range
    stamps: np.ndarray  # for `sample_windows`; empty where it has to decode all frames

    @property
    def rate(self) -> float:
        """The mean number of frames per second; 0 for a single frame."""
        return (self.count - 1) / self.last if self.last > 0 else 0.0

    def frames(self, fps: float) -> int:
        """The number of frames at another frame rate."""
        return max(math.floor(self.last * fps + 0.1) + 1, round(self.seconds * fps))


def probe_video(source: bytes | Path) -> VideoFacts:
    """The facts of a video file; only its first frame is decoded. Raises as `read_video` does."""
    seen: list[Seen] = []
    with open_video(source) as video:
        packets = note_packets(video, seen)
        _, first = next(read_frames(video, packets))
        painter = _Painter(video)
        height, width = painter.size(first)
        hdr = painter.hdr(first)
        deque(packets, maxlen=0)  # the others, without decoding them
        count, begin, last, end = find_times(video, first, seen)
        stamps = list_stamps(video, first, seen)
    return VideoFacts(count, last - begin, end - begin, max(1, round(height)), max(1, round(width)), hdr, stamps)


def sample_video(source: bytes | Path, times: Sequence[float], height: int, width: int) -> np.ndarray:
    """The frames that a video file shows at `times`, uint8 (F, height, width, 3); its frame rate may vary.

    times: seconds from the first frame, ascending. Each frame is turned upright, its pixels are made square, and it is
    scaled to cover `height` x `width` and cropped around the centre. The whole file is decoded. Raises as `read_video`
    does.
    """
    (frames,) = sample_windows(source, [times], height, width)
    return frames


def sample_windows(
    source: bytes | Path,
    windows: Sequence[Sequence[float]],
    height: int,
    width: int,
    stamps: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """The frames of several windows of a video file, each as `sample_video` gives them, in one pass over the file.

    windows: the times of each window's frames; a later window doesn't end earlier. Only the frames of the windows that
    the pass is in are in memory. With the `stamps` of the file's `VideoFacts`, frames that neither a window nor another
    frame needs are not decoded; damage in them is not noticed. Raises as `read_video` does, and only after the last
    window if the file's end is damaged.
    """
    ahead = deque(sorted((time, number) for number, times in enumerate(windows) for time in times))
    chosen: dict[int, list[np.ndarray]] = defaultdict(list)
    with open_video(source) as video:
        painter = _Painter(video)
        held, begin = None, 0.0
        packets = read_packets(video)
        if stamps is not None and len(stamps):
            packets = skip_unused(video, packets, stamps, [time for time, _ in ahead])
        for at, frame in chain(read_frames(video, packets), [(math.inf, None)]):  # the last one is shown until the end
            begin = at if held is None else begin
            picture = None
            while held is not None and ahead and ahead[0][0] < at - begin:
                picture = painter.cover(held, height, width) if picture is None else picture
                _, number = ahead.popleft()
                chosen[number].append(picture)
                if len(chosen[number]) == len(windows[number]):
                    yield np.stack(chosen.pop(number))
            held = frame


def small_frames(source: bytes | Path, side: int) -> Iterator[tuple[float, np.ndarray]]:
    """Every frame of a video file, uint8 (H, W, 3), with a longer side of at most `side`, and its time from the first.

    Raises as `read_video` does.
    """
    with open_video(source) as video:
        painter, size, begin = _Painter(video), None, 0.0
        for at, frame in read_frames(video):
            begin = begin if size else at
            size = size or _limited_size(painter, frame, side)
            yield at - begin, painter.draw(frame, *size)


def _bounded(video: Video) -> Iterator[Callable[[], np.ndarray]]:
    """For each frame, a function that returns it as an upright RGB array, with the first frame's (limited) size."""
    painter, size = _Painter(video), None
    for _, frame in read_frames(video):
        size = size or _limited_size(painter, frame, MAX_SIDE)
        yield partial(painter.draw, frame, *size)


def _limited_size(painter: "_Painter", frame: Any, side: int) -> tuple[int, int]:
    """A frame's upright height and width, scaled down where a side is longer than `side`."""
    height, width = painter.size(frame)
    scale = min(1.0, side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _thin(frames: Iterable[Callable[[], np.ndarray]], limit: int | None) -> tuple[list[np.ndarray], float]:
    """At most `limit` of the frames, evenly spread, and their share of all frames; few others are converted."""
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
    """Frames (F, H, W, 3) in a model's format: `count` evenly spaced ones (some twice if F is smaller), each scaled to
    cover `height` x `width` and cropped around the centre. Frames that fit already are returned unchanged."""
    import av

    frames = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    if frames.shape[1:3] == (height, width):
        return frames
    # pyrefly: ignore[bad-argument-count]
    tall, wide = _covering_size(*frames.shape[1:3], height, width)
    pictures = [av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24") for array in frames]
    scaled = _convert(pictures, width=wide, height=tall, interpolation=_choose_filter(pictures[0], wide, tall).upper())
    return np.stack([_cut(pixels, height, width) for pixels in scaled])


def _convert(frames: Iterable[Any], **size: Any) -> np.ndarray:
    """PyAV's frames of one video as RGB, uint8 (F, H, W, 3); `size` are arguments of PyAV's `reformat`.

    One converter for all frames: PyAV would set up another for each, which takes longer than converting small frames.
    """
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()
    return np.stack([reformatter.reformat(frame, format="rgb24", **size).to_ndarray() for frame in frames])


def _covering_size(high: float, broad: float, height: int, width: int) -> tuple[int, int]:
    """The height and width to which `high` x `broad` is scaled, so that it covers `height` x `width`."""
    scale = max(height / high, width / broad)
    return max(height, round(high * scale)), max(width, round(broad * scale))


def _cut(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The centre of a picture, (height, width, 3)."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _choose_filter(frame: Any, width: int, height: int) -> str:
    """FFmpeg's default filter; for downscaling the averaging one, because others cause aliasing in motion."""
    return "area" if width * height < frame.width * frame.height else "bicubic"


class _Painter:
    """Converts the frames of one video to upright RGB pixels, and caches what is the same for all frames.

    The orientation is read once for each rotation, Dolby Vision once per video.
    """

    def __init__(self, video: Video) -> None:
        self.video = video
        self.orientations: dict[int, tuple[bool, bool, bool]] = {}  # by rotation, which is cheap to read
        self.graphs: dict[tuple[Any, ...], Any] = {}  # the current filter graph: size and colours may change
        self.dolby_vision: bool | None = None

    def size(self, frame: Any) -> tuple[float, float]:
        """Height and width of a frame as displayed, in square pixels."""
        height, width = frame.height, frame.width * self.video.pixel_aspect
        return (width, height) if self._orientation(frame)[0] else (height, width)

    def cover(self, frame: Any, height: int, width: int) -> np.ndarray:
        """A frame scaled to cover `height` x `width` and cropped around the centre."""
        return _cut(self.draw(frame, *_covering_size(*self.size(frame), height, width)), height, width)

    def draw(self, frame: Any, height: int, width: int) -> np.ndarray:
        """A frame scaled to `height` x `width`."""
        sideways, mirrored, upside_down = self._orientation(frame)
        pixels = self._to_rgb(frame, *((height, width) if sideways else (width, height)))
        pixels = pixels.swapaxes(0, 1) if sideways else pixels
        return pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]

    def hdr(self, frame: Any) -> str:
        """The HDR transfer function of a frame, by its own tag or else its stream's; empty for none.

        Raises `VideoError` (`hdr`) for Dolby Vision without a layer for other screens.
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
    """An FFmpeg filter graph that converts frames like this one to RGB of that size and pixel format.

    Unlike PyAV's own conversion from YUV to RGB, it takes the position of chroma samples into account.
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
    """The operations that make a frame upright, in this order: swap rows and columns, mirror, turn upside down.

    The display matrix maps (x, y) to (a x + c y, b x + d y), y downwards (ISO/IEC 14496-12, 6.2.2). The nearest of the
    eight orientations is used. A matrix of zeros, which some tools write, is ignored.
    """
    if len(matrix) < 36:
        return False, False, False
    a, b, _, c, d = np.frombuffer(matrix, "=i4", 5).astype(float)
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def _side_data(frame: Any, kind: str) -> bytes:
    """The bytes of one kind of a frame's side data; empty if it has none."""
    from av.sidedata.sidedata import SideDataContainer

    # Not frame.side_data, which the frame would keep: they refer to each other, so both wait for Python's collector.
    try:
        found = SideDataContainer(frame)  # pyrefly: ignore[bad-argument-count]
    except ValueError:  # PyAV raises for kinds that it doesn't know, such as the EXIF of a JPEG
        found = SideDataContainer(_drop_unnamed(frame))  # pyrefly: ignore[bad-argument-count]
    return bytes(found[kind]) if kind in {data.type.name for data in found} else b""


def _drop_unnamed(frame: Any) -> Any:
    """A frame without the kinds of side data that PyAV doesn't know."""
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
