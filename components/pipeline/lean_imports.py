"""Saves a command the time to import optional packages that it doesn't need.

diffusers and transformers import some packages whenever they are installed: scipy for losses of object detection and
schedules that no model here uses, peft for adapters. The library `univigu` requires neither, so without them a command
runs as it does where only the library is installed, and starts in three quarters of the time.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Process:
    is_command = False


def start_command() -> None:
    """Note that this process runs one command and then ends; elsewhere, as in tests, nothing is hidden."""
    _Process.is_command = True


def import_models() -> None:
    """Import what runs models, without scipy, which a step may still import for itself afterwards."""
    with without("scipy"):
        import univigu.transformer  # noqa: F401


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Import as if `packages` were not installed, unless they have been imported already.

    diffusers and transformers remember what they found, so adapters can't be used later in the same process, and once
    one of the two is imported nothing is hidden any more.
    """
    hides = _Process.is_command and not {"diffusers", "transformers"} & sys.modules.keys()
    hidden = [name for name in packages if hides and name not in sys.modules]
    for name in hidden:
        # Python's own way to make an import fail
        # pyrefly: ignore[unsupported-operation]
        sys.modules[name] = None
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
