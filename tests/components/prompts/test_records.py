"""JSONL and CSV files of all kinds: damage breaks only its own record, and all sizes are bounded."""

import csv
import gzip
import io
import json

import pyarrow as pa
import pytest

from components.prompts import records
from components.prompts.records import (
    DEEPEST,
    LONGEST_LINE,
    RECORD_LINES,
    Broken,
    file_format,
    open_csv,
    open_jsonl,
    parse,
)
from univigu.errors import BadInputError, CorruptDataError

NAMES = ["text", "source", "licence"]


def read_csv(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(open_csv(path)[1])


def good(text, number):
    return number, {"text": text, "source": "s", "licence": "l"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.csv"


# --- CSV -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "broken"),
    [
        (["loose, comma,s,l"], {2: "4 cells for 3 columns"}),
        (["few,s"], {2: "2 cells for 3 columns"}),
        (['"open,s,l'], {2: "not closed"}),
        (['"open,s,l', '"open again,s,l'], {2: "not closed", 3: "not closed"}),
        (['a "quote",s,"open'], {2: "not closed"}),
        (['"a"b,s,l'], {2: "out of place"}),
        (['"a line\nof two",s,l,more'], {2: "4 cells"}),  # one record, which contains no others
        (['x","a'] * 9, dict.fromkeys(range(2, 11), "not closed")),  # each opens a quote that the next one closes
    ],
)
def test_a_loose_comma_or_an_open_quote_costs_its_own_row_alone(path, lines, broken):
    after = [f"row {number},s,l" for number in range(20)]
    found = read_csv(path, "\n".join([",".join(NAMES), *lines, *after]) + "\n")
    assert {number: row.why for number, row in found if isinstance(row, Broken)}.keys() == broken.keys()
    assert all(broken[number] in row.why for number, row in found if isinstance(row, Broken))
    first = 2 + sum(line.count("\n") + 1 for line in lines)
    assert found[len(broken) :] == [good(f"row {number}", first + number) for number in range(20)]


def test_an_unclosed_quote_that_a_later_row_closes_breaks_only_its_row(path):
    found = read_csv(path, 'text,source,licence\n"open,s,l\nfirst,s,l\nsecond,", x",l\nthird,s,l\n')
    assert [number for number, row in found if isinstance(row, Broken)] == [2]
    assert [row["text"] for _, row in found if not isinstance(row, Broken)] == ["first", "second", "third"]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_csv_file_is_read_with_any_line_ends_and_encoding(path, ending, encoding):
    texts = ["plain", "a, b", 'says "hi"', f"two{ending}lines", "", " é 一只猫 🐈 ", "=1+1"]
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator=ending)
    table.writerows([NAMES, *([text, "s", "l"] for text in texts)])
    found = [row["text"].splitlines() for _, row in read_csv(path, stream.getvalue().encode(encoding))]
    assert found == [text.splitlines() for text in texts]


def test_invalid_bytes_break_their_row_and_its_probable_content_is_kept(path):
    ((_, row),) = read_csv(path, b"text,source,licence\na dog\x92s ball,s,l\n")
    assert (row.why, row.row) == ("not UTF-8", {"text": "a dog\ufffds ball", "source": "s", "licence": "l"})


def test_a_cell_of_many_lines_is_read_up_to_a_limit(path):
    within, beyond = ("\n".join(["line"] * count) for count in (RECORD_LINES, RECORD_LINES + 2))
    found = read_csv(path, f'text,source,licence\n"{within}",s,l\nrow,s,l\n')
    assert [row["text"] for _, row in found] == [within, "row"]
    found = read_csv(path, f'text,source,licence\n"{beyond}",s,l\nrow,s,l\n')
    assert isinstance(found[0][1], Broken)
    assert found[-1][1]["text"] == "row"


@pytest.mark.parametrize("first", ['"open', 'a"b"c","d'])
def test_a_first_line_that_is_not_a_header_is_an_error(path, first):
    with pytest.raises(BadInputError, match=r"first line of .*a.csv is no header"):
        read_csv(path, f"{first}\nrow,s,l\n")


# --- JSONL -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": 1', "not JSON"),
        (b'{"text": 1}{"text": 2}', "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": ' + b"[" * DEEPEST + b"]" * DEEPEST + b"}", f"nested deeper than {DEEPEST} levels"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, f"nested deeper than {DEEPEST} levels"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'{"text": "' + b"a" * LONGEST_LINE + b'"}', "longer than 1 MiB"),
    ],
)
def test_a_line_that_is_not_an_object_is_broken_with_a_reason(line, why):
    found = parse(line)
    assert isinstance(found, Broken)
    assert found.why.startswith(why)


def test_brackets_in_a_text_do_not_count_as_nesting():
    row = {"text": "[{" * 100, "list": [[1]] * 50}
    assert parse(json.dumps(row).encode()) == row


def test_jsonl_in_utf_16_and_with_cr_line_ends_is_read(tmp_path):
    rows = [{"text": "é"}, {"text": "一"}]
    for encoding, ending in (("utf-16", "\n"), ("utf-16", "\r\n"), ("utf-8", "\r"), ("utf-8-sig", "\n")):
        text = "".join(json.dumps(row, ensure_ascii=False) + ending for row in rows)
        (tmp_path / "a.jsonl").write_bytes(text.encode(encoding))
        assert [parse(raw) for _, raw in open_jsonl(tmp_path / "a.jsonl")] == rows


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.jsonl", ("jsonl", "")),
        ("A.JSONL", ("jsonl", "")),
        ("a.ndjson.gz", ("jsonl", "gzip")),
        ("a.jsonl.csv", ("csv", "")),
        ("a.csv.zst", ("csv", "zstd")),
        ("a.parquet", ("parquet", "")),
        ("a.parquet.gz", ("", "")),
        ("README.md", ("", "")),
        ("jsonl", ("", "")),
        ("a.gz", ("", "")),
    ],
)
def test_the_format_of_a_file_is_decided_by_its_suffix(name, found):
    assert file_format(name) == found


@pytest.mark.parametrize("compress", [gzip.compress, lambda content: pa.Codec("zstd").compress(content, asbytes=True)])
@pytest.mark.parametrize("content", [b"\0" * 3_000_000, b"a\n" * 1_500_000], ids=["one line", "many lines"])
def test_what_expands_without_measure_is_given_up(tmp_path, monkeypatch, compress, content):
    monkeypatch.setattr(records, "SMALL", 1 << 20)
    path = tmp_path / f"a.jsonl{'.gz' if compress is gzip.compress else '.zst'}"
    path.write_bytes(compress(content))
    with pytest.raises(CorruptDataError, match="expands to more than 250 times its size"):
        list(open_jsonl(path))


@pytest.mark.parametrize("cut", [1, 20, 0.5, -3])
def test_a_truncated_compressed_file_is_an_error_in_either_format(tmp_path, cut):
    lines = "".join(f'{{"text": "row {number * 7919 % 1000}"}}\n' for number in range(2000)).encode()
    for name, content in (("gz", gzip.compress(lines)), ("zst", pa.Codec("zstd").compress(lines, asbytes=True))):
        path = tmp_path / f"a.jsonl.{name}"
        path.write_bytes(content[: int(cut * len(content)) if cut == 0.5 else cut])
        with pytest.raises(CorruptDataError, match="can't be read to its end"):
            list(open_jsonl(path))
