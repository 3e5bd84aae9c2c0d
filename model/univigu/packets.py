"""What the packets of a video say before they are decoded: when frames are shown, and which of them no one needs."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from univigu.decoding import Video, read_packets

Seen = tuple[Any, Any, int, bool]  # of a packet: pts, dts (or None), duration, and whether it must give a frame
_SLICE, _NO_PICTURE = 1, (6, 9, 12)  # NAL units (ITU-T H.264, table 7-1); SEI, delimiter and filler


def note_packets(video: Video, seen: list[Seen]) -> Iterator[tuple[Any, bool]]:
    """The packets of a video; of each with a frame, its times and whether it is needed are added to `seen`."""
    for packet, needed in read_packets(video):
        if packet.size:
            seen.append((packet.pts, packet.dts, packet.duration or 0, needed))
        yield packet, needed


def find_times(video: Video, first: Any, seen: Sequence[Seen]) -> tuple[int, float, float, float]:
    """The number of frames, the start of the first, and the start and end of the last, in seconds, from the packets.

    first: the first frame that is shown; packets before it are only needed to decode it. Where some packets have no
    presentation time, as in an AVI, the decoding times of all packets are used: the intervals are the same.
    """
    begin = first.pts if first.pts is not None else first.dts
    shown, others = [], []
    for packet in seen:
        too_early = packet[0] is not None and begin is not None and packet[0] < begin
        (shown if packet[3] and not too_early else others).append(packet)
    packets = shown or others
    kind = next((kind for kind in (0, 1) if all(packet[kind] is not None for packet in packets)), None)
    base = float(video.stream.time_base)
    if kind is None:
        return len(packets), 0.0, (len(packets) - 1) * video.interval, len(packets) * video.interval
    spans = [(packet[kind] * base, packet[kind] * base + (packet[2] * base or video.interval)) for packet in packets]
    starts, ends = zip(*spans, strict=True)
    return len(packets), min(starts), max(starts), max(ends)


def list_stamps(video: Video, first: Any, seen: Sequence[Seen]) -> np.ndarray:
    """The time stamps (pts) of all frames, ascending, int64 (F,), for `skip_unused`; none where there is any doubt.

    These are files of H.264 whose packets are whole frames with plausible times, each of which is shown.
    """
    context = video.stream.codec_context
    # Files with a configuration record (ISO/IEC 14496-15, version 1): each NAL unit comes after its length.
    framed = context.name == "h264" and len(context.extradata or b"") > 4 and context.extradata[0] == 1
    if not framed or first.interlaced_frame or not all(needed and pts is not None for pts, _, _, needed in seen):
        return np.empty(0, np.int64)
    stamps = [pts for pts, _, _, _ in seen]
    ascending = np.unique(np.array(stamps, np.int64))
    # Some tools write decoding times as presentation times; the decoder knows the order of frames.
    reordered = any(later < earlier for earlier, later in pairwise(stamps))
    plausible = len(ascending) == len(stamps) and ascending[0] == first.pts and reordered == context.has_b_frames
    return ascending if plausible else np.empty(0, np.int64)


def skip_unused(
    video: Video, packets: Iterable[tuple[Any, bool]], stamps: np.ndarray, times: Sequence[float]
) -> Iterator[tuple[Any, bool]]:
    """The packets without those whose frames are neither shown at `times` nor needed to decode others.

    stamps: of `list_stamps`, at least one. times: seconds from the first frame. The first and the last frame are kept,
    so that a file that ends early is noticed.
    """
    starts = stamps * float(video.stream.time_base)
    shown = np.searchsorted(starts - starts[0], times, side="right") - 1
    used = {*stamps[shown.clip(0)].tolist(), int(stamps[0]), int(stamps[-1])}
    length_size = (video.stream.codec_context.extradata[4] & 3) + 1
    for packet, needed in packets:
        if packet.pts in used or not packet.size or not is_unreferenced(packet, length_size):
            yield packet, needed


def is_unreferenced(packet: Any, length_size: int) -> bool:
    """Whether no other picture refers to the H.264 picture in a packet: `nal_ref_idc` is 0 in all slices (7.4.1).

    length_size: bytes of a NAL unit's length. False as well where the packet holds anything that others may need.
    """
    view, at, slices = memoryview(packet), 0, 0
    while at + length_size < len(view):
        length, header = int.from_bytes(view[at : at + length_size], "big"), view[at + length_size]
        kind, reference = header & 31, header >> 5 & 3
        if (kind == _SLICE and reference) or kind not in (_SLICE, *_NO_PICTURE):
            return False
        slices += kind == _SLICE
        at += length_size + length
    return slices > 0 and at == len(view)
