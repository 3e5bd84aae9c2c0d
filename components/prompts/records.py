"""JSONL and CSV files, plain or compressed, as streams of records: damage affects only its own record.

All sizes are bounded: a line has at most `LONGEST_LINE` bytes, a CSV record at most `RECORD_LINES` lines, a JSON value
at most `DEEPEST` levels, and a compressed file expands to at most `EXPANSION` times its size. Text is UTF-8 with or
without a byte-order mark, or UTF-16 with one.
"""

import codecs
import csv
import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from univigu.errors import BadInputError, CorruptDataError, first_line

LONGEST_LINE = 1 << 20  # bytes; a longer line is one broken record
RECORD_LINES = 256  # of a CSV record; a quote that is still open after these is treated as unclosed
DEEPEST = 32  # levels of nested lists and objects
EXPANSION = 250  # times a compressed file's size; text shrinks to a tenth, equal lines to a hundredth
LONGEST_QUOTE = 4096  # characters per value that the quarantine keeps
SMALL = 1 << 28  # bytes that any compressed file may expand to
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

Record = tuple[int, Any]  # the number of the record's first line, from 1, and the record


class Broken(NamedTuple):
    """A record that can't be used."""

    text: str  # as much of it as could be read
    why: str
    reason: str = "broken_row"  # a slug to count by
    row: dict[str, Any] | None = None  # its probable content, if only some bytes are lost


def file_format(name: str) -> tuple[str, str]:
    """A file's format and compression by its name, ignoring case; empty strings for an unknown format."""
    path = Path(name.casefold())
    compression = COMPRESSIONS.get(path.suffix, "")
    form = FORMATS.get(Path(path.stem).suffix if compression else path.suffix, "")
    return (form, compression) if form and not (form == "parquet" and compression) else ("", "")


def open_csv(file: Path) -> tuple[list[str], Iterator[Record]]:
    """The names of a CSV file's columns, and its records: an object with a cell for each column, or `Broken`.

    Raises `BadInputError` if the first line is not a header. Raises `CorruptDataError` if the file can't be read to its
    end; the iterator may raise it later.
    """
    lines = _lines(file)
    records = _csv_records(chain([next(lines, b"").removeprefix(codecs.BOM_UTF8)], lines))
    _, names = next(records, (1, []))
    if isinstance(names, Broken):
        raise BadInputError(f"The first line of {file} is no header of a CSV file; give its columns names.")
    names = [_visible(name) for name in names]
    return names, _csv_rows(names, records)


def open_jsonl(file: Path) -> Iterator[Record]:
    """The non-blank lines of a JSONL file, as bytes for `parse`; raises as `open_csv` does."""
    return ((number, line) for number, line in enumerate(_lines(file), start=1) if line.strip())


def parse(raw: Any) -> Any:
    """The object in a line of JSON, or `Broken`; a record that is already parsed is returned unchanged."""
    if not isinstance(raw, bytes):
        return raw
    text = raw.decode("utf-8-sig", errors="replace").strip()
    if _is_cut(raw):
        return Broken(text, _LONG)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return Broken(text, "not JSON")
    if not isinstance(value, dict):
        return Broken(text, "not a JSON object")
    if raw.count(b"[") + raw.count(b"{") > DEEPEST and _is_deep(value):
        return Broken(text, f"nested deeper than {DEEPEST} levels")
    return Broken(text, _NO_UTF8, row=value) if "\ufffd" in text and not _is_utf8(raw) else value


_LONG = f"longer than {LONGEST_LINE >> 20} MiB, or a cell of it than {csv.field_size_limit() >> 10} KiB"
_NO_UTF8 = "not UTF-8"
_QUOTE = "a quote in it is not closed, or is out of place"


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [one for values in inner for one in values]
    return any(isinstance(one, dict | list) for one in level)


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Raise `CorruptDataError` if a file can't be read to its end."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException, UnicodeError) as error:
        raise CorruptDataError(f"{file} can't be read to its end ({first_line(error)}); fetch it again.") from error


# --- lines -----------------------------------------------------------------------------------------------------------


def _lines(file: Path) -> Iterator[bytes]:
    """Lines in UTF-8, each cut to `LONGEST_LINE` bytes (see `_is_cut`)."""
    _, compression = file_format(file.name)
    total = 0
    with readable(file), _open(file, compression) as stream:
        limit = max(SMALL, EXPANSION * file.stat().st_size) if compression else float("inf")
        read = _line_reader(stream)
        while line := read(LONGEST_LINE):
            rest = line
            while rest:
                total += len(rest)
                if total > limit:
                    raise CorruptDataError(
                        f"{file} expands to more than {EXPANSION} times its size; if you trust it, unpack it yourself."
                    )
                rest = b"" if rest.endswith(b"\n") else read(LONGEST_LINE)
            yield line


def _is_cut(line: bytes) -> bool:
    return len(line) >= LONGEST_LINE and not line.endswith(b"\n")


def _open(file: Path, compression: str) -> io.BufferedReader:
    if not compression:
        return file.open("rb")
    import pyarrow as pa

    # If a file is truncated, the content of the buffer is lost.
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), compression), 1 << 16)


def _line_reader(stream: io.BufferedReader) -> Callable[[int], bytes]:
    """`stream.readline` that always gives UTF-8, and also accepts the line ends of old Macs (CR)."""
    start = stream.peek(1)
    wide = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding, errors = ("utf-16", "replace") if wide else ("utf-8", "surrogateescape")
    head = start.decode(encoding, errors="ignore")
    old_mac = "\r" in head and "\n" not in head
    if not wide and not old_mac:
        return stream.readline
    text = io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline=None if old_mac else "\n")
    return lambda size: text.readline(size).encode(errors="surrogateescape")


# --- CSV -------------------------------------------------------------------------------------------------------------

# A well-formed record: a quote opens and closes a cell, and is doubled inside it.
_CELL = r'(?:"[^"]*(?:""[^"]*)*"|[^",\r\n]*)'
_WHOLE = re.compile(rf"{_CELL}(?:,{_CELL})*\r?\n?")


def _csv_rows(names: Sequence[str], records: Iterable[tuple[int, list[str] | Broken]]) -> Iterator[Record]:
    for number, cells in records:
        if isinstance(cells, Broken):
            yield number, cells
        elif len(cells) != len(names):
            yield number, Broken(_visible(",".join(cells)).strip(), f"{len(cells)} cells for {len(names)} columns")
        elif is_unicode("".join(cells)):
            yield number, dict(zip(names, cells, strict=True))
        else:
            row = dict(zip(names, map(_visible, cells), strict=True))
            yield number, Broken(",".join(row.values()), _NO_UTF8, row=row)


def _csv_records(lines: Iterator[bytes]) -> Iterator[tuple[int, list[str] | Broken]]:
    """Each record as its first line's number and its cells, or `Broken` for a line that can't be read.

    An unclosed quote would swallow the following records: in that case only its own line is broken, and reading resumes
    with the next line. The signs of one are a record of several lines without an end, with a misplaced quote, or with
    the wrong number of cells while one of its lines has the right number.
    """
    unread: deque[str] = deque()
    number, width = 1, 0
    while True:
        cells, taken = _csv_record(lines, unread)
        if isinstance(cells, list) and len(taken) > 1 and _swallows(taken, len(cells) == width, width):
            cells = Broken(_visible(taken[0]).strip(), _QUOTE)
        if isinstance(cells, Broken):
            unread.extendleft(reversed(taken[1:]))
            del taken[1:]
        if cells:
            width = width or len(cells)
            yield number, cells
        elif not taken:
            return
        number += len(taken)


def _csv_record(lines: Iterator[bytes], unread: deque[str]) -> tuple[list[str] | Broken, list[str]]:
    """The next record's cells (empty: a blank line, or the end) or `Broken`, and the lines it was read from.

    unread: lines to read before `lines`.
    """
    taken: list[str] = []

    def feed() -> Iterator[str]:
        size = 0
        while unread or (line := next(lines, None)) is not None:
            # pyrefly: ignore[missing-attribute]
            taken.append(unread.popleft() if unread else line.decode("utf-8", errors="surrogateescape"))
            size += len(taken[-1])
            if size >= LONGEST_LINE or len(taken) > RECORD_LINES:
                raise csv.Error("no end in sight")
            yield taken[-1]

    try:
        return next(csv.reader(feed(), strict=True), []), taken
    except csv.Error as error:
        long = len(taken[0]) >= LONGEST_LINE or (len(taken) == 1 and "limit" in str(error))
        return Broken(_visible(taken[0]).strip(), _LONG if long else _QUOTE), taken


def _swallows(lines: Sequence[str], fits: bool, width: int) -> bool:
    """Whether a record of several lines contains other records; fits: it has the right number of cells."""
    if not _WHOLE.fullmatch("".join(lines)):
        return True
    whole = (line for line in lines[1:] if _WHOLE.fullmatch(line))
    return not fits and any(len(next(csv.reader([line]), ())) == width for line in whole)


def is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates, which stand for invalid UTF-8 or for no character at all."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def printable(name: str) -> str:
    """A file's name as valid Unicode, for tables."""
    return name.encode(errors="replace").decode()


def _visible(text: str) -> str:
    """A text with U+FFFD for bytes that were not UTF-8."""
    return text.encode(errors="surrogateescape").decode(errors="replace")
