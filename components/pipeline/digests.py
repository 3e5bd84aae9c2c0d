"""Content digests: they depend on what files contain, not on when or where they were written."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from univigu.files import file_sha256


def tree_files(path: Path) -> list[Path]:
    """Every file at or under `path`, sorted, without caches and hidden files."""
    if path.is_file():
        return [path]
    return sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and not any(part == "__pycache__" or part.startswith(".") for part in file.relative_to(path).parts)
    )


def tree_digest(paths: Iterable[Path], relative_to: Path) -> str:
    """One SHA-256 over the names (relative to `relative_to`) and bytes of all files at or under `paths`."""
    files = sorted({file for path in paths for file in tree_files(path)})
    return json_digest({file.relative_to(relative_to).as_posix(): file_sha256(file) for file in files})


def source_digest(path: Path) -> str:
    """`tree_digest` of one file or folder that a profile names."""
    return tree_digest([path], relative_to=path if path.is_dir() else path.parent)


def json_digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, as hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def plain_json(value: Any) -> Any:
    """A value as it reads back after being written to a JSON file."""
    return json.loads(json.dumps(value, default=str))
