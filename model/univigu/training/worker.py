"""What `univigu.training.launch` starts on each rank: `-m MODULE ...` or `SCRIPT ...` as Python would, but for the end.

Gloo's threads outlive the last collective, and one that asks for the interpreter's lock just as the interpreter is torn
down aborts the process (pytorch/pytorch#190489) after all its work is done. So a worker leaves without tearing it down:
when its threads have been joined and all that was to happen at exit has, with the exit code that it would have had.
"""

import atexit
import os
import runpy
import sys
from collections.abc import Sequence


def work(command: Sequence[str]) -> None:
    """Run `command` as ``__main__`` of this process, which then ends."""
    ended = [1]  # what a traceback ends with

    @atexit.register  # before anything that the command registers, so it comes after
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
    """What the operating system is told of `sys.exit(code)`."""
    if code is None:
        return 0
    return code & 0xFF if isinstance(code, int) else 1


if __name__ == "__main__":
    work(sys.argv[1:])
