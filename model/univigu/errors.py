"""Errors that people meet: each says what was wrong, where, and what to do next, and each has its exit code.

The codes follow BSD's ``sysexits.h`` where it has a word for the case, so that schedulers can tell "fix the input"
from "try again" from "resume".
"""


def first_line(error: Exception) -> str:
    """What another library's exception says, for a sentence of ours: its message's first line, or else its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class UniViGUError(Exception):
    """Base of every expected failure. Its message is one sentence that is shown to the user without a traceback."""

    exit_code = 70


class BadInputError(UniViGUError):
    """The input can't be used, and trying again will not help (EX_DATAERR)."""

    exit_code = 65


class MissingInputError(BadInputError):
    """A file, folder, model or earlier step's output is not there (EX_NOINPUT)."""

    exit_code = 66


class DiskFullError(UniViGUError):
    """There is no room for what should be written (EX_CANTCREAT)."""

    exit_code = 73


class CorruptDataError(BadInputError):
    """Bytes differ from what their manifest says (EX_IOERR)."""

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
