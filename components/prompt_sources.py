"""Raw prompts as they lie in files: JSONL, CSV or Parquet, plain or compressed, always read as a stream.

Which column of a file holds what is decided once a file, by its header (or by its first JSON object): by the names that
are known here, or by what the profile's `sources` says of files of that name. What the rows of a file don't say of
themselves, `sources` may say for all of them: where they come from, and under which licence.
"""

import codecs
import csv
import io
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from univigu.errors import BadInputError, ConfigError, CorruptDataError, MissingInputError

BATCH = 1024  # rows that travel together
LONGEST_LINE = 1 << 20  # bytes; a longer line is one broken row, and is never held whole
FORMATS = (".jsonl", ".csv", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

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

    text: str = "text"
    source: str = "source"
    licence: str = "licence"
    id: str = "uuid"
    unsafe: tuple[str, ...] = ()  # probabilities of unsafe content
    whole_source: str = ""  # of the rows that name none
    whole_licence: str = ""


@dataclass(frozen=True)
class RawBatch:
    """Rows of one file. A row is a line that should be JSON (bytes), an object, or the text of one that is broken."""

    file: str
    layout: Layout
    rows: Sequence[tuple[int, Any]]  # the number of the line (in Parquet: of the row), from 1, and the row


def read_batches(path: Path, sources: Mapping[str, Any]) -> Iterator[RawBatch]:
    """All rows of a file, or of a folder's files by name, in batches of up to `BATCH`; blank lines are no rows.

    sources: a file name's pattern -> `source`, `licence`, `columns` (what -> name) of those files; the first that fits.
    Raises as `raw_files` does; `BadInputError` where a CSV or Parquet file has no column of prompts; `CorruptDataError`
    where a file ends in the middle or can't be decompressed; `ConfigError` where `sources` makes no sense.
    """
    files = raw_files(path)
    _check_sources(sources, files, path)
    for file in files:
        about = next((about for pattern, about in sources.items() if fnmatchcase(file.name, pattern)), {})
        try:
            names, rows = _open_rows(file)
            layout = _layout(file, names, about)
            if file.suffix == ".parquet":
                rows = _parquet_rows(file, layout)
            while batch := list(islice(rows, BATCH)):
                yield RawBatch(file.name, layout, batch)
        except (OSError, pa.ArrowException) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CorruptDataError(f"{file} can't be read to its end ({said}); fetch it again.") from error


def raw_files(path: Path) -> list[Path]:
    """A file, or a folder's files of a known format by name; raises `MissingInputError` without any."""
    wanted = [f"*{ending}{compression}" for ending in FORMATS[:2] for compression in ("", *COMPRESSIONS)]
    wanted.append("*.parquet")
    if not path.is_dir():
        if not any(fnmatchcase(path.name, pattern) for pattern in wanted):
            raise BadInputError(f"{path} is neither JSONL, CSV nor Parquet by its name; rename or convert it.")
        return [path]
    files = sorted({file for pattern in wanted for file in path.glob(pattern) if file.is_file()})
    if not files:
        raise MissingInputError(
            f"There is no *.jsonl file in {path}, nor CSV or Parquet; put prompts there, one JSON object a line."
        )
    return files


def parse(raw: Any) -> Any:
    """A row as it was meant: the object that a line holds; any other value where it holds none, text if it's broken."""
    if not isinstance(raw, bytes):
        return raw
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return raw.decode("utf-8", errors="replace").strip()


# --- layout ----------------------------------------------------------------------------------------------------------


def _check_sources(sources: Mapping[str, Any], files: Sequence[Path], path: Path) -> None:
    for pattern, about in sources.items():
        if not isinstance(about, Mapping) or not set(about) <= {"source", "licence", "columns"}:
            raise ConfigError(f"The profile's 'sources' say of '{pattern}' more than source, licence and columns.")
        unknown = sorted(set(about.get("columns", {})) - {*KNOWN_COLUMNS, "unsafe"})
        if unknown:
            raise ConfigError(
                f"The profile's 'sources' map '{unknown[0]}' for '{pattern}'; a column can hold "
                f"{', '.join(KNOWN_COLUMNS)} or unsafe."
            )
        if not any(fnmatchcase(file.name, pattern) for file in files):
            raise ConfigError(f"The profile's 'sources' name '{pattern}', and no file in {path} is called that.")


def _layout(file: Path, names: Sequence[str], about: Mapping[str, Any]) -> Layout:
    given = about.get("columns", {})
    found = {what: next((n for n in known if n in names), known[0]) for what, known in KNOWN_COLUMNS.items()}
    found |= {what: name for what, name in given.items() if what != "unsafe"}
    missing = [name for what, name in found.items() if name not in names and (what == "text" or what in given)]
    if missing and not _is_jsonl(file):  # a JSON object need not have what another one has
        raise BadInputError(
            f"{file} has no column '{missing[0]}' (it has {', '.join(names)}); say in the profile's "
            "'curate_prompts.sources' which column holds what."
        )
    unsafe = given.get("unsafe", [name for name in UNSAFE_COLUMNS if name in names])
    return Layout(
        **found,
        unsafe=tuple([unsafe] if isinstance(unsafe, str) else unsafe),
        whole_source=about.get("source", ""),
        whole_licence=about.get("licence", ""),
    )


def _is_jsonl(file: Path) -> bool:
    return ".jsonl" in file.suffixes


# --- formats ---------------------------------------------------------------------------------------------------------


def _open_rows(file: Path) -> tuple[list[str], Iterator[tuple[int, Any]]]:
    """The names of a file's columns, and its rows; of a Parquet file the names alone."""
    if file.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_schema(file).names, iter(())
    lines = _bounded_lines(_open(file))
    if _is_jsonl(file):
        rows = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        head = list(islice(rows, BATCH))
        first = next((row for row in (parse(line) for _, line in head) if isinstance(row, dict)), {})
        return list(first), chain(head, rows)
    records = _csv_records(chain([next(lines, b"").removeprefix(codecs.BOM_UTF8)], lines))
    _, names = next(records, (0, []))
    if isinstance(names, str):
        raise BadInputError(f"The first line of {file} is no header of a CSV file; give its columns names.")
    return names, _csv_rows(names, records)


def _open(file: Path) -> BinaryIO:
    if file.suffix not in COMPRESSIONS:
        return file.open("rb")
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), COMPRESSIONS[file.suffix]), 1 << 20)


def _bounded_lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines, of which never more than `LONGEST_LINE` is held: what is over is dropped, so the row will not parse."""
    with stream:
        while line := stream.readline(LONGEST_LINE):
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = stream.readline(LONGEST_LINE)
            yield line


def _csv_rows(names: Sequence[str], records: Iterable[tuple[int, list[str] | str]]) -> Iterator[tuple[int, Any]]:
    for number, cells in records:
        if isinstance(cells, str) or len(cells) != len(names):
            yield number, _visible(cells if isinstance(cells, str) else ",".join(cells)).strip()
        elif _is_unicode(cells):
            yield number, dict(zip(names, cells, strict=True))
        else:
            yield number, _visible(",".join(cells))


def _csv_records(lines: Iterator[bytes]) -> Iterator[tuple[int, list[str] | str]]:
    """Each record as its first line's number and its cells, or as the text of a line that can't be read.

    A quote that never ends would swallow all that follows: then only the line that it's in is broken, and reading goes
    on with the next.
    """
    again: deque[str] = deque()
    taken: list[str] = []

    def feed() -> Iterator[str]:
        while again or (line := next(lines, None)) is not None:
            taken.append(again.popleft() if again else line.decode("utf-8", errors="surrogateescape"))
            yield taken[-1]

    number = 1
    while True:
        taken.clear()
        try:
            cells = next(csv.reader(feed(), strict=True), None)
        except csv.Error:
            again.extendleft(reversed(taken[1:]))
            yield number, taken[0]
            number += 1
            continue
        if cells is None:
            return
        if cells:
            yield number, cells
        number += len(taken)


def _is_unicode(cells: Sequence[str]) -> bool:
    text = "".join(cells)
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _visible(text: str) -> str:
    """Text with U+FFFD for bytes that were no UTF-8."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def _parquet_rows(file: Path, layout: Layout) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows' columns that the layout names: embeddings and the like stay on disk."""
    from pyarrow import parquet

    wanted = {layout.text, layout.source, layout.licence, layout.id, *layout.unsafe}
    with parquet.ParquetFile(file) as table:
        columns = [name for name in table.schema_arrow.names if name in wanted]
        rows = (row for part in table.iter_batches(BATCH, columns=columns) for row in part.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield number, {name: _text(value) for name, value in row.items()}


def _text(value: Any) -> Any:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
