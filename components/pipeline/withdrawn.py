"""Withdrawn data: tombstones that every run obeys, so that nothing withdrawn comes back.

`data/withdrawn.json` under the work root is small, and meant to be committed to git. It lists prompts and clips by id,
videos by the SHA-256 of their files, sources by name, and the digests of the outputs that held any of them. It holds no
text and no name of a file. A step drops withdrawn rows wherever it gets them (`Step.write`, `Step.map_shards`), as
quarantined without their content, and accepts no input among those outputs: also not one restored from a cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from univigu.errors import CorruptDataError
from univigu.files import read_json_object, write_json

FILE = "data/withdrawn.json"
VERSION = 1
REASON = "withdrawn"
DETAIL = f"it was withdrawn: {FILE}"


@dataclass(frozen=True)
class Withdrawn:
    """Everything that was withdrawn under a work root."""

    prompts: frozenset[str] = frozenset()
    clips: frozenset[str] = frozenset()
    videos: frozenset[str] = frozenset()
    sources: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()  # digests

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))

    def covers(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of any table, or the plan of one, is of something that was withdrawn."""
        return (
            row.get("id") in self.prompts
            or row.get("id") in self.clips
            or row.get("clip_id") in self.clips
            or row.get("prompt_id") in self.prompts
            or row.get("source_sha256") in self.videos
            or row.get("generator_digest") in self.videos
            or row.get("source") in self.sources
        )


def read_withdrawn(root: Path) -> Withdrawn:
    """What was withdrawn under a work root; raises `CorruptDataError` if the file can't be understood."""
    entries = read_entries(root)
    names = [field.name for field in fields(Withdrawn)]
    return Withdrawn(**{name: frozenset(value for entry in entries for value in entry[name]) for name in names})


def read_entries(root: Path) -> list[dict[str, Any]]:
    """The withdrawals under a work root, oldest first; raises as `read_withdrawn` does."""
    path = root / FILE
    try:
        found = read_json_object(path)
        if found["version"] != VERSION:
            raise ValueError(f"its version is {found['version']}, not {VERSION}")
        _check(found["entries"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptDataError(
            f"{path} says what was withdrawn and can't be read ({error}); restore it from git, and don't delete it."
        ) from error
    return found["entries"]


def _check(entries: Any) -> None:
    for entry in entries:
        for name in (field.name for field in fields(Withdrawn)):
            if not isinstance(entry[name], list) or not all(isinstance(value, str) for value in entry[name]):
                raise ValueError(f"'{name}' is not a list of texts")


def add_entry(root: Path, entry: Mapping[str, Any]) -> int:
    """Add a withdrawal with the fields of `Withdrawn` as sorted lists; returns its number, from 1."""
    entries = read_entries(root)
    entries.append({"number": len(entries) + 1, **entry})
    (root / FILE).parent.mkdir(parents=True, exist_ok=True)
    write_json(root / FILE, {"version": VERSION, "entries": entries})
    return len(entries)
