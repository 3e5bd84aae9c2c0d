"""Raw prompts as they lie in files: JSONL, CSV or Parquet, plain or compressed, always read as a stream.

Which column holds what is decided for each file, by its header (or by its first lines of JSON): by the names that are
known here, or by what the profile's `sources` says of files of that name. How unsafe it is, each row says for itself,
whatever columns others have. What the rows of a file don't say of themselves, `sources` may say for all of them: where
they come from, and under which licence.

A file that can't be read is one row that can't be used: it is quarantined by its name, and the others are read.
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

BATCH = 1024  # rows that travel together
BATCH_BYTES = 1 << 24  # after so many, a batch travels with fewer

# The first of these that a file has is its column. `text` is this project's own name for it, `prompt` VidProM's, and so
# are `uuid` and the six probabilities of unsafe content (https://huggingface.co/datasets/WenhaoWang/VidProM).
KNOWN_COLUMNS: Mapping[str, Sequence[str]] = {
    "text": ("text", "prompt"),
    "source": ("source",),
    "licence": ("licence", "license"),
    "id": ("uuid",),
}
UNSAFE_COLUMNS = ("toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit")


@dataclass(frozen=True)
class Layout:
    """Which of a file's columns holds what, and what the whole file says."""

    # What -> the column's name; several where a file's beginning has none of them: of those, the first that a row has.
    columns: Mapping[str, Sequence[str]] = field(default_factory=lambda: KNOWN_COLUMNS)
    unsafe: tuple[str, ...] | None = None  # probabilities of unsafe content; None: known ones, where a row has them
    whole_source: str = ""  # of the rows that name none
    whole_licence: str = ""

    def column(self, row: Mapping[str, Any], what: str) -> str:
        """The name of the column that holds `what` in a row."""
        names = self.columns[what]
        return next((name for name in names if row.get(name) is not None), names[0])

    def unsafe_columns(self, row: Mapping[str, Any]) -> Sequence[str]:
        """The columns of a row that say how unsafe it is."""
        return [name for name in row if _is_unsafe(name)] if self.unsafe is None else self.unsafe


@lru_cache(maxsize=4096)
def _is_unsafe(name: str) -> bool:
    return name.strip().casefold().replace(" ", "_").replace("-", "_") in UNSAFE_COLUMNS


@dataclass(frozen=True)
class RawBatch:
    """Rows of one file. A row is a line that should be JSON (bytes), an object, or `Broken`."""

    file: str  # its name as text that any table can hold
    layout: Layout
    rows: Sequence[Record]  # numbered from 1 by line (in Parquet: by row); 0: the file itself

    def row_id(self, place: int) -> str:
        """A row's place in the raw files."""
        number = self.rows[place][0]
        return f"{self.file}:{number}" if number else self.file


def read_batches(path: Path, sources: Mapping[str, Any]) -> Iterator[RawBatch]:
    """All rows of a file, or of a folder's files by name, in batches of up to `BATCH`; blank lines are no rows.

    sources: a file name's pattern -> `source`, `licence`, `columns` (what -> name) of those files; the first that fits.
    A file that can't be read (to its end), and one that has no column of prompts, is a batch of one broken row; raises
    its error where all are so. Raises `ConfigError` where `sources` makes no sense, and as `raw_files` does.
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
                raise  # what the profile says of this file is wrong
            unreadable.append(error)
            why = printable(str(error).replace(str(file), file.name))
            yield RawBatch(printable(file.name), Layout(), [(0, Broken("", why, "unreadable_file"))])
    if len(unreadable) == 1 == len(files):
        raise unreadable[0]
    if len(unreadable) == len(files):
        raise type(unreadable[0])(f"None of the {len(files)} files in {path} can be used; the first: {unreadable[0]}")


def raw_files(path: Path) -> list[Path]:
    """A file, or a folder's files of a known format by name; raises `MissingInputError` without any."""
    return [file for file in _named_files(path) if not _misplaced(file, path)]


def _named_files(path: Path) -> list[Path]:
    """What is called like a file of prompts, hidden ones left out."""
    if not path.is_dir():
        if not file_format(path.name)[0]:
            raise BadInputError(f"{path} is neither JSONL, CSV nor Parquet by its name; rename or convert it.")
        return [path]
    files = sorted(file for file in path.iterdir() if file_format(file.name)[0] and not file.name.startswith("."))
    if not files:
        raise MissingInputError(
            f"There is no *.jsonl file in {path}, nor CSV or Parquet; put prompts there, one JSON object a line."
        )
    return files


def _misplaced(file: Path, path: Path) -> str:
    """Why what is called like a file of prompts is not opened at all, or an empty string."""
    if not file.resolve().is_relative_to(path.resolve()):
        return "it is a link out of the folder of prompts; put the file itself there"
    return "" if file.is_file() else "it is no file; put the files of prompts themselves into the folder"


# --- layout ----------------------------------------------------------------------------------------------------------


def _check_sources(sources: Mapping[str, Any], files: Sequence[Path], path: Path) -> None:
    for pattern in sources:
        if not any(fnmatchcase(file.name, pattern) for file in files):
            raise ConfigError(f"The profile's 'sources' name '{pattern}', and no file in {path} is called that.")


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
    """The layout of a file with a header; raises where it has no column of prompts, or not those of the profile."""
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
    """The columns, of those that there are, that are looked at."""
    known = {name for columns in layout.columns.values() for name in columns} | {*(layout.unsafe or ())}
    return [name for name in names if name in known or (layout.unsafe is None and _is_unsafe(name))]


# --- rows ------------------------------------------------------------------------------------------------------------


def _file_batches(file: Path, path: Path, about: Mapping[str, Any]) -> Iterator[RawBatch]:
    """The rows of one file; raises `BadInputError` where it can't be read to its end or has no column of prompts."""
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
    """Rows in lists of `BATCH`, or fewer where they are long; what was read before an error comes before it."""
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
