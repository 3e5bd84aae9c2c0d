"""Decoding users' video files: which stream is shown, which of its frames, in what order, and when.

A video is either complete or refused. Every decoder error counts, except where players ignore it too: before the first
frame that can be shown (in a stream that starts between key frames), and in frames that an edit list hides. It needs
PyAV, not torch.
"""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from univigu.containers import check_container
from univigu.errors import MissingInputError, UniViGUError, VideoError

MAX_PIXELS = 8192 * 4352  # of one frame: 8K in all usual aspect ratios; a decoder holds up to sixteen frames
MAX_FRAMES_READ = 500_000  # of one file: more than two hours at 60 frames per second
MAX_PIXELS_READ = 5 * 10**11  # of all frames of one file: two hours of 1920x1080 at 30 frames per second
MOVING = 5  # frames: a stream with fewer may be a thumbnail
WIDEST_PIXEL = 16.0  # largest plausible ratio of a pixel's sides; a larger one is an error in the file
LONGEST_GAP = 10.0  # seconds in a broadcast stream; a longer gap means that its clock was reset, as in FFmpeg
# Demuxers of self-contained formats. Playlists (HLS, concat and so on) are excluded: they can name files and hosts.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,flv,asf,ogg,yuv4mpegpipe"
_BROADCAST = ("mpegts", "mpeg")  # formats whose clock may jump
_LATE_STREAMS = (b"FLV\x01", b"\x00\x00\x01\xba")  # FFmpeg decodes some of these while opening them, without limits
_MAKE_UP_TIMES = 0x1  # AVFMT_FLAG_GENPTS, set by PyAV: it gives a wrong order in an AVI with B-frames


class Video(NamedTuple):
    """An open video file: PyAV's container, the stream that players show, and a name for messages."""

    container: Any
    stream: Any
    name: str
    pixels: int  # limit for all frames together
    transfer: int  # the stream's transfer characteristics (ITU-T H.273), which untagged frames lose in the decoder

    @property
    def interval(self) -> float:
        """Seconds between two frames without time stamps of their own."""
        return 1 / (float(self.stream.average_rate or self.stream.guessed_rate or 0) or 25.0)

    @property
    def pixel_aspect(self) -> float:
        """The width of a pixel divided by its height."""
        aspect = float(self.stream.sample_aspect_ratio or self.stream.codec_context.sample_aspect_ratio or 1)
        return aspect if 1 / WIDEST_PIXEL <= aspect <= WIDEST_PIXEL else 1.0


@contextmanager
def open_video(source: bytes | Path, pixels: int = MAX_PIXELS_READ) -> Iterator[Video]:
    """Open a video file within limits; any failure of reading it within the block becomes a `VideoError`.

    pixels: the limit for all frames together. Raises `MissingInputError` where there is no such file. Reasons of the
    `VideoError`: `damaged`; `no_video` (no moving picture); `codec` (FFmpeg has no decoder); `too_large` (more pixels
    in total, more than `MAX_PIXELS` in a frame, or more than `MAX_FRAMES_READ` frames).
    """
    import av

    name = "the video" if isinstance(source, bytes) else f"'{source}'"
    if not isinstance(source, bytes) and not os.path.isfile(source):
        raise MissingInputError(f"There is no video file {name}; check the path.")
    try:
        with _bytes_of(source) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            check_container(file, size, name)
        with _demuxer(source) as container:
            stream = _choose_stream(container, source, name)
            _check_size(stream, name)
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
            yield Video(container, stream, name, pixels, stream.codec_context.color_trc)
    except UniViGUError:
        raise
    except Exception as error:  # PyAV raises exceptions of Python's, of FFmpeg's, and some that are both
        if isinstance(error, MemoryError) and not isinstance(error, av.error.FFmpegError):
            raise  # this machine is out of memory, the file may be fine
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> VideoError:
    said = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return VideoError(
        f"It was not possible to read {name} as a video ({' '.join(said.split())}); check that it is whole and plays."
    )


def _bytes_of(source: bytes | Path) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb")


@contextmanager
def _demuxer(source: bytes | Path) -> Iterator[Any]:
    import av

    opened = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)}
    with _bytes_of(source) as file:
        if file.read(4) in _LATE_STREAMS:
            options["codec_whitelist"] = "none"
    with av.open(opened, options=options, metadata_errors="replace") as container:
        container.flags &= ~_MAKE_UP_TIMES
        yield container


# --- which stream ----------------------------------------------------------------------------------------------------


def _choose_stream(container: Any, source: bytes | Path, name: str) -> Any:
    """The stream to show: moving pictures before stills, then the default stream, the largest, the first."""
    from av.stream import Disposition

    pictures = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        raise VideoError(
            f"There is no video in {name}, only other streams or a picture; give one that plays.", "no_video"
        )
    frames = _count_first(source, [stream.index for stream in streams]) if len(streams) > 1 else {}

    def rank(stream: Any) -> tuple[int, bool, bool, int]:
        context = stream.codec_context
        default = bool(stream.disposition & Disposition.default)
        pixels = context.width * context.height if context else 0
        return frames.get(stream.index, 0), context is not None, default, pixels

    chosen = max(streams, key=rank)
    if chosen.codec_context is None:
        raise VideoError(f"FFmpeg has no decoder for the video in {name}; convert it to H.264, say.", "codec")
    return chosen


def _count_first(source: bytes | Path, indices: Sequence[int]) -> dict[int, int]:
    """The number of frames in each stream, counted up to `MOVING`."""
    seen = dict.fromkeys(indices, 0)
    with _demuxer(source) as container:
        for packet in container.demux([container.streams[index] for index in indices]):
            seen[packet.stream_index] = min(MOVING, seen[packet.stream_index] + bool(packet.size))
            if min(seen.values()) == MOVING:
                break
    return seen


def _check_size(stream: Any, name: str) -> None:
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_PIXELS:
        raise VideoError(
            f"The frames of {name} claim {width}x{height} pixels, and at most {MAX_PIXELS} are read; scale it down.",
            "too_large",
        )
    if stream.frames > MAX_FRAMES_READ:
        raise _too_many(name)


def _too_many(name: str) -> VideoError:
    return VideoError(
        f"{name} has more frames, or more pixels in all of them, than are read of one file; cut it into shorter ones.",
        "too_large",
    )


# --- packets ---------------------------------------------------------------------------------------------------------


def read_packets(video: Video) -> Iterator[tuple[Any, bool]]:
    """Each packet of the video in decoding order, and whether it must produce a frame that is shown.

    It need not where an edit list hides it, where it is only a reference for later frames, and where it comes before
    the first key frame or refers to something before it. The last packet is empty and flushes the decoder.
    """
    start, keyed, settled = None, False, False
    hides = video.stream.codec_context.name in ("vp8", "libvpx")
    for count, packet in enumerate(_continuous(video)):
        if count > MAX_FRAMES_READ:
            raise _too_many(video.name)
        at = packet.pts if packet.pts is not None else packet.dts
        if packet.is_keyframe and not keyed:
            keyed, start = True, at
        elif keyed and at is not None and start is not None and at > start:
            settled = True
        leading = not keyed or (start is not None and (not settled if at is None else at < start))
        hidden = hides and packet.size and not bytes(memoryview(packet)[:1])[0] & 0x10  # RFC 6386, 9.1: show_frame
        yield packet, bool(packet.size) and not (packet.is_discard or leading or hidden)


def _continuous(video: Video) -> Iterator[Any]:
    """The packets, with a continuous clock where two recordings were joined."""
    shift, last, step = 0, None, 0
    broadcast = video.container.format.name in _BROADCAST
    gap = round(LONGEST_GAP / float(video.stream.time_base)) if broadcast else None
    for packet in video.container.demux(video.stream):
        if packet.dts is not None:
            if last is not None:
                ahead = packet.dts + shift - last
                if ahead < 0 or (gap is not None and ahead > gap):
                    shift += step - ahead
            packet.dts += shift
            step = packet.duration or step or 1
            last = packet.dts
        if packet.pts is not None:
            packet.pts += shift
        yield packet


# --- frames ----------------------------------------------------------------------------------------------------------


def read_frames(video: Video, packets: Iterable[tuple[Any, bool]] | None = None) -> Iterator[tuple[float, Any]]:
    """The time of each frame in seconds, ascending, and the `av.VideoFrame`.

    packets: those of `read_packets`, if the caller looks at them as well. Raises `VideoError` unless the complete video
    could be decoded.
    """
    clock = _Clock(video.interval)
    shown = expected = pixels = 0
    interlaced = False
    first: list[int | None] = []  # time stamps of the packets before the first shown frame
    for packet, needed in packets or read_packets(video):
        expected += needed
        if needed and not shown:
            first.append(packet.pts)
        for frame in _decode(packet, needed, video.name):
            if frame.is_corrupt:
                raise VideoError(f"A frame in the middle of {video.name} is damaged; get the file afresh.")
            if not shown:  # frames that only start the decoder are not shown by players either
                start = frame.pts if frame.pts is not None else frame.dts
                expected -= sum(start is not None and stamp is not None and stamp < start for stamp in first)
            shown += 1
            pixels += frame.width * frame.height
            if pixels > video.pixels:
                raise _too_many(video.name)
            interlaced = interlaced or frame.interlaced_frame
            yield clock.time(frame), frame
    if not shown:
        raise VideoError(f"There is not a single frame in {video.name}; give a video that plays.")
    if shown < expected and not interlaced:  # a packet may hold one field of two
        raise VideoError(f"Only {shown} of {expected} frames of {video.name} can be read; get the file afresh.")
    stream = video.stream
    promised = float(((stream.start_time or 0) + (stream.duration or 0)) * stream.time_base)
    if clock.end + max(2 * clock.step, 0.1) < promised:
        raise VideoError(f"{video.name} ends after {clock.end:.2f} of {promised:.2f} s; get the whole file.")


def _decode(packet: Any, needed: bool, name: str) -> list[Any]:
    """The frames that are ready after a packet; none where a packet that need not be shown can't be decoded."""
    import av

    try:
        return packet.decode()
    except av.error.InvalidDataError:
        if needed or packet.is_keyframe or not packet.size:
            raise
        return []
    except av.error.ArgumentError:  # FFmpeg's error for a size over `max_pixels`
        said = f"A frame of {name} is larger than the {MAX_PIXELS} pixels that are read, or of no size at all"
        raise VideoError(f"{said}; convert it with a tool that you trust.", "too_large") from None


class _Clock:
    """The presentation times of frames, from the time stamps of frames or packets, whichever go backwards less often.

    An AVI with B-frames has no time stamps of frames, and some tools write wrong ones.
    """

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.last: dict[str, int] = {}
        self.faults = {"pts": 0, "dts": 0}
        self.at, self.gap = float("-inf"), 0.0
        self.end, self.step = 0.0, 0.0  # end and duration of the last frame, in seconds

    def time(self, frame: Any) -> float:
        """The time in seconds of `frame`, the next one to be shown."""
        base = float(frame.time_base)
        stamps = {kind: stamp for kind in self.faults if (stamp := getattr(frame, kind)) is not None}
        for kind, stamp in stamps.items():
            self.faults[kind] += stamp <= self.last.get(kind, stamp - 1)
        self.last |= stamps
        # pyrefly: ignore[no-matching-overload]
        before, (best, other) = self.at, sorted(self.faults, key=self.faults.get)
        if best in stamps:
            self.at = max(before, stamps[best] * base)
        elif other in stamps and stamps[other] * base > before:
            self.at = stamps[other] * base
        else:
            self.at = max(self.end, before + self.gap)
        self.gap = self.at - before if before > float("-inf") else 0.0
        self.step = (frame.duration or 0) * base or self.interval
        self.end = self.at + self.step
        return self.at
