"""Expected errors: each message says what was wrong, where, and what to do next, and each class has an exit code.

The codes follow BSD's ``sysexits.h`` where it has one for the case, so that schedulers can distinguish "fix the input",
"try again" and "resume".
"""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def first_line(error: Exception) -> str:
    """The first line of another library's exception, for use in a message of ours; its class name if it is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class UniViGUError(Exception):
    """Base class of all expected failures. The message is shown to the user, without a traceback."""

    exit_code = 70


class BadInputError(UniViGUError):
    """The input can't be used, and a retry will not help (EX_DATAERR)."""

    exit_code = 65


class VideoError(BadInputError):
    """A video file that can't be used; `reason` is a short slug for counting."""

    def __init__(self, message: str, reason: str = "damaged") -> None:
        super().__init__(message)
        self.reason = reason


class MissingInputError(BadInputError):
    """A file, a folder, a model or the output of an earlier step is missing (EX_NOINPUT)."""

    exit_code = 66


class DiskFullError(UniViGUError):
    """The disk is full (EX_CANTCREAT)."""

    exit_code = 73


class CorruptDataError(BadInputError):
    """Bytes differ from their manifest, or the disk can't read or write them (EX_IOERR)."""

    exit_code = 74


class TransientError(UniViGUError):
    """A failure that may not occur on the next try: a busy server, a lost connection (EX_TEMPFAIL)."""

    exit_code = 75


class ConfigError(BadInputError):
    """An unknown profile, or an invalid parameter (EX_CONFIG)."""

    exit_code = 78


class GateFailedError(UniViGUError):
    """The data were read, but violate their expectations."""

    exit_code = 80


class PreemptedError(UniViGUError):
    """The process received SIGTERM and saved its state; running the same command again resumes it."""

    exit_code = 81


class BusyError(TransientError):
    """Another run holds the work root."""

    exit_code = 82


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BROKEN = (errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.EREMOTEIO)
_DENIED = (errno.EACCES, errno.EPERM)
_FORBIDDEN = (errno.EROFS, *_DENIED)
_READONLY_DATABASE = "readonly database"  # in SQLite's message
_DENIED_IN_RUST = "permission denied (os error 13)"
# The messages of libraries that don't pass the error number on: torch, safetensors (Rust), SQLite, Arrow.
_SAID = {
    _FULL: ("no space left", "disk is full", "disk full", "disk quota exceeded", "file too large"),
    _BROKEN: ("input/output error", "disk i/o error", "stale file handle"),
    _FORBIDDEN: ("read-only file system", _READONLY_DATABASE, _DENIED_IN_RUST),
}
_SCARCE_BYTES = 64 * 1024


def storage_fault(error: BaseException, place: Path) -> UniViGUError | None:
    """An error of ours for a failing disk; None where the error has another cause.

    place: the file or folder in use, for errors that don't name one. A full disk gives a `DiskFullError`, one that
    fails to read or write a `CorruptDataError`, and missing permissions a `BadInputError`.
    """
    for cause in _causes(error):
        number = cause.errno if isinstance(cause, OSError) else None
        where = cause.filename if isinstance(cause, OSError) and cause.filename else place
        words = str(cause).lower()
        kind = next((known for known in _SAID if number in known or any(one in words for one in _SAID[known])), None)
        if kind is _FORBIDDEN and _READONLY_DATABASE in words and _is_writable(Path(where)):
            kind = _BROKEN  # SQLite falls back to read-only if opening a database for writing fails
        if kind is _FULL:
            return DiskFullError(f"The disk is full at {where}; free some space and run the command again.")
        if kind is _BROKEN:
            return CorruptDataError(
                f"The disk fails at {where} (input/output error); check the disk, then run the command again."
            )
        if kind is _FORBIDDEN:
            denied = number in _DENIED or _DENIED_IN_RUST in words
            otherwise = "permission denied" if denied else "read-only"
            why = cause.strerror if isinstance(cause, OSError) and cause.strerror else otherwise
            remedy = "correct its permissions" if denied else "work in a copy on a disk that can be written"
            return BadInputError(f"{where} can't be used ({why}); {remedy}, or choose another folder.")
    if place.is_dir() and shutil.disk_usage(place).free < _SCARCE_BYTES:
        return DiskFullError(f"The disk is full at {place}; free some space and run the command again.")
    return None


def _is_writable(file: Path) -> bool:
    return all(os.access(one, os.W_OK) for one in (file, file.parent))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause of that, and so on."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
