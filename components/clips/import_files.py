"""The files of a folder to import: which are videos by their names, and which must not be opened.

Links out of the folder are not followed, wherever they are in a path, and only regular files are opened: a named pipe
would block. Files that are left out are listed with a reason.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from univigu.errors import MissingInputError

VIDEOS = frozenset(
    (
        *(".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".gif", ".flv", ".wmv", ".asf", ".ogv"),
        *(".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".vob", ".y4m"),
    )
)
Faults = dict[str, tuple[str, str]]  # a name in the folder -> a slug to count by, and the details


def list_videos(folder: Path) -> tuple[list[str], Faults]:
    """The sorted names of the videos in a folder, at any depth, and the faults of others; hidden files are left out.

    Raises `MissingInputError` if there are neither.
    """
    if not folder.is_dir():
        raise MissingInputError(f"There is no folder {folder}; give a folder with videos.")
    names, faults = [], {}
    for path, fault in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if fault:
            faults[name] = fault
        else:
            names.append(name)
    if not names and not faults:
        raise MissingInputError(
            f"There is no video in {folder} ({', '.join(sorted(VIDEOS))}); give a folder with videos."
        )
    return sorted(names), faults


def _walk(folder: Path) -> Iterator[tuple[Path, tuple[str, str] | None]]:
    """Every video, and every folder that can't be read, each with its fault if it has one."""
    unreadable: list[OSError] = []
    for home, folders, files in os.walk(folder, onerror=unreadable.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            path = Path(home, name)
            if path.is_symlink() and (fault := find_fault(folder, path)):
                yield path, fault
        for name in files:
            path = Path(home, name)
            if path.suffix.lower() in VIDEOS and not name.startswith("."):
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
