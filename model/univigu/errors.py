"""Errors that people meet: each says what was wrong, where, and what to do next, and each has its exit code.

The codes follow BSD's ``sysexits.h`` where it has a word for the case, so that schedulers can tell "fix the input"
from "try again" from "resume".
"""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def first_line(error: Exception) -> str:
    """What another library's exception says, for a sentence of ours: its message's first line, or else its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class UniViGUError(Exception):
    """Base of every expected failure. Its message is one sentence that is shown to the user without a traceback."""

    exit_code = 70


class BadInputError(UniViGUError):
    """The input can't be used, and trying again will not help (EX_DATAERR)."""

    exit_code = 65


class VideoError(BadInputError):
    """A video file that can't be used; `reason` is a short slug to count by."""

    def __init__(self, message: str, reason: str = "damaged") -> None:
        super().__init__(message)
        self.reason = reason


class MissingInputError(BadInputError):
    """A file, folder, model or earlier step's output is not there (EX_NOINPUT)."""

    exit_code = 66


class DiskFullError(UniViGUError):
    """There is no room for what should be written (EX_CANTCREAT)."""

    exit_code = 73


class CorruptDataError(BadInputError):
    """Bytes differ from what their manifest says, or the disk can't read or write them (EX_IOERR)."""

    exit_code = 74


class TransientError(UniViGUError):
    """Something that may work on the next try: a busy server, a lost connection (EX_TEMPFAIL)."""

    exit_code = 75


class ConfigError(BadInputError):
    """An unknown profile, or a parameter that makes no sense (EX_CONFIG)."""

    exit_code = 78


class GateFailedError(UniViGUError):
    """The data were read, and did not meet their contract."""

    exit_code = 80


class PreemptedError(UniViGUError):
    """The process was told to stop, saved its state, and can be resumed by running the same command again."""

    exit_code = 81


class BusyError(TransientError):
    """Another run holds the work root."""

    exit_code = 82


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BROKEN = (errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.EREMOTEIO)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
# What libraries say that don't pass the number on: torch, safetensors (Rust), SQLite, Arrow.
_SAID = {
    _FULL: ("no space left", "disk is full", "disk full", "disk quota exceeded", "file too large"),
    _BROKEN: ("input/output error", "disk i/o error", "stale file handle"),
    _FORBIDDEN: ("read-only file system", "readonly database"),
}
_SCARCE_BYTES = 64 * 1024


def storage_fault(error: BaseException, place: Path) -> UniViGUError | None:
    """What a failing disk means to people, in one sentence; None where an error is about something else.

    place: what was to be read or written, for errors that don't name a file. A full disk is a `DiskFullError`, one that
    doesn't read or write a `CorruptDataError`, and one that may not be written a `BadInputError`.
    """
    for cause in _causes(error):
        number = cause.errno if isinstance(cause, OSError) else None
        where = cause.filename if isinstance(cause, OSError) and cause.filename else place
        words = str(cause).lower()
        kind = next((known for known in _SAID if number in known or any(one in words for one in _SAID[known])), None)
        if kind is _FORBIDDEN and not isinstance(cause, OSError) and _is_writable(Path(where)):
            kind = _BROKEN  # SQLite opens a database for reading alone if opening it for writing fails
        if kind is _FULL:
            return DiskFullError(f"The disk is full at {where}; make room and run it again.")
        if kind is _BROKEN:
            return CorruptDataError(
                f"The disk fails at {where} (input/output error); check it and its connection, and run it again."
            )
        if kind is _FORBIDDEN:
            why = cause.strerror if isinstance(cause, OSError) and cause.strerror else "read-only"
            return BadInputError(f"{where} can't be used ({why}); correct its permissions, or choose another place.")
    if place.is_dir() and shutil.disk_usage(place).free < _SCARCE_BYTES:
        return DiskFullError(f"The disk is full at {place}; make room and run it again.")
    return None


def _is_writable(file: Path) -> bool:
    return all(os.access(one, os.W_OK) for one in (file, file.parent))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came from."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
