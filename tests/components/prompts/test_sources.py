import csv
import gzip
import io
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.prompts import sources as prompt_sources
from components.prompts.records import LONGEST_LINE, Broken, parse
from components.prompts.sources import UNSAFE_COLUMNS, read_batches
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
    rows = [(number, parse(raw)) for batch in read_batches(path, sources or {}) for number, raw in batch.rows]
    return [(number, row.text if isinstance(row, Broken) else row) for number, row in rows]


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


def test_parquet_gives_the_same_rows_and_reads_no_other_columns(tmp_path):
    rows = [{**row, "embedding": [0.5] * 8} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "raw.parquet")
    assert read(tmp_path) == list(enumerate(ROWS, start=1))


def test_all_members_of_a_gzip_file_are_read(tmp_path):
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
    layout, (_, found) = batch.layout, batch.rows[0]
    assert [layout.column(found, what) for what in ("text", "id")] == ["prompt", "uuid"]
    assert tuple(layout.unsafe_columns(found)) == UNSAFE_COLUMNS
    assert (layout.whole_source, layout.whole_licence) == ("VidProM", "CC-BY-NC-4.0")


def test_a_profile_can_say_which_column_holds_what(tmp_path):
    (tmp_path / "mine.csv").write_bytes(as_csv([{"caption": "a red seven", "origin": "me", "nsfw": "0.2"}]))
    (tmp_path / "other.csv").write_bytes(as_csv(ROWS[:1]))
    mine, other = read_batches(
        tmp_path, {"m*.csv": {"columns": {"text": "caption", "source": "origin", "unsafe": "nsfw"}}}
    )
    assert (mine.layout.columns["text"], mine.layout.columns["source"]) == (("caption",), ("origin",))
    assert mine.layout.unsafe == ("nsfw",)
    assert other.layout.column(ROWS[0], "text") == "text"


@pytest.mark.parametrize(
    ("sources", "error", "said"),
    [
        ({"*.csv": {"columns": {"text": "nothing"}}}, BadInputError, "no column 'nothing' .it has words, source"),
        ({}, BadInputError, "no column 'text'"),
        ({"VidProM*": {}}, ConfigError, "matches no file in"),
    ],
)
def test_a_mapping_that_matches_no_file_or_column_is_an_error(tmp_path, sources, error, said):
    (tmp_path / "raw.csv").write_bytes(as_csv([{"words": "a red seven", "source": "test"}]))
    with pytest.raises(error, match=said):
        rows_of(tmp_path, sources)


def test_no_file_and_an_unknown_format_are_errors(tmp_path):
    with pytest.raises(MissingInputError, match="no JSONL, CSV or Parquet file"):
        rows_of(tmp_path)
    (tmp_path / "raw.xlsx").write_bytes(b"PK")
    with pytest.raises(BadInputError, match="neither JSONL, CSV nor Parquet"):
        rows_of(tmp_path / "raw.xlsx")


# --- bad input -------------------------------------------------------------------------------------------------------


def test_an_unclosed_quote_breaks_only_its_row(tmp_path):
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
def test_an_odd_csv_row_stays_one_row(tmp_path, line, row):
    (tmp_path / "raw.csv").write_bytes(b"\xef\xbb\xbftext,source,licence\r\n\r\nfirst,s,l\r\n" + line)
    assert read(tmp_path) == [(3, {"text": "first", "source": "s", "licence": "l"}), (4, row)]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_line_of_ten_megabytes_is_one_broken_row_and_never_in_memory_as_a_whole(tmp_path, form):
    path, write = tmp_path / f"raw.{form}", {"jsonl": as_jsonl, "csv": as_csv}[form]
    path.write_bytes(write([ROWS[0], {**ROWS[0], "text": "x" * 10_000_000}, ROWS[1]]))
    first, broken, last = rows_of(path)
    assert (first, last) == (ROWS[0], ROWS[1])
    assert isinstance(broken, str)
    assert len(broken) <= LONGEST_LINE


@pytest.mark.parametrize("cut", [1, 20, -3])
def test_a_truncated_compressed_file_is_an_error(tmp_path, cut):
    whole = gzip.compress(as_jsonl(ROWS))
    (tmp_path / "raw.jsonl.gz").write_bytes(whole[:cut])
    with pytest.raises(CorruptDataError, match=r"raw.jsonl.gz can't be read to its end"):
        rows_of(tmp_path)


def test_a_truncated_parquet_file_is_an_error(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "raw.parquet")
    content = (tmp_path / "raw.parquet").read_bytes()
    (tmp_path / "raw.parquet").write_bytes(content[:-10])
    with pytest.raises(CorruptDataError, match=r"raw.parquet can't be read to its end"):
        rows_of(tmp_path)


def test_rows_are_read_lazily(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_sources, "BATCH", 2)
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(ROWS))
    (tmp_path / "b.csv").write_bytes(b"no columns that anybody knows\n")
    batches = read_batches(tmp_path, {})
    assert len(next(batches).rows) == 2


# --- one bad file among good ones ------------------------------------------------------------------------------------


def faults(path, sources=None):
    """The files that can't be read, by name, with the reported reasons."""
    batches = list(read_batches(path, sources or {}))
    return {
        batch.row_id(place): row.why
        for batch in batches
        for place, (_, row) in enumerate(batch.rows)
        if isinstance(row, Broken) and row.reason == "unreadable_file"
    }


def make_bad(folder, kind):
    """Put something that has the name of a file of prompts, but isn't one, into `folder`; returns its name."""
    whole = gzip.compress(as_jsonl(ROWS * 50))
    files = {
        "cut.jsonl.gz": whole[:-300],
        "noise.jsonl.zst": b"no zstd at all",
        "empty.parquet": b"",
        "cut.parquet": b"PAR1 and no more",
        "columns.csv": b"words,from\na,b\n",
        "empty.csv": b"",
        "quote.csv": b'"no end\na,b\n',
        "twice.csv": b"text,source,text\na,b,c\n",
    }
    if kind in files:
        (folder / kind).write_bytes(files[kind])
        return kind
    (folder.parent / "outside.jsonl").write_bytes(as_jsonl(ROWS))
    bad = folder / f"{kind}.jsonl"
    if kind == "link":
        bad.symlink_to(folder.parent / "outside.jsonl")
    elif kind == "dangling":
        bad.symlink_to(folder / "nowhere")
    elif kind == "folder":
        bad.mkdir()
    elif kind == "pipe":
        os.mkfifo(bad)
    return bad.name


BAD = [
    *("cut.jsonl.gz", "noise.jsonl.zst", "empty.parquet", "cut.parquet", "columns.csv", "empty.csv", "quote.csv"),
    *("twice.csv", "link", "dangling", "folder", "pipe"),
]


@pytest.mark.parametrize("kind", BAD)
def test_an_unreadable_file_is_reported_by_its_name_and_the_others_are_read(tmp_path, kind):
    folder = tmp_path / "raw"
    folder.mkdir()
    name = make_bad(folder, kind)
    for other in ("a.jsonl", "z.jsonl"):
        (folder / other).write_bytes(as_jsonl(ROWS))
    found = faults(folder)
    assert list(found) == [name]
    assert found[name]
    assert str(tmp_path) not in found[name]
    read = [batch for batch in read_batches(folder, {}) if batch.file in ("a.jsonl", "z.jsonl")]
    assert [parse(raw) for batch in read for _, raw in batch.rows] == ROWS * 2


@pytest.mark.parametrize("kind", BAD)
def test_if_no_file_can_be_read_the_first_is_named(tmp_path, kind):
    folder = tmp_path / "raw"
    folder.mkdir()
    name = make_bad(folder, kind)
    with pytest.raises(BadInputError, match=f"{name}"):
        rows_of(folder)
    (folder / "other.parquet").write_bytes(b"")
    with pytest.raises(BadInputError, match=r"None of the 2 files in .*raw can be used; the first: "):
        rows_of(folder)


@pytest.mark.slow
def test_the_rows_before_the_end_of_a_truncated_file_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(ROWS))
    rows = [{"text": f"row {number * 7919 % 100_003}"} for number in range(20_000)]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(as_jsonl(rows))[:-2000])
    read = [row for row in rows_of(tmp_path) if row in rows[:10_000]]
    assert read == rows[:10_000]


def test_a_link_inside_the_folder_is_followed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(ROWS))
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert rows_of(tmp_path) == ROWS * 2


def test_hidden_files_are_ignored(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(ROWS))
    (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07 what a Mac leaves beside each file")
    assert rows_of(tmp_path) == ROWS


def test_wrong_columns_in_the_profile_for_one_of_several_files_lose_only_that_file(tmp_path):
    for name, column in (("a.csv", "caption"), ("b.csv", "caption"), ("c.csv", "words")):
        (tmp_path / name).write_bytes(as_csv([{column: "a red seven"}]))
    assert list(faults(tmp_path, {"*.csv": {"columns": {"text": "caption"}}})) == ["c.csv"]
    with pytest.raises(ConfigError, match="no column 'caption'"):
        rows_of(tmp_path, {"c.csv": {"columns": {"text": "caption"}}, "*": {"columns": {"text": "caption"}}})


# --- columns of some rows only ---------------------------------------------------------------------------------------


def unsafe_of(path):
    return [
        {name: row.get(name) for name in batch.layout.unsafe_columns(row)}
        for batch in read_batches(path, {})
        for row in (parse(raw) for _, raw in batch.rows)
    ]


def test_probabilities_of_unsafe_content_are_read_from_any_row(tmp_path):
    rows = [{"text": "a"}, {"text": "b", "toxicity": 0.9}, {"text": "c", " Sexual-Explicit ": 0.8}, {"text": "d"}]
    found = [{}, {"toxicity": 0.9}, {" Sexual-Explicit ": 0.8}, {}]
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(rows))
    for number, row in enumerate(rows):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"b{number}.parquet")
        (tmp_path / f"c{number}.csv").write_bytes(as_csv([row]))
    as_text = [{name: str(value) for name, value in row.items()} for row in found]
    assert unsafe_of(tmp_path) == [*found, *found, *as_text]


def test_the_column_of_prompts_may_come_after_the_first_line(tmp_path):
    head = {"dataset": "mine", "version": 2}
    (tmp_path / "a.jsonl").write_bytes(as_jsonl([head, {"prompt": "a red seven"}]))
    (batch,) = read_batches(tmp_path, {})
    assert batch.layout.columns["text"] == ("prompt",)


def test_a_batch_of_long_rows_is_short(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_sources, "BATCH_BYTES", 10_000)
    (tmp_path / "a.jsonl").write_bytes(as_jsonl([{"text": "x" * 6000}] * 4))
    (tmp_path / "b.csv").write_bytes(as_csv([{"text": "x" * 6000}] * 4))
    assert [len(batch.rows) for batch in read_batches(tmp_path, {})] == [2, 2, 2, 2]
