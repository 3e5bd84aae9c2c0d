"""What `univigu.training.launch` starts on each rank: `-m MODULE ...` or `SCRIPT ...`, as Python would run it.

The only difference is the exit. Gloo's threads outlive the last collective, and a thread that requests the
interpreter's lock while the interpreter shuts down aborts the process after all its work is done
(pytorch/pytorch#190489). So a worker skips the shutdown: it exits after its threads are joined and its exit handlers
have run, with the exit code that it would have had.
"""

import atexit
import os
import runpy
import sys
from collections.abc import Sequence


def work(command: Sequence[str]) -> None:
    """Run `command` as ``__main__`` of this process, which then exits."""
    ended = [1]  # the exit code after a traceback

    @atexit.register  # registered before the handlers of the command, so it runs after them
    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(ended[0])

    try:
        if command[0] == "-m":
            sys.argv = list(command[1:])
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(command)
            sys.path[0] = os.path.dirname(os.path.abspath(command[0]))
            runpy.run_path(command[0], run_name="__main__")
        ended[0] = 0
    except SystemExit as error:
        ended[0] = exit_code(error.code)
        raise


def exit_code(code: object) -> int:
    """The exit code of the process after `sys.exit(code)`."""
    if code is None:
        return 0
    return code & 0xFF if isinstance(code, int) else 1


if __name__ == "__main__":
    work(sys.argv[1:])
