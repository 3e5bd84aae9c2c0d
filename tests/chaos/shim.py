"""Builds the shim of `shim.c`, preloads it, and arms it in this process."""

import ctypes
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("shim.c")
NAME, PRELOAD = "chaos-shim.so", "LD_PRELOAD"


class Fault(NamedTuple):
    """What happens at the n-th write-side call below a folder."""

    n: int
    number: int = 0  # an errno; 0: SIGKILL
    lasting: bool = False  # later calls fail as well: a full disk stays full

    @property
    def kind(self) -> str:
        name = errno.errorcode[self.number] if self.number else "kill"
        return f"{name} from then on" if self.lasting else name


KINDS = {
    fault.kind: fault
    for fault in (
        Fault(0),
        Fault(0, errno.EIO),
        Fault(0, errno.EIO, True),
        Fault(0, errno.ENOSPC),
        Fault(0, errno.ENOSPC, True),
    )
}


def preload() -> None:
    """Build the shim, and start this process again with it; in that process, clear up and return."""
    first, _, others = os.environ.get(PRELOAD, "").partition(":")
    if Path(first).name == NAME:  # it is mapped; processes that this one starts don't need it
        os.environ[PRELOAD] = others
        shutil.rmtree(Path(first).parent)
        return
    library = Path(tempfile.mkdtemp(prefix="chaos-shim-")) / NAME
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library, SOURCE, "-ldl"], check=True)
    before = os.environ.get(PRELOAD, "")
    more = {PRELOAD: f"{library}:{before}", "OMP_NUM_THREADS": "1"}  # no threads of torch's, which a fork would lack
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **more})


def arm(below: Path, fault: Fault, journal: int = -1) -> None:
    """Hit the `fault.n`-th call below a folder (0: none); the descriptor `journal` is told which call that was."""
    ctypes.CDLL(None).chaos_arm(
        os.fsencode(below),
        ctypes.c_long(fault.n),
        ctypes.c_int(fault.number),
        ctypes.c_int(fault.lasting),
        ctypes.c_int(journal),
    )
