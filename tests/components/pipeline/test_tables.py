import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.pipeline import tables
from components.pipeline.tables import TableWriter, read_table, write_table
from univigu.errors import BadInputError


def rejected(number, **values):
    return {"id": f"{number:05d}", "reason": f"r{number % 3}", "detail": "", "row": str(number), **values}


@pytest.fixture
def small_runs(monkeypatch):
    """Tables of more than 100 rows are sorted on disk."""
    monkeypatch.setattr(tables, "ROW_GROUP", 100)
    monkeypatch.setattr(tables, "_BATCH", 20)
    monkeypatch.setattr(tables, "_STRIDE", 8)


@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 700, 1234])
def test_a_table_that_is_sorted_on_disk_is_the_one_that_is_sorted_in_memory(tmp_path, small_runs, count):
    rows = [rejected(number) for number in range(count)]
    random.Random(0).shuffle(rows)
    assert write_table(tmp_path, "rejected", rows) == count
    assert read_table(tmp_path, "rejected").to_pylist() == sorted(rows, key=lambda row: row["id"])
    assert [path.name for path in tmp_path.iterdir()] == ["rejected.parquet"]


def test_the_order_in_which_rows_come_changes_no_byte(tmp_path, small_runs):
    rows = [rejected(number) for number in range(750)]
    contents = set()
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        write_table(tmp_path, "rejected", rows)
        contents.add((tmp_path / "rejected.parquet").read_bytes())
    assert len(contents) == 1
    groups = pq.ParquetFile(tmp_path / "rejected.parquet").metadata
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [100] * 7 + [50]


def test_rows_with_equal_keys_keep_their_order_and_those_without_come_last(tmp_path, small_runs):
    rows = [rejected(number % 7, reason="same", row=str(number)) for number in range(500)]
    rows.insert(250, {**rows[0], "id": None})
    write_table(tmp_path, "rejected", rows)
    read = read_table(tmp_path, "rejected").to_pylist()
    assert read[-1]["id"] is None
    assert read[:-1] == sorted((row for row in rows if row["id"]), key=lambda row: row["id"])


def test_what_is_in_memory_does_not_grow_with_the_rows(tmp_path, small_runs):
    writer, most = TableWriter("rejected", tmp_path), []
    for number in range(4000):
        writer.append(rejected(number))
        most.append(len(writer._rows) + sum(map(len, writer._tables)))
    assert max(most) <= 120
    assert writer.write(tmp_path) == len(writer) == 4000
    assert writer.write(tmp_path) == 4000  # again: a gate that fails wants it elsewhere
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["rejected.parquet"]


@pytest.mark.parametrize("count", [3, 300])
def test_a_row_that_does_not_fit_is_refused_wherever_it_comes(tmp_path, small_runs, count):
    rows = [rejected(number) for number in range(count)]
    rows[count // 2]["reason"] = 7
    with pytest.raises(BadInputError, match="'rejected' does not fit its schema"):
        write_table(tmp_path, "rejected", rows)
    assert list(tmp_path.iterdir()) == []


def test_a_large_table_reads_as_one(tmp_path, small_runs):
    write_table(tmp_path, "rejected", (rejected(number) for number in range(1000)))
    assert read_table(tmp_path, "rejected")["id"].combine_chunks() == pa.array([f"{n:05d}" for n in range(1000)])
