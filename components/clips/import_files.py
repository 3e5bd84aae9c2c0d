"""The videos of a folder to import: files, and members of WebDataset's tars; and which must not be opened.

A member's name is ``TAR/NAME``, as if the tar were a folder. Links out of the folder are not followed, wherever they
are in a path, and only regular files are opened: a named pipe would block. Files that are left out are listed with a
reason.
"""

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from components.clips.archive import Member, list_tar, read_member
from univigu.errors import CorruptDataError, MissingInputError
from univigu.files import file_sha256

VIDEOS = frozenset(
    (
        *(".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".gif", ".flv", ".wmv", ".asf", ".ogv"),
        *(".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".vob", ".y4m"),
    )
)
TAR = ".tar"
Faults = dict[str, tuple[str, str]]  # a name in the folder -> a slug to count by, and the details


@dataclass(frozen=True)
class Videos:
    """The videos that an import reads, whatever they are in."""

    folder: Path
    names: list[str]  # sorted
    faults: Faults  # of what can't be opened
    members: Mapping[str, Member]  # all members of tars by name: videos and texts

    def open(self, name: str) -> Path | bytes:
        """A video's file, or its bytes, of at most `LARGEST_MEMBER`."""
        return read_member(self.members[name]) if name in self.members else self.folder / name

    def size(self, name: str) -> int:
        """The bytes of a video; 0 if its file is no longer there."""
        if name in self.members:
            return self.members[name].size
        with suppress(OSError):
            return (self.folder / name).stat().st_size
        return 0

    def digest(self, name: str) -> str:
        """The SHA-256 of a video; raises `OSError` if it can't be read."""
        if name in self.members:
            return hashlib.sha256(read_member(self.members[name])).hexdigest()
        return file_sha256(self.folder / name)

    def beside(self, name: str, suffix: str) -> str:
        """The name of a video's companion: its own with another suffix; in a tar, suffixes start at the first dot."""
        path = PurePosixPath(name)
        stem = path.name.partition(".")[0] if name in self.members else path.stem
        return path.with_name(f"{stem}{suffix}").as_posix()


def find_videos(folder: Path) -> Videos:
    """The videos in a folder and in its tars; raises `MissingInputError` if there is neither a video nor a fault."""
    if not folder.is_dir():
        raise MissingInputError(f"There is no folder {folder}; give a folder with videos.")
    found = {path.relative_to(folder).as_posix(): fault for path, fault in _walk(folder, VIDEOS | {TAR})}
    faults = {name: fault for name, fault in found.items() if fault}
    members: dict[str, Member] = {}
    tars = [name for name, fault in found.items() if not fault and name.lower().endswith(TAR)]
    for tar in sorted(tars):
        try:
            for name, member in list_tar(folder / tar):
                whole = f"{tar}/{name}"
                if isinstance(member, str) or whole in members:
                    why = member if isinstance(member, str) else "the tar has two members of this name"
                    faults[whole] = ("unreadable_member", why)
                else:
                    members[whole] = member
        except CorruptDataError as error:
            faults[tar] = ("damaged", str(error).replace(str(folder / tar), tar))
        except OSError as error:
            faults[tar] = ("unreadable", f"it can't be read ({error.strerror})")
    files = [name for name, fault in found.items() if not fault and name not in tars]
    names = sorted([*files, *(name for name in members if is_video(name) and name not in faults)])
    if not names and not faults:
        raise _no_video(folder)
    return Videos(folder, names, faults, members)


def is_video(name: str) -> bool:
    """Whether a name is that of a video; names of hidden files aren't."""
    path = PurePosixPath(name)
    return path.suffix.lower() in VIDEOS and not path.name.startswith(".")


def _no_video(folder: Path) -> MissingInputError:
    return MissingInputError(f"There is no video in {folder} ({', '.join(sorted(VIDEOS))}); give a folder with videos.")


def list_videos(folder: Path) -> tuple[list[str], Faults]:
    """The sorted names of the videos in a folder, at any depth, and the faults of others; hidden files are left out.

    Raises `MissingInputError` if there are neither.
    """
    if not folder.is_dir():
        raise MissingInputError(f"There is no folder {folder}; give a folder with videos.")
    names, faults = [], {}
    for path, fault in _walk(folder, VIDEOS):
        name = path.relative_to(folder).as_posix()
        if fault:
            faults[name] = fault
        else:
            names.append(name)
    if not names and not faults:
        raise _no_video(folder)
    return sorted(names), faults


def _walk(folder: Path, suffixes: frozenset[str]) -> Iterator[tuple[Path, tuple[str, str] | None]]:
    """Every file with one of these suffixes, and every folder that can't be read, each with its fault if it has one."""
    unreadable: list[OSError] = []
    for home, folders, files in os.walk(folder, onerror=unreadable.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            path = Path(home, name)
            if path.is_symlink() and (fault := find_fault(folder, path)):
                yield path, fault
        for name in files:
            path = Path(home, name)
            if path.suffix.lower() in suffixes and not name.startswith("."):
                yield path, find_fault(folder, path)
    for error in unreadable:
        yield Path(error.filename), ("unreadable", f"it can't be looked into ({error.strerror})")


def find_fault(folder: Path, path: Path) -> tuple[str, str] | None:
    """Why `path` in `folder` must not be opened, as a slug and the details; None if it may be."""
    try:
        real, kind = path.resolve(strict=True), path.stat().st_mode
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
        if path.is_symlink():
            return "broken_link", "it is a link to nothing that can be reached"
        return "unreadable", f"it can't be looked at ({getattr(error, 'strerror', error)})"
    if not real.is_relative_to(folder.resolve()):
        return "outside", "it is a link out of the folder: copy the file into it"
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        return "not_a_file", "it is a pipe, a socket or a device"
    return None
