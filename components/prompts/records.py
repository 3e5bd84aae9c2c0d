"""JSONL and CSV files, plain or compressed, as streams of records: what is damaged costs its own record alone.

Nothing that could be without end is held whole: a line has at most `LONGEST_LINE` bytes, a CSV record at most
`RECORD_LINES` lines, a JSON value at most `DEEPEST` levels, and what is compressed expands to at most `EXPANSION` times
its size. Text is UTF-8 with or without a byte-order mark, or UTF-16 with one.
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
RECORD_LINES = 256  # of a CSV record: a quote that never ends is given up after so many
DEEPEST = 32  # levels of lists and objects in each other
EXPANSION = 250  # times a compressed file's size; text shrinks to a tenth, equal lines to a hundredth
LONGEST_QUOTE = 4096  # characters of one value that a quarantine keeps
SMALL = 1 << 28  # bytes that any compressed file may expand to
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

Record = tuple[int, Any]  # the number of its first line, from 1, and the record


class Broken(NamedTuple):
    """A record that can't be used as it is."""

    text: str  # as far as it could be read
    why: str
    reason: str = "broken_row"  # a slug to count by
    row: dict[str, Any] | None = None  # what it seems to say, where bytes of it are lost


def file_format(name: str) -> tuple[str, str]:
    """A file's format and compression by its name, upper case or lower; empty where it has none that is known."""
    path = Path(name.casefold())
    compression = COMPRESSIONS.get(path.suffix, "")
    form = FORMATS.get(Path(path.stem).suffix if compression else path.suffix, "")
    return (form, compression) if form and not (form == "parquet" and compression) else ("", "")


def open_csv(file: Path) -> tuple[list[str], Iterator[Record]]:
    """The names of a CSV file's columns, and its records: an object with a cell for each column, or `Broken`.

    Raises `BadInputError` where the first line is no header, and `CorruptDataError` where the file can't be read to its
    end, which may be later.
    """
    lines = _lines(file)
    records = _csv_records(chain([next(lines, b"").removeprefix(codecs.BOM_UTF8)], lines))
    _, names = next(records, (1, []))
    if isinstance(names, Broken):
        raise BadInputError(f"The first line of {file} is no header of a CSV file; give its columns names.")
    names = [_visible(name) for name in names]
    return names, _csv_rows(names, records)


def open_jsonl(file: Path) -> Iterator[Record]:
    """The lines of a JSONL file that aren't blank, as bytes for `parse`; raises as `open_csv` does."""
    return ((number, line) for number, line in enumerate(_lines(file), start=1) if line.strip())


def parse(raw: Any) -> Any:
    """A record as it was meant: the object in a line of JSON, or `Broken`; what is no line comes back as it is."""
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
    """Raise `CorruptDataError` for whatever keeps a file from being read to its end."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException, UnicodeError) as error:
        raise CorruptDataError(f"{file} can't be read to its end ({first_line(error)}); fetch it again.") from error


# --- lines -----------------------------------------------------------------------------------------------------------


def _lines(file: Path) -> Iterator[bytes]:
    """Lines in UTF-8, of which never more than `LONGEST_LINE` is held: what is over is dropped (see `_is_cut`)."""
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

    # Where a file ends in the middle, what is in the buffer is lost.
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), compression), 1 << 16)


def _line_reader(stream: io.BufferedReader) -> Callable[[int], bytes]:
    """`stream.readline`, in UTF-8 whatever the stream is in, and with the line ends of an old Mac, too."""
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

# A record as it should be written: a quote opens a cell and closes it, and is nowhere else but doubled inside.
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
    """Each record as its first line's number and its cells, or as a line that can't be read.

    A quote that isn't closed would swallow what follows: then only the line that it's in is broken, and reading goes on
    with the next. It shows where a record of several lines has no end, or a quote out of place, or not a cell for each
    column while one of its lines has.
    """
    again: deque[str] = deque()
    number, width = 1, 0
    while True:
        cells, taken = _csv_record(lines, again)
        if isinstance(cells, list) and len(taken) > 1 and _swallows(taken, len(cells) == width, width):
            cells = Broken(_visible(taken[0]).strip(), _QUOTE)
        if isinstance(cells, Broken):
            again.extendleft(reversed(taken[1:]))
            del taken[1:]
        if cells:
            width = width or len(cells)
            yield number, cells
        elif not taken:
            return
        number += len(taken)


def _csv_record(lines: Iterator[bytes], again: deque[str]) -> tuple[list[str] | Broken, list[str]]:
    """The next record's cells (none: a blank line, or the end) or what it's broken by, and the lines it was read from.

    again: lines that come before `lines`.
    """
    taken: list[str] = []

    def feed() -> Iterator[str]:
        size = 0
        while again or (line := next(lines, None)) is not None:
            # pyrefly: ignore[missing-attribute]
            taken.append(again.popleft() if again else line.decode("utf-8", errors="surrogateescape"))
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
    """Whether a record of several lines has others in it; fits: it has as many cells as it should have."""
    if not _WHOLE.fullmatch("".join(lines)):
        return True
    whole = (line for line in lines[1:] if _WHOLE.fullmatch(line))
    return not fits and any(len(next(csv.reader([line]), ())) == width for line in whole)


def is_unicode(text: str) -> bool:
    """Whether a text is without halves of surrogate pairs: they stand for bytes that were no UTF-8, or for nothing."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def printable(name: str) -> str:
    """A file's name as text that every table can hold."""
    return name.encode(errors="replace").decode()


def _visible(text: str) -> str:
    """Text with U+FFFD for bytes that were no UTF-8."""
    return text.encode(errors="surrogateescape").decode(errors="replace")
