"""Keeps on disk what transformers finds in the source files of its models whenever it is imported.

It reads them all, 1,700 in version 5.23, to learn which names each one exports. A process that finds them unchanged
takes what an earlier one found; otherwise it reads them and keeps the result.
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

from univigu.user_cache import keep, read_kept

Exports: TypeAlias = dict[Any, Any]  # of a folder, nested: by subfolder, or by required backends and module
_FAULTS = (ValueError, TypeError, AttributeError, RecursionError)  # of a kept file, or of another structure


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
    name = f"transformers-{hashlib.sha256(os.fsencode(models)).hexdigest()[:16]}.json"
    try:
        stamp = _stamp(models, version)
    except OSError:
        return read(models)
    with suppress(*_FAULTS):
        if kept := read_kept(name, stamp):
            return _decoded(json.loads(kept))
    found = read(models)
    with suppress(*_FAULTS):
        content = json.dumps(_encoded(found), separators=(",", ":")).encode()
        if _decoded(json.loads(content)) == found:  # otherwise transformers describes its models in another way
            keep(name, stamp, content)
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
