"""What people wrote about their own videos: a text file beside each, or one CSV or JSONL file for all.

Texts are as people's tools leave them: with or without a byte-order mark, in UTF-8 or UTF-16, with stray control
characters. They are repaired as prompts are, and a text that is lost is told from one that isn't there.
"""

import csv
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from components.import_files import find_fault
from components.prompt_filters import control_damage, repair, text_damage
from univigu.errors import BadInputError, ConfigError, MissingInputError

FILE, CAPTION, PROMPT = ("file_name", "file", "video", "path"), ("caption", "text"), ("prompt",)  # the first there is
BESIDE = ("metadata.jsonl", "metadata.csv")  # found without being named, as other tools call them


@dataclass(frozen=True)
class Texts:
    """What is written about one video; empty where nothing is."""

    caption: str
    prompt: str


@dataclass(frozen=True)
class Fault:
    """What can't be used: an id (a file's name, or a table's line), a slug to count by, what was seen, the raw row."""

    id: str
    reason: str
    detail: str
    row: Any = None


def read_texts(folder: Path, videos: Sequence[str], table: Path | None) -> tuple[dict[str, Texts], list[Fault]]:
    """The texts of the videos by name, and what could not be used.

    table: a CSV or JSONL file; without one, a `metadata.jsonl` or `metadata.csv` in the folder, or else `NAME.txt`
    beside `NAME.mp4`. Raises where a table can't be read at all.
    """
    table, faults = (table, []) if table else _find_table(folder)
    rows = read_table(table) if table else read_sidecars(folder, videos)
    by_key = {_key(name): name for name in videos}
    texts: dict[str, Texts] = {}
    for where, row in rows:
        fault = _fault(where, row, by_key, texts)
        if fault:
            faults.append(fault)
            continue
        name = by_key[_key(row["file"])]
        texts[name] = Texts(repair(row["caption"]), repair(row["prompt"]))
    return texts, faults


def _find_table(folder: Path) -> tuple[Path | None, list[Fault]]:
    """The table that is in the folder, if any, and those that must not be opened."""
    found = [name for name in BESIDE if os.path.lexists(folder / name) and not (folder / name).is_dir()]
    faults = [Fault(name, *fault) for name in found if (fault := find_fault(folder, folder / name))]
    bad = {fault.id for fault in faults}
    return next((folder / name for name in found if name not in bad), None), faults


def _fault(where: str, row: Any, by_key: Mapping[str, str], known: Mapping[str, Texts]) -> Fault | None:
    """Why one row of texts can't be used, or None."""
    if isinstance(row, Fault):
        return row
    if not isinstance(row, dict):
        return Fault(where, "broken_row", "it is no object with the name of a file", row)
    name = row["file"].replace("\\", "/")
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\0" in name:
        return Fault(where, "outside", f"'{printable(name)}' is not a name inside the folder", row)
    if _key(name) not in by_key:
        return Fault(where, "no_file", f"there is no video '{printable(name)}' in the folder", row)
    if by_key[_key(name)] in known:
        return Fault(where, "duplicate_row", f"'{printable(name)}' has a text already", row)
    for kind in ("caption", "prompt"):
        damage = control_damage(row[kind]) or text_damage(repair(row[kind]))
        if damage:
            return Fault(by_key[_key(name)], "damaged_text", f"its {kind} {damage}", row)
    if not repair(row["caption"] or row["prompt"]):
        return Fault(by_key[_key(name)], "no_text", "its text is empty", row)
    return None


def _key(name: str) -> str:
    """A name that is the same however its accents are composed and its parts are written."""
    return unicodedata.normalize("NFC", PurePosixPath(name.replace("\\", "/")).as_posix())


def printable(name: str) -> str:
    """A file's name as text that every table can hold."""
    return name.encode(errors="replace").decode()


# --- reading ---------------------------------------------------------------------------------------------------------


def read_sidecars(folder: Path, videos: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """A row for each video with a text file of its name beside it."""
    for name in videos:
        path = (folder / name).with_suffix(".txt")
        if os.path.lexists(path) and (fault := find_fault(folder, path)):
            yield printable(name), Fault(printable(name), fault[0], f"of its text: {fault[1]}")
        elif path.is_file():
            yield printable(name), {"file": name, "caption": decode(path.read_bytes()), "prompt": ""}


def read_table(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each row of a CSV or JSONL file is, and the row with `file`, `caption` and `prompt`; None for a broken one.

    Raises `MissingInputError` where there is no such file, `ConfigError` for another kind, and `BadInputError` where
    its columns aren't those of texts.
    """
    if not path.is_file():
        raise MissingInputError(f"There is no file of captions at {path}; check the path.")
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"{path.name} is neither CSV nor JSONL; give a file of captions that ends in .csv or .jsonl.")
    for line, row in readers[path.suffix.lower()](path):
        yield f"{path.name}:{line}", _named(row)


def _named(row: Any) -> dict[str, str] | Any:
    """A row under our own names; what isn't one comes back as it is, in a list, so that it is quarantined."""
    if not isinstance(row, dict):
        return [row]
    found = {}
    for name, columns in (("file", FILE), ("caption", CAPTION), ("prompt", PROMPT)):
        value = next((row[column] for column in columns if row.get(column) is not None), "")
        if not isinstance(value, str):
            return [row]
        found[name] = value
    return found if found["file"] else [row]


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding=_encoding(path.open("rb").read(4)), errors="replace", newline="") as stream:
        reader = csv.DictReader(stream)
        try:
            columns = reader.fieldnames or []
            if not set(columns) & set(FILE) or not set(columns) & {*CAPTION, *PROMPT}:
                raise BadInputError(
                    f"{path.name} has the columns {', '.join(columns) or '(none)'}; it needs one of {', '.join(FILE)} "
                    f"and one of {', '.join((*CAPTION, *PROMPT))}."
                )
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise BadInputError(f"Line {reader.line_num} of {path.name} is no CSV ({error}); mend it.") from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding=_encoding(path.open("rb").read(4)), errors="replace") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError):
                    yield number, line[:200]


def decode(content: bytes) -> str:
    """A text file's text; what isn't its encoding's becomes U+FFFD, which `repair` keeps."""
    return content.decode(_encoding(content[:4]), errors="replace")


def _encoding(start: bytes) -> str:
    """UTF-16 where a byte-order mark says so, and UTF-8 with or without one otherwise."""
    return "utf-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
