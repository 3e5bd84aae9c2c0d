"""Raw prompts in files: JSONL, CSV or Parquet, plain or compressed, always read as a stream.

The columns of each file are found by its header (or its first lines of JSON), under the names listed here or those that
the profile's `sources` gives for the file. Probabilities of unsafe content are looked up in each row, whatever columns
other rows have. If the rows of a file have no source or licence, `sources` may give one for the whole file.

A file that can't be read counts as one broken row: it is quarantined by its name, and the other files are read.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from components.prompts.parquet_records import column_names, read_parquet
from components.prompts.records import Broken, Record, file_format, open_csv, open_jsonl, parse, printable
from univigu.errors import BadInputError, ConfigError, MissingInputError

BATCH = 1024  # rows per batch, at most
BATCH_BYTES = 1 << 24  # a batch ends once it has this many

# The first of these names that a file has is used. `text` is this project's own name; `prompt`, `uuid` and the six
# probabilities of unsafe content are VidProM's (https://huggingface.co/datasets/WenhaoWang/VidProM).
KNOWN_COLUMNS: Mapping[str, Sequence[str]] = {
    "text": ("text", "prompt"),
    "source": ("source",),
    "licence": ("licence", "license"),
    "id": ("uuid",),
}
UNSAFE_COLUMNS = ("toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit")


@dataclass(frozen=True)
class Layout:
    """The columns of a file, and what holds for all its rows."""

    # `text`, `source` ... -> the column's name. Several names if the start of a file has none of them: then the first
    # that a row has is used.
    columns: Mapping[str, Sequence[str]] = field(default_factory=lambda: KNOWN_COLUMNS)
    unsafe: tuple[str, ...] | None = None  # probabilities of unsafe content; None: the known columns that a row has
    whole_source: str = ""  # of rows without one
    whole_licence: str = ""

    def column(self, row: Mapping[str, Any], what: str) -> str:
        """The name of the column that holds `what` in a row."""
        names = self.columns[what]
        return next((name for name in names if row.get(name) is not None), names[0])

    def unsafe_columns(self, row: Mapping[str, Any]) -> Sequence[str]:
        """The columns of a row with probabilities of unsafe content."""
        return [name for name in row if _is_unsafe(name)] if self.unsafe is None else self.unsafe


@lru_cache(maxsize=4096)
def _is_unsafe(name: str) -> bool:
    return name.strip().casefold().replace(" ", "_").replace("-", "_") in UNSAFE_COLUMNS


@dataclass(frozen=True)
class RawBatch:
    """Rows of one file. A row is a line of JSON that isn't parsed yet (bytes), a dict, or `Broken`."""

    file: str  # its name, as valid Unicode
    layout: Layout
    rows: Sequence[Record]  # numbered from 1 by line (in Parquet: by row); 0: the file itself

    def row_id(self, index: int) -> str:
        """An id that says where a row is in the raw files: ``file:line``."""
        number = self.rows[index][0]
        return f"{self.file}:{number}" if number else self.file


def read_batches(path: Path, sources: Mapping[str, Any]) -> Iterator[RawBatch]:
    """All rows of a file, or of a folder's files in the order of their names, in batches; blank lines are skipped.

    sources: the profile's `curate_prompts.sources`: a pattern of file names -> `source`, `licence`, `columns` of those
    files; the first pattern that matches counts. A file that can't be read to its end, or that has no column of
    prompts, gives a batch of one broken row; if all files do, the first one's error is raised. Raises `ConfigError` if
    `sources` doesn't fit the files, and as `raw_files` does.
    """
    files = _named_files(path)
    _check_sources(sources, files, path)
    unreadable: list[BadInputError] = []
    for file in files:
        pattern = next((pattern for pattern in sources if fnmatchcase(file.name, pattern)), "")
        try:
            yield from _file_batches(file, path, sources.get(pattern, {}))
        except BadInputError as error:
            if isinstance(error, ConfigError) and sum(fnmatchcase(other.name, pattern) for other in files) == 1:
                raise  # the profile has wrong columns for this file
            unreadable.append(error)
            why = printable(str(error).replace(str(file), file.name))
            yield RawBatch(printable(file.name), Layout(), [(0, Broken("", why, "unreadable_file"))])
    if len(unreadable) == 1 == len(files):
        raise unreadable[0]
    if len(unreadable) == len(files):
        raise type(unreadable[0])(f"None of the {len(files)} files in {path} can be used; the first: {unreadable[0]}")


def raw_files(path: Path) -> list[Path]:
    """A file, or a folder's files with a known format by their names; raises `MissingInputError` if there are none."""
    return [file for file in _named_files(path) if not _misplaced(file, path)]


def _named_files(path: Path) -> list[Path]:
    """The files whose names have a known format, without hidden ones."""
    if not path.is_dir():
        if not file_format(path.name)[0]:
            raise BadInputError(f"{path} is neither JSONL, CSV nor Parquet by its name; rename or convert it.")
        return [path]
    files = sorted(file for file in path.iterdir() if file_format(file.name)[0] and not file.name.startswith("."))
    if not files:
        raise MissingInputError(
            f"There is no JSONL, CSV or Parquet file in {path}; put prompts there, such as JSON objects, one per line."
        )
    return files


def _misplaced(file: Path, path: Path) -> str:
    """Why a file of prompts must not be opened, or an empty string."""
    if not file.resolve().is_relative_to(path.resolve()):
        return "it is a link out of the folder of prompts; put the file itself there"
    return "" if file.is_file() else "it is no file; put the files of prompts themselves into the folder"


# --- layout ----------------------------------------------------------------------------------------------------------


def _check_sources(sources: Mapping[str, Any], files: Sequence[Path], path: Path) -> None:
    for pattern in sources:
        if not any(fnmatchcase(file.name, pattern) for file in files):
            raise ConfigError(
                f"'{pattern}' in the profile's 'sources' matches no file in {path}; correct or remove it."
            )


def _layout(names: Iterable[str], about: Mapping[str, Any]) -> Layout:
    """The layout of a file that has columns of these names."""
    given, names = about.get("columns", {}), set(names)
    columns = {}
    for what, known in KNOWN_COLUMNS.items():
        found = next((name for name in known if name in names), None)
        columns[what] = (given[what],) if what in given else (found,) if found else known
    unsafe = given.get("unsafe")
    return Layout(
        columns=columns,
        unsafe=unsafe if unsafe is None else tuple([unsafe] if isinstance(unsafe, str) else unsafe),
        whole_source=about.get("source", ""),
        whole_licence=about.get("licence", ""),
    )


def _header_layout(file: Path, names: Sequence[str], about: Mapping[str, Any]) -> Layout:
    """The layout of a file with a header; raises if it lacks the column of prompts, or one that the profile names."""
    layout, given = _layout(names, about), about.get("columns", {})
    wanted = [column for what, (column, *_) in layout.columns.items() if what in given or what == "text"]
    missing = [name for name in (*wanted, *(layout.unsafe or ())) if name not in names]
    if missing:
        raise (ConfigError if given else BadInputError)(
            f"{file} has no column '{missing[0]}' (it has {', '.join(names) or 'none'}); say in the profile's "
            "'curate_prompts.sources' which column holds what."
        )
    twice = sorted(name for name in _used(names, layout) if names.count(name) > 1)
    if twice:
        raise BadInputError(f"{file} has more than one column '{twice[0]}'; give each a name of its own.")
    return layout


def _used(names: Iterable[str], layout: Layout) -> list[str]:
    """The columns among `names` that are read."""
    known = {name for columns in layout.columns.values() for name in columns} | {*(layout.unsafe or ())}
    return [name for name in names if name in known or (layout.unsafe is None and _is_unsafe(name))]


# --- rows ------------------------------------------------------------------------------------------------------------


def _file_batches(file: Path, path: Path, about: Mapping[str, Any]) -> Iterator[RawBatch]:
    """The rows of one file; raises `BadInputError` if it can't be read to its end or has no column of prompts."""
    if why := _misplaced(file, path):
        raise BadInputError(f"{file} is not read: {why}.")
    form, _ = file_format(file.name)
    if form == "jsonl":
        batches = _batched(open_jsonl(file))
        head = next(batches, [])
        rows = (row for _, raw in head if isinstance(row := parse(raw), dict))
        layout, batches = _layout(chain.from_iterable(rows), about), chain([head] if head else [], batches)
    elif form == "csv":
        names, records = open_csv(file)
        layout, batches = _header_layout(file, names, about), _batched(records)
    else:
        names = column_names(file)
        layout = _header_layout(file, names, about)
        batches = _batched(read_parquet(file, _used(names, layout)))
    for batch in batches:
        yield RawBatch(printable(file.name), layout, batch)


def _batched(rows: Iterator[Record]) -> Iterator[list[Record]]:
    """Rows in lists of up to `BATCH` and about `BATCH_BYTES`; rows before an error are yielded before it is raised."""
    batch, size = [], 0
    try:
        for number, raw in rows:
            batch.append((number, raw))
            for cell in raw.values() if isinstance(raw, dict) else (raw,) if isinstance(raw, bytes) else raw:
                size += len(cell) if isinstance(cell, str | bytes) else 0
            if len(batch) >= BATCH or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    except BadInputError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch
