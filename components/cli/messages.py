"""What commands say beside their result: on standard error, unless `--quiet` was given."""

import os
import sys

QUIET, VERBOSE = "UNIVIGU_QUIET", "UNIVIGU_VERBOSE"  # 1 after --quiet and --verbose, also in child processes


def is_quiet() -> bool:
    """Whether only results and errors are printed."""
    return os.environ.get(QUIET) == "1"


def is_verbose() -> bool:
    """Whether warnings and log lines of libraries, and tracebacks of errors, are printed."""
    return os.environ.get(VERBOSE) == "1"


def say(message: str) -> None:
    """Print a message for people on standard error; `--quiet` hides it."""
    if not is_quiet():
        print(message, file=sys.stderr, flush=True)
