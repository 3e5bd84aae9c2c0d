"""Clips on disk: mp4 files in deterministic tar shards, read by name without extraction and checked against their row.

`univigu.video` encodes and decodes the mp4s.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from univigu.errors import BadInputError, CorruptDataError, MissingInputError
from univigu.video import decode_mp4

LARGEST_MEMBER = 1 << 30  # bytes of one clip


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    """Write `members` (name -> bytes) as an uncompressed tar, sorted by name, without times, owners or hosts.

    Raises `BadInputError` for a name that isn't a plain relative path.
    """
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in sorted(members):
            _check_name(name, path)
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(members[name]), 0o644
            archive.addfile(info, io.BytesIO(members[name]))


def stream_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write `members` as `write_tar` does, but in their order, with only one of them in memory."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            _check_name(name, path)
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o644
            archive.addfile(info, io.BytesIO(content))


def join_tars(parts: Iterable[Path], path: Path) -> None:
    """Write the members of the shards `parts` as one shard at `path`."""
    write_tar(path, {name: content for part in parts for name, content in read_tar(part)})


def read_tar(path: Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, bytes]]:
    """Each member's name and bytes, in the tar's order or in that of `names`; nothing is extracted to the disk.

    Raises `MissingInputError` if the tar is missing, `CorruptDataError` if it is damaged or lacks a member, and
    `BadInputError` for an unsafe name.
    """
    if not path.is_file():
        raise MissingInputError(f"There is no shard at {path}; run the step that makes it again.")
    with path.open("rb") as file:
        try:
            places = {name: (start, length) for name, start, length in _list_members(file)}
        except (tarfile.TarError, ValueError) as error:
            raise CorruptDataError(
                f"The shard {path} is damaged ({error}); delete it and run its step again."
            ) from error
        for name in places if names is None else names:
            _check_name(name, path)
            if name not in places:
                raise CorruptDataError(f"There is no '{name}' in {path}; run the step that makes the shard again.")
            start, length = places[name]
            file.seek(start)
            yield name, file.read(length)


def _list_members(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Each regular file's name, offset and size in bytes, all within the tar.

    The headers are read one by one, without extensions: `tarfile` would trust their sizes and sparse maps. Raises
    `tarfile.TarError` for an invalid header.
    """
    size, at = file.seek(0, io.SEEK_END), 0
    if not size:
        raise tarfile.ReadError("empty file")
    while at < size:
        file.seek(at)
        header = file.read(tarfile.BLOCKSIZE)
        if not any(header):
            return
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        start = at + tarfile.BLOCKSIZE
        if not 0 <= info.size <= min(size - start, LARGEST_MEMBER):
            raise tarfile.ReadError(f"a member of {info.size} bytes in a tar of {size}")
        if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            yield info.name, start, info.size
        at = start + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


class Member(NamedTuple):
    """A file in a tar: where its bytes are."""

    tar: Path
    start: int
    size: int


def list_tar(path: Path) -> Iterator[tuple[str, Member | str]]:
    """Each regular file's name in a tar of another tool, and where it is, or why it can't be used.

    Raises `CorruptDataError` if the tar is damaged, and `OSError` if it can't be read.
    """
    with path.open("rb") as file:
        try:
            for name, start, size in _list_members(file):
                fault = _name_fault(name)
                if len(name.encode(errors="surrogateescape")) == tarfile.LENGTH_NAME:
                    fault = "its name in the tar is cut off after 100 bytes: use shorter names"
                yield name.encode(errors="replace").decode(), fault or Member(path, start, size)
        except (tarfile.TarError, ValueError) as error:
            raise CorruptDataError(f"The tar {path} is damaged ({error}); get it afresh.") from error


def read_member(member: Member) -> bytes:
    """The bytes of a file in a tar; raises `OSError` if it can't be read."""
    with member.tar.open("rb") as file:
        file.seek(member.start)
        return file.read(member.size)


def _name_fault(name: str) -> str:
    parts = PurePosixPath(name).parts
    unsafe = not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name
    return "its name in the tar is not a plain relative path" if unsafe else ""


def read_clips(folder: Path, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], bytes]]:
    """Each row (with `shard` and `member`) and its mp4 bytes; a shard is opened once for consecutive rows from it."""
    for shard, group in groupby(rows, key=lambda row: row["shard"]):
        group = list(group)
        members = read_tar(folder / shard, [row["member"] for row in group])
        for row, (_, content) in zip(group, members, strict=True):
            yield row, content


def open_clip(row: Mapping[str, Any], content: bytes) -> tuple[np.ndarray, float]:
    """Frames uint8 (F, H, W, 3) and frame rate of a clip's bytes; raises `BadInputError` if they don't match the row.

    row: of the table `clips` (`id`, `sha256`, `frames`, `height`, `width`).
    """
    if hashlib.sha256(content).hexdigest() != row["sha256"]:
        raise BadInputError(f"The bytes of clip {row['id']} are not those that its row names; make the clip again.")
    frames, fps = decode_mp4(content)
    if frames.shape[:3] != (row["frames"], row["height"], row["width"]):
        raise BadInputError(f"Clip {row['id']} has the shape {frames.shape[:3]}, not its row's; make the clip again.")
    return frames, fps


def _check_name(name: str, path: Path) -> None:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise BadInputError(f"The name '{name}' in the shard {path} is not a plain relative path; don't use the shard.")
