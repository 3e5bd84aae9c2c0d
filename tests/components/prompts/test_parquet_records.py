"""Parquet files with odd values, pages or metadata: at most a row or a row group is lost, and it is reported."""

import decimal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.prompts import parquet_records
from components.prompts.parquet_records import column_names, read_parquet
from components.prompts.records import Broken
from univigu.errors import CorruptDataError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.parquet"


def read(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return [row for _, row in read_parquet(path, ["text", "source"])]


def not_utf8(content=b"\xff a red seven"):
    """An Arrow string that is not UTF-8."""
    ends = b"".join(end.to_bytes(4, "little") for end in (0, len(content)))
    return pa.StringArray.from_buffers(1, pa.py_buffer(ends), pa.py_buffer(content))


def as_is(kind, number):
    """A value of a 64-bit type, made from any integer."""
    return pa.array([number], pa.int64()).view(kind)


ODD = {
    "timestamp": as_is(pa.timestamp("us"), 1 << 62),
    "seconds": as_is(pa.timestamp("s"), 1 << 50),
    "zone": as_is(pa.timestamp("us", "No/Where"), 0),
    "date": pa.array([2**31 - 1], pa.int32()).view(pa.date32()),
    "time": as_is(pa.time64("us"), 1 << 62),
    "duration": as_is(pa.duration("s"), 1 << 60),
    "list": pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), not_utf8()),
    "struct": pa.StructArray.from_arrays([not_utf8()], ["inner"]),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("place", ["text", "source"])
def test_a_value_without_a_python_type_breaks_only_its_row(path, name, place):
    other = {"text": "source", "source": "text"}[place]
    columns = {place: pa.concat_arrays([ODD[name], ODD[name].slice(0, 0), pa.nulls(1, ODD[name].type)])}
    first, second = read(path, {**columns, other: ["a", "b"]})
    assert isinstance(first, Broken)
    assert f"'{place}' holds a" in first.why
    assert second == {place: None, other: "b"}


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (not_utf8(), "\ufffd a red seven"),
        (pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), not_utf8()), "\ufffd a red seven"),
        (pa.array([b"\xff a"]), "\ufffd a"),
        (pa.array([b"sixteen bytes ok"], pa.binary(16)), "sixteen bytes ok"),
        (pa.array(["a"], pa.large_string()), "a"),
        (pa.array(["a"], pa.string_view()), "a"),
        (pa.array([7]), 7),
        (pa.array([decimal.Decimal("1.50")]), decimal.Decimal("1.50")),
        (pa.array([["a", "b"]]), ["a", "b"]),
        (pa.array([True]), True),
        (pa.nulls(1), None),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_bytes_are_decoded_as_text_and_other_values_are_unchanged(path, values, found):
    assert read(path, {"text": values}) == [{"text": found}]


@pytest.mark.slow
def test_a_large_value_repeated_in_every_row_takes_bounded_memory(path):
    """A file of two kilobytes, whose rows would take three gigabytes."""
    once = pa.DictionaryArray.from_arrays(pa.array([0] * 150, pa.int32()), pa.array(["x" * 20_000_000]))
    pq.write_table(pa.table({"text": once}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    code = (
        "import sys; from pathlib import Path; from components.prompts.parquet_records import read_parquet\n"
        "print({row.why for _, row in read_parquet(Path(sys.argv[1]), ['text'])})\n"
        "print(Path('/proc/self/status').read_text())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    said, *status = done.stdout.splitlines()
    assert said == "{\"'text' has 20,000,000 bytes, more than 1 MiB\"}"
    (peak,) = [line.split()[1] for line in status if line.startswith("VmHWM:")]
    assert int(peak) < 1_500_000  # kB


def test_small_rows_are_decoded_together(path):
    pq.write_table(pa.table({"text": [f"prompt {number}" for number in range(5000)]}), path)
    with pq.ParquetFile(path) as table:
        assert parquet_records._batch_size(path, table, 0, ["text"]) == parquet_records.BATCH


def test_a_column_that_is_too_large_is_not_read(path, monkeypatch):
    monkeypatch.setattr(parquet_records, "LARGEST_COLUMN", 2000)
    texts = [f"prompt {number}" for number in range(10)] + ["x" * 300 + str(number) for number in range(10)]
    first, second = read(path, {"text": texts}, row_group_size=10)[:9], None
    assert [row["text"] for row in first] == texts[:9]
    *_, (number, second) = read_parquet(path, ["text"])
    assert (number, second.reason) == (11, "unreadable_rows")
    assert second.why.startswith("rows 11 to 20: a column of ")


@pytest.mark.parametrize("checksum", [True, False])
def test_a_damaged_page_costs_its_row_group_alone(path, checksum):
    texts = [f"a prompt of its own, number {number * 7919}" for number in range(300)]
    options = {"row_group_size": 100, "compression": "none", "use_dictionary": False}
    pq.write_table(pa.table({"text": texts}), path, write_page_checksum=checksum, **options)
    content = bytearray(path.read_bytes())
    at = content.index(texts[150].encode())
    content[at - 200 : at + 200] = b"\xff" * 400 if checksum else b"\xff\xff\xff\x7f" * 100
    path.write_bytes(content)
    rows = list(read_parquet(path, ["text"]))
    whole = [row["text"] for _, row in rows if not isinstance(row, Broken)]
    assert whole[:100] == texts[:100]
    assert whole[-100:] == texts[200:]
    ((number, lost),) = [(number, row) for number, row in rows if isinstance(row, Broken)]
    assert 101 <= number <= 151
    assert lost.why.startswith(f"rows {number} to 200: ")


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "no footer"])
def test_a_file_that_is_not_parquet_is_an_error(path, damage):
    pq.write_table(pa.table({"text": ["a"]}), path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-10], "empty": b"", "text": b"text\n" * 9, "no footer": whole[:50]}[damage])
    with pytest.raises(CorruptDataError, match=r"a.parquet can't be read to its end"):
        column_names(path)


def test_a_file_without_any_readable_row_group_is_an_error(path):
    pq.write_table(pa.table({"text": ["a" * 50] * 10}), path, compression="none")
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)
    with pytest.raises(CorruptDataError, match="no row group that can be read"):
        list(read_parquet(path, ["text"]))


DAMAGED = """
import sys
from pathlib import Path
from components.prompts.parquet_records import column_names, read_parquet
from univigu.errors import CorruptDataError

path = Path(sys.argv[1])
whole = path.read_bytes()
footer = int.from_bytes(whole[-8:-4], "little")
for at in range(len(whole) - 8 - footer, len(whole) - 8):
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 2]) + whole[at + 1 :])
    try:
        list(read_parquet(path, [name for name in column_names(path) if name in ("text", "source")]))
    except CorruptDataError:
        pass
"""


def test_damaged_metadata_do_not_end_the_process(path):
    """With any byte of the footer changed, reading raises where pyarrow itself would abort."""
    pq.write_table(pa.table({"text": ["a red seven"] * 20, "source": ["x"] * 20}), path)
    done = subprocess.run([sys.executable, "-c", DAMAGED, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
