"""Keeps on disk what transformers finds in the source files of its models whenever it is imported.

It reads them all, 1,700 in version 5.23, to learn which names each one exports. A process that finds them unchanged
takes what an earlier one found; otherwise it reads them and keeps the result. Whatever is wrong with the kept file, or
with its folder, costs only the time.
"""

import functools
import hashlib
import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from univigu.files import replaced

Exports: TypeAlias = dict[Any, Any]  # of a folder, nested: by subfolder, or by required backends and module
_LARGEST = 16 * 2**20  # bytes of the kept file; 0.2 MB in version 5.23
_FAULTS = (OSError, ValueError, TypeError, AttributeError, RecursionError)  # of a kept file, or of another structure


def remember(read: Callable[[Any], Exports], package: Path, version: str) -> Callable[[Any], Exports]:
    """`read`, `create_import_structure_from_path` of transformers, that reads the folder of models at most once.

    read: gives what a folder, or the folder of a file, exports; it may raise `OSError`. package: the folder of the
    package. For folders outside `package/models` the result calls `read`.
    """
    models = package / "models"
    found = _find(read, models, f"{version} Python {platform.python_version()}")

    def answer(path: Any) -> Exports:
        folder = os.path.dirname(path) if os.path.isfile(path) else path
        inner: Any = found
        try:
            for name in Path(folder).relative_to(models).parts:
                inner = inner[name]
        except (KeyError, ValueError):
            return read(path)
        return inner

    return functools.cache(answer)


def _find(read: Callable[[Any], Exports], models: Path, version: str) -> Exports:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # no home
        return read(models)
    place = hashlib.sha256(os.fsencode(models)).hexdigest()[:16]
    kept = Path(cache) / "univigu" / f"transformers-{place}.json"
    try:
        stamp = _stamp(models, version)
    except OSError:
        return read(models)
    with suppress(*_FAULTS):
        return _read_kept(kept, stamp)
    found = read(models)
    with suppress(*_FAULTS):
        _keep(kept, stamp, found)
    return found


def _stamp(models: Path, version: str) -> bytes:
    """Differs once a source file has been added, removed or changed, by size and time as for Python's own caches."""
    reader = os.stat(models.parent / "utils/import_utils.py")  # how they are read
    lines = [version, f"{reader.st_size} {reader.st_mtime_ns}"]
    _list_files(str(models), lines)
    return hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest().encode()


def _list_files(folder: str, lines: list[str]) -> None:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda each: each.name):
            if entry.name == "__pycache__":
                continue
            lines.append(entry.path)
            if entry.is_dir():
                _list_files(entry.path, lines)
            else:
                facts = entry.stat()
                lines.append(f"{facts.st_size} {facts.st_mtime_ns}")


def _read_kept(kept: Path, stamp: bytes) -> Exports:
    """Raises `OSError` or `ValueError` where nothing is kept, or for other sources, or damaged."""
    if not kept.is_file():  # opening a pipe would wait
        raise ValueError(f"{kept} is no file")
    with kept.open("rb") as stream:
        digest, _, content = stream.read(_LARGEST).partition(b"\n")
    if digest != _digest(stamp, content):
        raise ValueError(f"{kept} is damaged or of other sources")
    return _decoded(json.loads(content))


def _keep(kept: Path, stamp: bytes, found: Exports) -> None:
    """Raises an error where `found` can't be kept as it is, or the file can't be written."""
    content = json.dumps(_encoded(found), separators=(",", ":")).encode()
    if _decoded(json.loads(content)) != found:
        raise ValueError("transformers describes its models in another way")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with replaced(kept) as stream:
        stream.write(_digest(stamp, content) + b"\n" + content)


def _digest(stamp: bytes, content: bytes) -> bytes:
    return hashlib.sha256(stamp + content).hexdigest().encode()


def _encoded(exports: Exports) -> list[Any]:
    """Pairs, since the names of backends are a key that is a set."""
    return [
        [key, _encoded(value)]
        if isinstance(key, str)
        else [sorted(key), {module: sorted(names) for module, names in value.items()}]
        for key, value in exports.items()
    ]


def _decoded(pairs: list[Any]) -> Exports:
    return {
        key if isinstance(key, str) else frozenset(key): _decoded(value)
        if isinstance(key, str)
        else {module: set(names) for module, names in value.items()}
        for key, value in pairs
    }
