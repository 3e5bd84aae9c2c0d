"""Parquet files as streams of records: damage affects only its own record or row group.

Before a row group is decoded, its size is bounded from the metadata. A value that is stored once in a dictionary can
occur in every row, so rows are decoded in batches that stay below `BATCH_BYTES`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.prompts.records import LONGEST_LINE, Broken, Record, readable
from univigu.errors import CorruptDataError, first_line

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

BATCH = 1024  # rows that are decoded together, at most
BATCH_BYTES = 1 << 28  # that the repeated values of a batch may take
LARGEST_COLUMN = 1 << 31  # bytes of a column in one row group, uncompressed
_DATA_PAGES = (0, 3)  # of Parquet's enum PageType; 2 is a dictionary page


def column_names(file: Path) -> list[str]:
    """The names of a file's columns; raises `CorruptDataError` if it can't be read."""
    from pyarrow import parquet

    with readable(file):
        return parquet.read_schema(file).names


def read_parquet(file: Path, columns: Sequence[str]) -> Iterator[Record]:
    """The rows, with only the named columns read; `Broken` for rows that can't be read.

    A row group that can't be read to its end gives one broken record, with the number of the first missing row. Raises
    `CorruptDataError` if that applies to all row groups, or to the file itself.
    """
    import pyarrow as pa
    from pyarrow import parquet

    with readable(file), parquet.ParquetFile(file, page_checksum_verification=True) as table:
        columns = [name for name in table.schema_arrow.names if name in columns]
        lost: list[Record] = []
        start = 0
        for group in range(table.num_row_groups):
            number, rows = start, table.metadata.row_group(group).num_rows
            try:
                size = _batch_size(file, table, group, columns)
                for batch in table.iter_batches(size, row_groups=[group], columns=columns):
                    for row in _rows(batch):
                        number += 1
                        yield number, row
            except (OSError, pa.ArrowException, CorruptDataError) as error:
                why = f"rows {number + 1:,} to {start + rows:,}: {first_line(error)}"
                lost.append((number + 1, Broken("", why, "unreadable_rows")))
            start += rows
        if lost and len(lost) == table.num_row_groups:
            raise CorruptDataError(f"{file} has no row group that can be read ({lost[0][1].why}); fetch it again.")
        yield from lost


# --- before a row group is decoded -----------------------------------------------------------------------------------


def _batch_size(file: Path, table: "parquet.ParquetFile", group: int, columns: Sequence[str]) -> int:
    """How many rows of a row group may be decoded together; raises `CorruptDataError` if a column is too large."""
    # With damaged metadata, reading rows raises, but reading metadata aborts the process (as of pyarrow 25).
    next(table.iter_batches(1, row_groups=[group], columns=columns), None)
    paths = [table.schema.column(number).path for number in range(len(table.schema))]
    facts = table.metadata.row_group(group)
    chunks = [facts.column(n) for n, path in enumerate(paths) if path in columns or path.split(".")[0] in columns]
    largest = max((chunk.total_uncompressed_size for chunk in chunks), default=0)
    if largest > LARGEST_COLUMN:
        raise CorruptDataError(
            f"a column of {largest:,} bytes, and {LARGEST_COLUMN:,} are read: use smaller row groups"
        )
    repeated = max((_repeatable(file, chunk) for chunk in chunks), default=0)
    return max(1, min(BATCH, BATCH_BYTES // max(repeated, 1)))


def _repeatable(file: Path, chunk: Any) -> int:
    """Bytes that the rows of a column may share: those of the dictionary, or all of it with shared prefixes."""
    if "DELTA_BYTE_ARRAY" in chunk.encodings:
        return chunk.total_uncompressed_size
    with file.open("rb") as stream:
        offsets = (chunk.dictionary_page_offset or 0, chunk.data_page_offset)
        stream.seek(min((offset for offset in offsets if offset > 0), default=0))
        header = stream.read(12)
    # Thrift's compact protocol: field 1 is the page's type, field 2 its uncompressed size, both 32-bit integers.
    kind, rest = _thrift_int(header)
    if kind in _DATA_PAGES:
        return 0
    size, _ = _thrift_int(rest)
    return size if size and size > 0 else chunk.total_uncompressed_size


def _thrift_int(content: bytes) -> tuple[int | None, bytes]:
    """The next field as a 32-bit integer, and the bytes after it; None if the field is not one."""
    if content[:1] != b"\x15":
        return None, content
    value = 0
    for index, byte in enumerate(content[1:]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return (value >> 1) ^ -(value & 1), content[index + 2 :]
    return None, b""


# --- values ----------------------------------------------------------------------------------------------------------


def _rows(batch: "pa.RecordBatch") -> list[dict[str, Any] | Broken]:
    faults: dict[int, str] = {}
    names = batch.schema.names
    columns = [_values(name, column, faults) for name, column in zip(names, batch.columns, strict=True)]
    rows: list[Any] = [dict(zip(names, cells, strict=False)) for cells in zip(*columns, strict=True)]
    for index, why in faults.items():
        rows[index] = Broken(str(rows[index]), why)
    return rows


def _values(name: str, column: "pa.Array", faults: dict[int, str]) -> list[Any]:
    """A column's values, with bytes as text. A value that can't be used is None, and its index is put into `faults`."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_string_view(column.type) or types.is_binary_view(column.type):
        column = column.cast(pa.large_binary())
    texts = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    if any(is_one(column.type) for is_one in texts):
        return _texts(name, column, faults)
    try:
        return column.to_pylist()
    except Exception:  # pyarrow raises various errors for a value without a Python type
        return [_value(name, value, index, faults) for index, value in enumerate(column)]


def _texts(name: str, column: "pa.Array", faults: dict[int, str]) -> list[str | None]:
    """The texts of a column, with U+FFFD for invalid UTF-8; too long texts are never made Python objects."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = pc.binary_length(column)
    if (pc.max(lengths).as_py() or 0) > LONGEST_LINE:
        long = pc.fill_null(pc.greater(lengths, LONGEST_LINE), False)
        for index in pc.indices_nonzero(long).to_pylist():
            faults[index] = f"'{name}' has {lengths[index].as_py():,} bytes, more than {LONGEST_LINE >> 20} MiB"
        column = pc.if_else(long, pa.scalar(None, column.type), column)
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary()).to_pylist()
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]


def _value(name: str, value: "pa.Scalar", index: int, faults: dict[int, str]) -> Any:
    try:
        return value.as_py()
    except Exception as error:  # such as a date out of Python's range, or invalid UTF-8 inside a list
        faults[index] = f"'{name}' holds a {value.type} that can't be read ({type(error).__name__})"
        return None
