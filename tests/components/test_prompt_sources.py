import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components import prompt_sources
from components.prompt_sources import LONGEST_LINE, UNSAFE_COLUMNS, parse, read_batches
from univigu.errors import BadInputError, ConfigError, CorruptDataError, MissingInputError

ROWS = [
    {"text": text, "source": "test", "licence": "CC0-1.0"}
    for text in (
        "a red seven",
        'says "hello", twice',
        "two\nlines",
        "一只黑狗",
        "كلب أسود",
        "‏שבע אדום",
        "a 🐶",
        "x" * 9000,
    )
]


def read(path, sources=None):
    return [(number, parse(raw)) for batch in read_batches(path, sources or {}) for number, raw in batch.rows]


def rows_of(path, sources=None):
    return [row for _, row in read(path, sources)]


def as_csv(rows):
    stream = io.StringIO()
    table = csv.DictWriter(stream, rows[0].keys(), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return stream.getvalue().encode()


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zstd(content):
    return pa.Codec("zstd").compress(content, asbytes=True)


@pytest.mark.parametrize(("compression", "ending"), [(bytes, ""), (gzip.compress, ".gz"), (zstd, ".zst")])
@pytest.mark.parametrize(("write", "form"), [(as_jsonl, "jsonl"), (as_csv, "csv")])
def test_every_format_gives_the_same_rows(tmp_path, write, form, compression, ending):
    path = tmp_path / f"raw.{form}{ending}"
    path.write_bytes(compression(write(ROWS)))
    assert rows_of(path) == rows_of(tmp_path) == ROWS


def test_parquet_gives_the_same_rows_and_leaves_other_columns_on_disk(tmp_path):
    rows = [{**row, "embedding": [0.5] * 8} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "raw.parquet")
    assert read(tmp_path) == list(enumerate(ROWS, start=1))


def test_parts_written_one_after_another_into_a_gzip_are_all_read(tmp_path):
    (tmp_path / "raw.jsonl.gz").write_bytes(gzip.compress(as_jsonl(ROWS[:3])) + gzip.compress(as_jsonl(ROWS[3:])))
    assert rows_of(tmp_path) == ROWS


def test_a_folder_is_read_by_name_and_other_files_are_not(tmp_path):
    (tmp_path / "b.csv").write_bytes(as_csv(ROWS[1:2]))
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(ROWS[:1]))
    (tmp_path / "README.md").write_text("no prompts")
    assert [batch.file for batch in read_batches(tmp_path, {})] == ["a.jsonl", "b.csv"]
    assert rows_of(tmp_path) == ROWS[:2]


# --- columns ---------------------------------------------------------------------------------------------------------


def test_the_columns_of_vidprom_are_known(tmp_path):
    row = {"uuid": "6a83eb92", "prompt": "a red seven", "time": "2023-09-02"} | dict.fromkeys(UNSAFE_COLUMNS, "0.001")
    (tmp_path / "VidProM_unique.csv").write_bytes(as_csv([row]))
    (batch,) = read_batches(tmp_path, {"VidProM_*": {"source": "VidProM", "licence": "CC-BY-NC-4.0"}})
    layout = batch.layout
    assert (layout.text, layout.id, layout.unsafe) == ("prompt", "uuid", UNSAFE_COLUMNS)
    assert (layout.whole_source, layout.whole_licence) == ("VidProM", "CC-BY-NC-4.0")


def test_a_profile_can_say_which_column_holds_what(tmp_path):
    (tmp_path / "mine.csv").write_bytes(as_csv([{"caption": "a red seven", "origin": "me", "nsfw": "0.2"}]))
    (tmp_path / "other.csv").write_bytes(as_csv(ROWS[:1]))
    mine, other = read_batches(
        tmp_path, {"m*.csv": {"columns": {"text": "caption", "source": "origin", "unsafe": "nsfw"}}}
    )
    assert (mine.layout.text, mine.layout.source, mine.layout.unsafe) == ("caption", "origin", ("nsfw",))
    assert other.layout.text == "text"


@pytest.mark.parametrize(
    ("sources", "error", "said"),
    [
        ({"*.csv": {"columns": {"text": "nothing"}}}, BadInputError, "no column 'nothing' .it has words, source"),
        ({}, BadInputError, "no column 'text'"),
        ({"*.csv": {"columns": {"title": "words"}}}, ConfigError, "map 'title'"),
        ({"*.csv": {"license": "CC0-1.0"}}, ConfigError, "more than source, licence and columns"),
        ({"*.csv": "CC0-1.0"}, ConfigError, "more than source, licence and columns"),
        ({"VidProM*": {}}, ConfigError, "no file in .* is called that"),
    ],
)
def test_a_mapping_that_fits_no_file_is_told(tmp_path, sources, error, said):
    (tmp_path / "raw.csv").write_bytes(as_csv([{"words": "a red seven", "source": "test"}]))
    with pytest.raises(error, match=said):
        rows_of(tmp_path, sources)


def test_no_file_and_an_unknown_format_are_told(tmp_path):
    with pytest.raises(MissingInputError, match=r"no \*.jsonl file"):
        rows_of(tmp_path)
    (tmp_path / "raw.xlsx").write_bytes(b"PK")
    with pytest.raises(BadInputError, match="neither JSONL, CSV nor Parquet"):
        rows_of(tmp_path / "raw.xlsx")


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_quote_that_never_ends_breaks_its_own_row_alone(tmp_path):
    lines = [b"text,source,licence", b"a,s,l", b'"open,s,l', *(f"row {n},s,l".encode() for n in range(3000))]
    (tmp_path / "raw.csv").write_bytes(b"\n".join(lines) + b"\n")
    rows = read(tmp_path)
    assert rows[0] == (2, {"text": "a", "source": "s", "licence": "l"})
    assert rows[1] == (3, '"open,s,l')
    assert rows[2:] == [(n + 4, {"text": f"row {n}", "source": "s", "licence": "l"}) for n in range(3000)]


@pytest.mark.parametrize(
    ("line", "row"),
    [
        (b"a,s", "a,s"),
        (b"a,s,l,more", "a,s,l,more"),
        (b"a \xff b,s,l", "a \ufffd b,s,l"),
        (b'"a"b,s,l', '"a"b,s,l'),
        (b"a \x00 b,s,l", {"text": "a \x00 b", "source": "s", "licence": "l"}),
        (b'"cut in the mid', '"cut in the mid'),
        (b",,", {"text": "", "source": "", "licence": ""}),
    ],
)
def test_a_csv_row_that_is_odd_stays_one_row(tmp_path, line, row):
    (tmp_path / "raw.csv").write_bytes(b"\xef\xbb\xbftext,source,licence\r\n\r\nfirst,s,l\r\n" + line)
    assert read(tmp_path) == [(3, {"text": "first", "source": "s", "licence": "l"}), (4, row)]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_line_of_ten_megabytes_is_one_broken_row_and_never_held_whole(tmp_path, form):
    path, write = tmp_path / f"raw.{form}", {"jsonl": as_jsonl, "csv": as_csv}[form]
    path.write_bytes(write([ROWS[0], {**ROWS[0], "text": "x" * 10_000_000}, ROWS[1]]))
    first, broken, last = rows_of(path)
    assert (first, last) == (ROWS[0], ROWS[1])
    assert isinstance(broken, str)
    assert len(broken) <= LONGEST_LINE


@pytest.mark.parametrize("cut", [1, 20, -3])
def test_a_compressed_file_that_ends_in_the_middle_is_an_error(tmp_path, cut):
    whole = gzip.compress(as_jsonl(ROWS))
    (tmp_path / "raw.jsonl.gz").write_bytes(whole[:cut])
    with pytest.raises(CorruptDataError, match=r"raw.jsonl.gz can't be read to its end"):
        rows_of(tmp_path)


def test_a_parquet_file_that_ends_in_the_middle_is_an_error(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "raw.parquet")
    content = (tmp_path / "raw.parquet").read_bytes()
    (tmp_path / "raw.parquet").write_bytes(content[:-10])
    with pytest.raises(CorruptDataError, match=r"raw.parquet can't be read to its end"):
        rows_of(tmp_path)


def test_rows_are_read_only_as_they_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_sources, "BATCH", 2)
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(ROWS))
    (tmp_path / "b.csv").write_bytes(b"no columns that anybody knows\n")
    batches = read_batches(tmp_path, {})
    assert len(next(batches).rows) == 2
