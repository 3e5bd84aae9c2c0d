"""Check the sizes that a video file's container declares, before a demuxer reads the file.

A demuxer reads a truncated file as far as it goes, and allocates memory for as many frames as a header declares. The
declared sizes reveal both problems: in a truncated file a part ends after the end of the file, and a file can't have
more samples than bytes. MPEG transport and program streams declare no sizes; a whole number of packets is accepted.

Sources: ISO/IEC 14496-12 (MP4, MOV), RFC 8794 and RFC 9559 (Matroska, WebM), GIF89a, RIFF (AVI), RFC 3533 (Ogg),
ISO/IEC 13818-1 (transport streams), Adobe's FLV 10.1, Microsoft's ASF 1.20.3 and yuv4mpeg(5).
"""

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from univigu.errors import VideoError

MAX_PARTS = 2_000_000  # boxes, blocks or pages that are checked
MAX_HEADER = 64 << 20  # bytes of a compressed header
FEWEST_SAMPLES = 10_000  # may be declared in a file of any size
_MEDIA_BOXES = (b"moov", b"mdat", b"moof")  # after the last of these, tools may have appended anything
_BOX_FOLDERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
_SAMPLE_COUNTS = {b"stsz": 8, b"stz2": 8, b"trun": 4}  # offset of the number of samples in a box's content
_TS_PACKETS = {
    188: 188,
    192: 188,
    204: 204,
}  # packet length, and that from its sync byte: plain, Blu-ray, with parity
_TS_SYNC, _TS_RUN = 0x47, 4  # number of equidistant sync bytes that identify a transport stream
_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675


class _CutOffError(Exception):
    """The file is shorter than its container declares."""


class _TooManyError(Exception):
    """The file declares more than it can hold."""


def check_container(file: BinaryIO, size: int, name: str) -> None:
    """Raise `VideoError` for a file of `size` bytes that is truncated (`damaged`) or declares too much (`too_large`).

    Unknown containers are left to the demuxer.
    """
    walk = _choose_walker(file.read((_TS_RUN + 1) * max(_TS_PACKETS)))
    try:
        for visited, _ in enumerate(walk(file, size) if walk else ()):
            if visited >= MAX_PARTS:
                raise _TooManyError("to have millions of parts")
    except _CutOffError as error:
        raise VideoError(f"{name} was cut off: {error}; get the whole file.") from None
    except _TooManyError as error:
        raise VideoError(f"{name} claims {error}; convert it with a tool that you trust.", "too_large") from None


Walker = Callable[[BinaryIO, int], Iterator[int]]  # yields the start of each part


def _choose_walker(start: bytes) -> Walker | None:
    if start[4:8] in (b"ftyp", b"styp", b"free", b"skip", b"wide", b"pnot", *_MEDIA_BOXES):
        return _walk_boxes
    if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        return _walk_riff
    known: dict[bytes, Walker] = {
        b"\x1a\x45\xdf\xa3": _walk_ebml,
        b"GIF8": _walk_gif,
        b"OggS": _walk_ogg,
        b"FLV\x01": _walk_flv,
        b"\x30\x26\xb2\x75": _walk_asf,
        b"YUV4": _walk_y4m,
    }
    return known.get(start[:4]) or (_walk_ts if _is_ts(start) else None)


def _check_end(end: int, size: int) -> None:
    if end > size:
        raise _CutOffError(f"a part of it ends {end - size} bytes after the file does")


# --- MP4, MOV --------------------------------------------------------------------------------------------------------


def _walk_boxes(file: BinaryIO, size: int) -> Iterator[int]:
    """Check that every box with samples ends within the file, and that there is a byte for each listed sample."""
    claimed = 0
    ahead = [(0, size)]
    while ahead:
        at, end = ahead.pop()
        while at + 8 <= end:
            yield at
            kind, start, stop = _read_box(file, at, end)
            if end == size and kind in _MEDIA_BOXES:
                _check_end(stop, size)
            if not at < stop <= end:
                break
            if kind in _BOX_FOLDERS:
                ahead.append((start, stop))
            elif kind == b"cmov":
                content = _inflate_header(file, start, stop)
                yield from _walk_boxes(io.BytesIO(content), len(content))
            elif kind in _SAMPLE_COUNTS:
                file.seek(start + _SAMPLE_COUNTS[kind])
                claimed += int.from_bytes(file.read(4), "big")
            at = stop
    if claimed > max(size, FEWEST_SAMPLES):
        raise _TooManyError(f"to have {claimed} frames and sounds in {size} bytes")


def _read_box(file: BinaryIO, at: int, end: int) -> tuple[bytes, int, int]:
    """A box's type, and the start and end of its content; for an invalid size, the end is the start of the box."""
    file.seek(at)
    head = file.read(16)
    length, kind = struct.unpack_from(">I4s", head)
    if length == 0:
        return kind, at + 8, end
    if length == 1:
        length = int.from_bytes(head[8:16], "big")
        return kind, at + 16, at + (length if length >= 16 else 0)
    return kind, at + 8, at + (length if length >= 8 else 0)


def _inflate_header(file: BinaryIO, start: int, stop: int) -> bytes:
    """The boxes of a compressed QuickTime header, whose `cmvd` box has a size and zlib data."""
    file.seek(start)
    content = file.read(min(stop - start, MAX_HEADER))
    at = content.find(b"cmvd")
    inflater = zlib.decompressobj()
    try:
        found = inflater.decompress(content[at + 8 :], MAX_HEADER) if at >= 0 else b""
    except zlib.error:
        found = b""
    if not found or inflater.unconsumed_tail:
        raise _TooManyError("to have a compressed header, which can't be read")
    return found


# --- Matroska, WebM --------------------------------------------------------------------------------------------------


def _walk_ebml(file: BinaryIO, size: int) -> Iterator[int]:
    """Check that every element ends within the file; in live recordings, with unknown sizes, every block."""
    at = 0
    while at < size:
        yield at
        file.seek(at)
        found = _read_element(file.read(12))
        if found is None:
            return  # not an element: the demuxer searches for the next one
        kind, header, length = found
        if length is None and kind not in (_SEGMENT, _CLUSTER):
            return
        at += header + (length or 0)
        _check_end(at, size)


def _read_element(head: bytes) -> tuple[int, int, int | None] | None:
    """An element's id, and the lengths of its header and of its content (None: unknown)."""
    if not head or head[0] < 0x10:
        return None
    id_length = 9 - head[0].bit_length()
    if len(head) <= id_length or not head[id_length]:
        return None
    size_length = 9 - head[id_length].bit_length()
    if len(head) < id_length + size_length:
        return None
    unknown = (1 << 7 * size_length) - 1
    length = int.from_bytes(head[id_length : id_length + size_length], "big") & unknown
    return int.from_bytes(head[:id_length], "big"), id_length + size_length, None if length == unknown else length


# --- GIF -------------------------------------------------------------------------------------------------------------


def _walk_gif(file: BinaryIO, size: int) -> Iterator[int]:
    """Check that the blocks of a GIF lead to its trailer."""
    file.seek(10)
    at = 13 + _colour_table(file.read(1))
    while True:
        yield at
        file.seek(at)
        block = file.read(10)
        if block[:1] == b"\x3b":
            return
        if not block or (block[:1] == b"\x2c" and len(block) < 10):
            raise _CutOffError("it has no end")
        if block[:1] not in b"\x2c\x21":
            return  # not a block: the demuxer searches for the next one
        at += 11 + _colour_table(block[9:]) if block[:1] == b"\x2c" else 2
        at = yield from _walk_sub_blocks(file, at)


def _colour_table(flags: bytes) -> int:
    """The size in bytes of the colour table that a packed field declares."""
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0


def _walk_sub_blocks(file: BinaryIO, at: int) -> Iterator[int]:
    """Walk the sub-blocks that start at `at`; returns their end."""
    file.seek(at)
    while length := file.read(1):
        yield at
        at += 1 + length[0]
        if not length[0]:
            return at
        file.seek(length[0], io.SEEK_CUR)
    raise _CutOffError("it has no end")


# --- AVI, FLV, ASF, Ogg, transport streams, yuv4mpeg -----------------------------------------------------------------


def _walk_riff(file: BinaryIO, size: int) -> Iterator[int]:
    """Check that each RIFF chunk of an AVI ends within the file, where its size is declared."""
    at = 0
    while at + 12 <= size:
        yield at
        file.seek(at)
        kind, length = struct.unpack("<4sI", file.read(8))
        if kind != b"RIFF" or length in (0, 0xFFFFFFFF):
            return
        at += 8 + length
        _check_end(at - 8, size)  # some tools include the eight bytes of the header
        at += length % 2


def _walk_flv(file: BinaryIO, size: int) -> Iterator[int]:
    """Check that each tag of an FLV ends within the file."""
    file.seek(5)
    at = int.from_bytes(file.read(4), "big") + 4
    while at < size:
        yield at
        file.seek(at)
        at += 15 + int.from_bytes(file.read(4)[1:], "big")
        _check_end(at - 4, size)  # the length after the last tag is optional


def _walk_asf(file: BinaryIO, size: int) -> Iterator[int]:
    """Check that each top-level object of an ASF file ends within it."""
    at = 0
    while at + 24 <= size:
        yield at
        file.seek(at + 16)
        length = int.from_bytes(file.read(8), "little")
        if length < 24:
            return
        at += length
        _check_end(at, size)


def _walk_ogg(file: BinaryIO, size: int) -> Iterator[int]:
    """Check that the last page of an Ogg file is complete and ends its stream."""
    start = max(0, size - (1 << 17))  # a page is smaller than 64 KB
    yield start
    file.seek(start)
    tail = file.read()
    at = max(tail.rfind(b"OggS"), 0)
    head = tail[at : at + 27]
    if len(head) < 27 or at + 27 + head[26] + sum(tail[at + 27 : at + 27 + head[26]]) > len(tail):
        raise _CutOffError("its last page isn't whole")
    if not head[5] & 4:
        raise _CutOffError("its last page is not the end of a stream")


def _is_ts(start: bytes) -> bool:
    """Whether sync bytes are at a fixed distance; a recording may start anywhere in a packet."""
    return any(
        len(run := start[at::length][:_TS_RUN]) == _TS_RUN and set(run) == {_TS_SYNC}
        for length in _TS_PACKETS
        for at in range(length)
    )


def _walk_ts(file: BinaryIO, size: int) -> Iterator[int]:
    """Check that a transport stream ends with a complete packet; it may start anywhere in one."""
    start = max(0, size - _TS_RUN * max(_TS_PACKETS))
    yield start
    file.seek(start)
    tail = file.read()
    runs = ((len(tail) - rest - length * k for k in range(_TS_RUN)) for length, rest in _TS_PACKETS.items())
    if not any(all(at >= 0 and tail[at] == _TS_SYNC for at in run) for run in runs):
        raise _CutOffError("its last packet isn't whole")


def _walk_y4m(file: BinaryIO, size: int) -> Iterator[int]:
    """Check that each frame of a yuv4mpeg file, all of one length, ends within it."""
    file.seek(0)
    fields = {word[:1]: word[1:].decode("latin-1") for word in file.readline(256).split()[1:]}
    kind = re.fullmatch(r"(420|422|444|411|mono)(?:jpeg|mpeg2|paldv|p(\d+))?", fields.get(b"C", "420"))
    if not kind or not all(re.fullmatch(r"\d{1,6}", fields.get(key, "")) for key in (b"W", b"H")):
        return  # the demuxer supports more formats
    width, height = int(fields[b"W"]), int(fields[b"H"])
    across, down = {"420": (2, 2), "422": (2, 1), "444": (1, 1), "411": (4, 1), "mono": (0, 0)}[kind[1]]
    chroma = 2 * -(-width // across) * -(-height // down) if across else 0
    length = (width * height + chroma) * (2 if kind[2] else 1)
    while line := file.readline(256):
        yield file.tell()
        if not line.startswith(b"FRAME"):
            return
        _check_end(file.tell() + length, size)
        file.seek(length, io.SEEK_CUR)
