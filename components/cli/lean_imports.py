"""Imports diffusers and transformers faster for commands that a person waits for."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# transformers imports it for the losses of object detection, diffusers for schedules that no model here uses. Both look
# whether it is there, since neither requires it, nor does the library `univigu` (a tenth of the time).
UNUSED = "scipy"


@contextmanager
def lean_imports() -> Iterator[None]:
    """Import without garbage collection, and as if an optional package that isn't needed were not installed.

    Nothing changes for a process that has the package already; afterwards it can be imported as usual.
    """
    hidden = UNUSED not in sys.modules
    if hidden:
        sys.modules[UNUSED] = None  # pyrefly: ignore[unsupported-operation]  # Python's own way to make an import fail
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        if hidden:
            del sys.modules[UNUSED]
