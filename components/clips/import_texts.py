"""Captions and prompts of imported videos: a text file beside each video, or a CSV, JSONL or Parquet file for all.

In WebDataset's tars, the texts of a video are in the members ``NAME.json`` and ``NAME.txt`` beside it.

Texts may be UTF-8 or UTF-16, with or without a byte-order mark, and have stray control characters. They are repaired in
the same way as prompts, and a damaged text is distinguished from a missing one.
"""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from components.clips.archive import read_member
from components.clips.import_files import Videos, find_fault
from components.prompts.filters import control_damage, repair, text_damage
from components.prompts.parquet_records import column_names, read_parquet
from components.prompts.records import (
    LONGEST_LINE,
    LONGEST_QUOTE,
    Broken,
    Record,
    file_format,
    open_csv,
    open_jsonl,
    parse,
    printable,
)
from univigu.errors import BadInputError, ConfigError, MissingInputError

# The columns of each, of which the first that exists is used.
FILE, CAPTION, PROMPT = ("file_name", "file", "video", "path"), ("caption", "text"), ("prompt",)
STAGE = "stage"  # a column of our own exports
OF_ROWS = (
    "broken_row",
    "name_outside",
    "no_file",
    "ambiguous_name",
    "duplicate_row",
)  # concern no video
BESIDE = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the usual names of tables in other tools


@dataclass(frozen=True)
class Texts:
    """The texts of one video; an empty string for a missing one."""

    caption: str
    prompt: str
    stage: int = 0  # the training stage that the row asks for; 0: none


@dataclass(frozen=True)
class Fault:
    """Something unusable: its id (a file's name, or a table's line), a slug to count by, the details, the raw row."""

    id: str
    reason: str
    detail: str
    row: Any = None


def read_texts(
    folder: Path, videos: Sequence[str], table: Path | None, of_members: Iterable[tuple[str, Any]] = ()
) -> tuple[dict[str, Texts], list[Fault]]:
    """The texts of the videos by name, and the faults.

    table: a CSV, JSONL or Parquet file; without one, files called `metadata` in the folder or its subfolders, whose
    names of videos are relative to them, and elsewhere `NAME.txt` beside `NAME.mp4`. Of several rows about one video,
    one with its exact name is preferred, then the first. of_members: `read_members`, for videos without another text.
    Raises as `read_table` does.
    """
    tables, faults = ([("", table)], []) if table else _find_tables(folder)
    others = [name for name in videos if not any(name.startswith(prefix) for prefix, _ in tables)]
    rows = chain(*(_read_within(*one) for one in tables), read_sidecars(folder, others))
    names = Names(videos)
    texts: dict[str, Texts] = {}
    inexact: list[tuple[str, str, dict[str, str]]] = []

    def take(where: str, name: str, row: dict[str, str]) -> None:
        fault = _text_fault(where, name, row, names, texts)
        if fault:
            faults.append(fault)
        else:
            texts[name] = Texts(repair(row["caption"]), repair(row["prompt"]), int(row.get("stage") or 0))

    for where, row in rows:
        if isinstance(row, Fault | Broken):
            faults.append(row if isinstance(row, Fault) else _broken(where, row, names))
            continue
        name = names.find(row["file"])
        if isinstance(name, Broken):
            faults.append(Fault(where, name.reason, name.why, row))
        elif name == row["file"]:
            take(where, name, row)
        else:
            inexact.append((where, name, row))
    for where, name, row in inexact:
        take(where, name, row)
    for where, row in of_members:
        if isinstance(row, Broken):
            faults.append(Fault(where, row.reason, row.why, row.text))
        elif row["file"] not in texts:
            take(where, row["file"], row)
    return texts, [_bounded(fault) for fault in faults]


def _find_tables(folder: Path) -> tuple[list[tuple[str, Path]], list[Fault]]:
    """The table of each folder that has one, with the folder's name; and the faults of tables not to be opened."""
    tables, faults = [], []
    for home, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        within = Path(home).relative_to(folder).as_posix()
        prefix = "" if within == "." else f"{within}/"
        good = []
        for name in (name for name in BESIDE if name in files):
            if fault := find_fault(folder, Path(home, name)):
                faults.append(Fault(printable(prefix + name), *fault))
            else:
                good.append((prefix, Path(home, name)))
        tables += good[:1]
    return tables, faults


def _read_within(prefix: str, table: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a table in the subfolder `prefix`, whose names of videos are relative to it."""
    for where, row in read_table(table):
        whole = {**row, "file": prefix + row["file"]} if isinstance(row, dict) and prefix else row
        yield printable(prefix) + where, whole


def _bounded(fault: Fault) -> Fault:
    """A fault as the quarantine may keep it: at most `LONGEST_QUOTE` characters of each value."""
    row = fault.row
    row = (
        {key: value[:LONGEST_QUOTE] for key, value in row.items()}
        if isinstance(row, dict)
        else row and row[:LONGEST_QUOTE]
    )
    return replace(fault, detail=fault.detail[:LONGEST_QUOTE], row=row)


class Names:
    """Finds videos by name, also if accents are composed differently or `\\` is used for `/`."""

    def __init__(self, videos: Sequence[str]) -> None:
        self.exact = frozenset(videos)
        self.alike: dict[str, list[str]] = defaultdict(list)
        for name in videos:
            self.alike[_key(name)].append(name)

    def find(self, name: str) -> str | Broken:
        """The name of the video that `name` stands for, or `Broken` if it is not exactly one."""
        if name in self.exact:
            return name
        parts = name.replace("\\", "/")
        if parts.startswith("/") or ".." in PurePosixPath(parts).parts or "\0" in name:
            return Broken(name, f"'{printable(name)}' is not a name inside the folder", "name_outside")
        found = self.alike.get(_key(name), [])
        if len(found) > 1:
            return Broken(name, f"'{printable(name)}' may be any of {len(found)} videos", "ambiguous_name")
        return found[0] if found else Broken(name, f"there is no video '{printable(name)}' in the folder", "no_file")


def _key(name: str) -> str:
    """A name in a normal form: accents composed, parts separated by `/`."""
    return unicodedata.normalize("NFC", PurePosixPath(name.replace("\\", "/")).as_posix())


def _broken(where: str, row: Broken, names: Names) -> Fault:
    """The fault of a row that can't be read: that of its video if only some characters are lost."""
    said = _named(row.row) if row.row else None
    name = names.find(said["file"]) if isinstance(said, dict) else None
    if isinstance(name, str):
        return Fault(printable(name), "damaged_text", f"its text is {row.why}", said)
    return Fault(where, row.reason, row.why, row.text)


def _text_fault(where: str, name: str, row: dict[str, str], names: Names, known: dict[str, Texts]) -> Fault | None:
    """Why the texts of a row can't be used for the video `name`, or None."""
    if name in known:
        return Fault(where, "duplicate_row", f"'{printable(name)}' has a text already", row)
    for kind in ("caption", "prompt"):
        if other := _swallowed(row[kind], names):
            why = f"its {kind} holds the row of '{printable(other)}': a quote before it is not closed"
            return Fault(printable(name), "open_quote", why, row)
        damage = control_damage(row[kind]) or text_damage(repair(row[kind]))
        if damage:
            return Fault(printable(name), "damaged_text", f"its {kind} {damage}", row)
    if not repair(row["caption"] or row["prompt"]):
        return Fault(printable(name), "no_text", "its text is empty", row)
    return None


def _swallowed(text: str, names: Names) -> str:
    """The video whose row of a CSV file was read as part of this text, or an empty string."""
    lines = text.splitlines()[1:] if "\n" in text else []
    starts = (line.partition(",")[0].strip('"') for line in lines if "," in line)
    return next((start for start in starts if start in names.exact), "")


# --- reading ---------------------------------------------------------------------------------------------------------


def read_sidecars(folder: Path, videos: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """A row for each video with a text file of its name beside it."""
    for name in videos:
        path = (folder / name).with_suffix(".txt")
        if os.path.lexists(path) and (fault := find_fault(folder, path)):
            yield printable(name), Fault(printable(name), fault[0], f"of its text: {fault[1]}")
        elif path.is_file():
            yield printable(name), _sidecar(name, path)


def _sidecar(name: str, path: Path) -> dict[str, str] | Broken:
    try:
        with path.open("rb") as stream:
            content = stream.read(LONGEST_LINE + 1)
    except OSError as error:
        return Broken("", f"its text file can't be read ({error.strerror})", "unreadable_file")
    if len(content) > LONGEST_LINE:
        return Broken(decode(content), f"its text file has more than {LONGEST_LINE >> 20} MiB", "over_long")
    return _text_row(name, content)


def _text_row(name: str, content: bytes) -> dict[str, str] | Broken:
    text = decode(content)
    if "\ufffd" in text and (encoding := guess_encoding(content)):
        return Broken(text, f"its text is not UTF-8, but perhaps {encoding}: convert it with iconv", "damaged_text")
    return {"file": name, "caption": text, "prompt": ""}


def guess_encoding(content: bytes) -> str:
    """The probable encoding of a text that isn't UTF-8, or an empty string; a guess is no reason to train on it."""
    from charset_normalizer import from_bytes

    found = from_bytes(content[:LONGEST_LINE]).best()
    return found.encoding if found and not found.encoding.startswith(("utf", "ascii")) else ""


def read_members(videos: Videos) -> Iterator[tuple[str, Any]]:
    """A row for each video in a tar that has texts in it: of its JSON, or else its text file."""
    for name in videos.names:
        row = _member_row(videos, name) if name in videos.members else None
        if row is not None:
            yield printable(name), row


def _member_row(videos: Videos, name: str) -> dict[str, str] | Broken | None:
    parts = {kind: videos.members.get(videos.beside(name, kind)) for kind in (".json", ".txt")}
    bounded = {kind: part._replace(size=min(part.size, LONGEST_LINE + 1)) for kind, part in parts.items() if part}
    try:
        content = {kind: read_member(part) for kind, part in bounded.items()}
    except OSError as error:
        return Broken("", f"its text can't be read ({error.strerror})", "unreadable_file")
    if ".json" in content:
        about = parse(content[".json"])
        row = about if isinstance(about, Broken) else _named({**about, "file_name": name})
        if isinstance(row, Broken) or row["caption"] or row["prompt"]:
            return row
    if len(content.get(".txt", b"")) > LONGEST_LINE:
        return Broken("", f"its text has more than {LONGEST_LINE >> 20} MiB", "over_long")
    return _text_row(name, content[".txt"]) if ".txt" in content else None


def read_table(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row of a CSV, JSONL or Parquet file: ``file:line``, and a dict of `file`, `caption`, `prompt`, or `Broken`.

    Raises `MissingInputError` if there is no such file, `ConfigError` for another format, `BadInputError` if its
    columns aren't those of texts, and `CorruptDataError` if it can't be read to its end.
    """
    if not path.is_file():
        raise MissingInputError(f"There is no file with captions at {path}; check the path.")
    form, _ = file_format(path.name)
    if not form:
        raise ConfigError(
            f"{path.name} is neither CSV nor JSONL nor Parquet; give a file that ends in .csv, .jsonl or .parquet."
        )
    openers = {"csv": _open_csv, "jsonl": open_jsonl, "parquet": _open_parquet}
    for line, row in openers[form](path):
        yield f"{printable(path.name)}:{line}", _named(parse(row))


def _open_csv(path: Path) -> Iterator[Record]:
    columns, rows = open_csv(path)
    _check_columns(path, columns)
    return rows


def _open_parquet(path: Path) -> Iterator[Record]:
    columns = column_names(path)
    _check_columns(path, columns)
    file = next(name for name in FILE if name in columns)  # others may hold the videos themselves
    return read_parquet(path, [name for name in columns if name in (file, *CAPTION, *PROMPT, STAGE)])


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    if not set(columns) & set(FILE) or not set(columns) & {*CAPTION, *PROMPT}:
        raise BadInputError(
            f"{path.name} has the columns {', '.join(columns) or '(none)'}; it needs one of {', '.join(FILE)} "
            f"and one of {', '.join((*CAPTION, *PROMPT))}."
        )
    twice = sorted(name for name in {*FILE, *CAPTION, *PROMPT} if columns.count(name) > 1)
    if twice:
        raise BadInputError(f"{path.name} has more than one column '{twice[0]}'; give each column its own name.")


def _named(row: Any) -> dict[str, str] | Broken:
    """A row with the keys `file`, `caption` and `prompt`, each from the first of its columns that isn't empty.

    It also has the key `stage` if the row asks for a training stage.
    """
    if isinstance(row, Broken):
        return row
    found = {}
    for name, columns in (("file", FILE), ("caption", CAPTION), ("prompt", PROMPT)):
        column = next((column for column in columns if row.get(column) not in (None, "")), columns[0])
        found[name] = row.get(column) or ""
        if not isinstance(found[name], str):
            return Broken(str(row), f"'{column}' is {type(found[name]).__name__}, not a string")
    if row.get(STAGE) not in (None, ""):
        found[STAGE] = str(row[STAGE])
        if found[STAGE] not in ("1", "2"):
            return Broken(str(row), f"its stage is '{found[STAGE]}', and there are 1 and 2")
    return found if found["file"] else Broken(str(row), f"it names no file ({', '.join(FILE)})")


def decode(content: bytes) -> str:
    """A text file's text, from UTF-8 or UTF-16; invalid bytes become U+FFFD, which `repair` keeps."""
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    return content.decode(encoding, errors="replace")
