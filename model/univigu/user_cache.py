"""What a user's processes keep for later ones in ~/.cache/univigu (or $XDG_CACHE_HOME/univigu).

It only saves time: whatever is missing, damaged, or kept by another version is computed again, and nothing here raises.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from univigu.files import replaced

LARGEST = 16 * 2**20  # bytes of a kept file that are read


def read_kept(name: str, stamp: bytes) -> bytes | None:
    """The bytes that `keep` kept under this name and stamp; None if there are none, or they are damaged."""
    path = _path(name)
    try:
        if not path or not path.is_file():  # opening a pipe would wait
            return None
        with path.open("rb") as stream:
            digest, _, content = stream.read(LARGEST).partition(b"\n")
    except OSError:
        return None
    return content if digest == _digest(stamp, content) else None


def keep(name: str, stamp: bytes, content: bytes) -> None:
    """Keep bytes for later processes, if the folder can be written.

    stamp: what the content was computed from, such as a version; under another stamp it isn't found.
    """
    if path := _path(name):
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced(path) as stream:
                stream.write(_digest(stamp, content) + b"\n" + content)


def _path(name: str) -> Path | None:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "univigu", name) if os.path.isabs(cache) else None  # None: there is no home


def _digest(stamp: bytes, content: bytes) -> bytes:
    return hashlib.sha256(stamp + content).hexdigest().encode()
