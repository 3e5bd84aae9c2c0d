"""A text of an imported video is assigned to that video, or quarantined with a reason."""

import csv
import io
import json
import os
import tarfile
from itertools import permutations

import pyarrow as pa
import pytest
from pyarrow import parquet

from components.clips.import_files import find_videos, list_videos
from components.clips.import_texts import Texts, read_members, read_texts
from components.prompts.records import LONGEST_LINE, LONGEST_QUOTE
from univigu.errors import BadInputError, ConfigError, CorruptDataError, MissingInputError

COMPOSED, DECOMPOSED = "caf\u00e9.mp4", "cafe\u0301.mp4"


def reasons(faults):
    return [(fault.id, fault.reason) for fault in faults]


def write_rows(path, rows):
    """A table of (file, caption), as CSV or JSONL by its name."""
    stream = io.StringIO()
    if path.suffix == ".csv":
        csv.writer(stream, lineterminator="\n").writerows([("file_name", "caption"), *rows])
    else:
        stream.write("".join(json.dumps({"file_name": name, "caption": text}) + "\n" for name, text in rows))
    path.write_text(stream.getvalue(), encoding="utf-8")
    return path


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("pair", [(COMPOSED, DECOMPOSED), ("a/b.mp4", "a\\b.mp4"), ("\u212b.mp4", "\u00c5.mp4")])
def test_similar_names_keep_their_own_texts_in_any_order(tmp_path, ending, pair):
    for order in permutations(pair):
        table = write_rows(tmp_path / f"t.{ending}", [(name, f"about {pair.index(name)}") for name in order])
        found, faults = read_texts(tmp_path, list(pair), table)
        assert found == {name: Texts(f"about {number}", "") for number, name in enumerate(pair)}
        assert faults == []


def test_text_files_of_similar_names_keep_their_own_texts(tmp_path):
    for name in (COMPOSED, DECOMPOSED):
        (tmp_path / name).with_suffix(".txt").write_text(f"about {len(name)}")
    found, _ = read_texts(tmp_path, [COMPOSED, DECOMPOSED], None)
    assert found == {name: Texts(f"about {len(name)}", "") for name in (COMPOSED, DECOMPOSED)}


def test_an_exact_name_wins_over_a_similar_one_in_any_order(tmp_path):
    for rows in permutations([(COMPOSED, "alike"), (DECOMPOSED, "exact")]):
        found, faults = read_texts(tmp_path, [DECOMPOSED], write_rows(tmp_path / "t.csv", rows))
        assert found == {DECOMPOSED: Texts("exact", "")}
        assert [reason for _, reason in reasons(faults)] == ["duplicate_row"]


def test_an_ambiguous_name_matches_no_video(tmp_path):
    videos = ["a/b\u00e9.mp4", "a\\b\u00e9.mp4"]
    found, faults = read_texts(tmp_path, videos, write_rows(tmp_path / "t.csv", [("a/be\u0301.mp4", "whose?")]))
    assert found == {}
    assert reasons(faults) == [("t.csv:2", "ambiguous_name")]


def test_of_two_rows_about_one_video_the_first_counts(tmp_path):
    found, faults = read_texts(tmp_path, ["a.mp4"], write_rows(tmp_path / "t.jsonl", [("a.mp4", "1"), ("a.mp4", "2")]))
    assert found == {"a.mp4": Texts("1", "")}
    assert reasons(faults) == [("t.jsonl:2", "duplicate_row")]
    assert faults[0].row["caption"] == "2"


# --- damaged tables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ("b.mp4,loose, comma", [("t.csv:3", "broken_row")]),
        ("b.mp4", [("t.csv:3", "broken_row")]),
        ('b.mp4,"open', [("t.csv:3", "broken_row")]),
        ("b.mp4,caf\udce9", [("b.mp4", "damaged_text")]),
        ("b.mp4,", [("b.mp4", "no_text")]),
        ("b.mp4,a \0 b", [("b.mp4", "damaged_text")]),
        (",nameless", [("t.csv:3", "broken_row")]),
    ],
)
def test_a_damaged_row_is_quarantined_and_the_others_are_read(tmp_path, bad, found):
    lines = f'file_name,caption\na.mp4,"one, two"\n{bad}\nc.mp4,three\nd.mp4,"says ""four"""\n'
    (tmp_path / "t.csv").write_bytes(lines.encode(errors="surrogateescape"))
    texts, faults = read_texts(tmp_path, [f"{name}.mp4" for name in "abcd"], tmp_path / "t.csv")
    assert {name: text.caption for name, text in texts.items()} == {
        "a.mp4": "one, two",
        "c.mp4": "three",
        "d.mp4": 'says "four"',
    }
    assert reasons(faults) == found


def test_a_caption_that_contains_the_rows_of_other_videos_is_quarantined(tmp_path):
    (tmp_path / "t.csv").write_text('file_name,caption\na.mp4,"open\nb.mp4,two\nc.mp4,three"\nd.mp4,four\n')
    texts, faults = read_texts(tmp_path, [f"{name}.mp4" for name in "abcd"], tmp_path / "t.csv")
    assert texts == {"d.mp4": Texts("four", "")}
    assert reasons(faults) == [("a.mp4", "open_quote")]


def test_a_caption_of_several_lines_is_read_completely(tmp_path):
    table = write_rows(tmp_path / "t.csv", [("a.mp4", "One, two,\nthree.\n\nFour, says b."), ("b.mp4", "five")])
    found, _ = read_texts(tmp_path, ["a.mp4", "b.mp4"], table)
    assert found == {"a.mp4": Texts("One, two, three. Four, says b.", ""), "b.mp4": Texts("five", "")}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"file_name": "a.mp4", "caption": "caf\xe9"}', ("a.mp4", "damaged_text")),
        (b'{"file_name": "a.mp4", "caption": "half \\ud83d a pair"}', ("a.mp4", "damaged_text")),
        (b'{"file_name": "a.mp4", "caption": 7}', ("t.jsonl:1", "broken_row")),
        (b'{"file_name": ["a.mp4"], "caption": "x"}', ("t.jsonl:1", "broken_row")),
        (b'{"file_name": "a.mp4", "caption": "' + b"x" * LONGEST_LINE + b'"}', ("t.jsonl:1", "broken_row")),
        (b'{"file_name": "a.mp4", "caption": ' + b"[" * 900 + b"]" * 900 + b"}", ("t.jsonl:1", "broken_row")),
        (b'{"file_name": "\\udcff.mp4", "caption": "x"}', ("t.jsonl:1", "no_file")),
    ],
)
def test_an_unusable_line_is_quarantined(tmp_path, line, found):
    (tmp_path / "t.jsonl").write_bytes(line + b'\n{"file_name": "b.mp4", "caption": "", "text": "x"}\n')
    texts, faults = read_texts(tmp_path, ["a.mp4", "b.mp4"], tmp_path / "t.jsonl")
    assert texts == {"b.mp4": Texts("x", "")}
    assert reasons(faults) == [found]
    quoted = json.dumps([faults[0].row, faults[0].detail]).encode(errors="replace")
    assert len(quoted) < 3 * LONGEST_QUOTE


def test_an_unreadable_table_is_an_error(tmp_path):
    (tmp_path / "t.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(CorruptDataError, match=r"t.csv.gz can't be read to its end"):
        read_texts(tmp_path, ["a.mp4"], tmp_path / "t.csv.gz")
    (tmp_path / "t.csv").write_text("file_name,caption,caption\na.mp4,1,2\n")
    with pytest.raises(BadInputError, match="more than one column 'caption'"):
        read_texts(tmp_path, ["a.mp4"], tmp_path / "t.csv")


# --- text files ------------------------------------------------------------------------------------------------------


def test_a_huge_text_file_is_not_read_completely(tmp_path):
    with (tmp_path / "a.txt").open("wb") as stream:
        stream.truncate(1 << 40)  # a sparse file of a terabyte
    (tmp_path / "b.txt").write_text("b")
    os.mkfifo(tmp_path / "c.txt")
    texts, faults = read_texts(tmp_path, ["a.mp4", "b.mp4", "c.mp4"], None)
    assert texts == {"b.mp4": Texts("b", "")}
    assert reasons(faults) == [("a.mp4", "over_long"), ("c.mp4", "not_a_file")]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("一只猫在草地上奔跑。阳光明媚。".encode(), Texts("一只猫在草地上奔跑。阳光明媚。", "")),
        ("قطة تركض على العشب.".encode(), Texts("قطة تركض على العشب.", "")),
        ("a cat 🐈 runs\r\nand \x07jumps ".encode(), Texts("a cat 🐈 runs and jumps", "")),
        ("a café".encode("utf-8-sig"), Texts("a café", "")),
        ("a café".encode("utf-16"), Texts("a café", "")),
        ("a caf\u00c3\u00a9 &amp; a cat".encode(), Texts("a café & a cat", "")),
        (b"a cat \x00 runs", "damaged_text"),
        (b"a caf\xe9", "damaged_text"),
        (b" \n", "no_text"),
    ],
    ids=["chinese", "arabic", "emoji", "bom", "utf-16", "mojibake", "nul", "latin-1", "blank"],
)
def test_texts_in_any_script_are_kept_and_damaged_ones_reported(tmp_path, content, texts):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_bytes(content)
    found, faults = read_texts(tmp_path, ["a.mp4"], None)
    assert (found == {"a.mp4": texts}) if isinstance(texts, Texts) else [fault.reason for fault in faults] == [texts]


def test_a_jsonl_table_may_have_broken_rows(tmp_path):
    lines = [
        {"file_name": "a.mp4", "text": "first"},
        {"video": "sub\\B.mp4", "caption": "second", "prompt": "brief"},
        {"file_name": "../outside.mp4", "caption": "x"},
        {"file_name": "/etc/passwd", "caption": "x"},
        {"file_name": "a\u0301.mp4", "caption": "composed otherwise"},
        {"file_name": "a.mp4", "caption": ["no", "text"]},
        ["no", "object"],
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\nno json\n\n" + "[" * 100_000 + "\n")
    found, faults = read_texts(tmp_path, ["a.mp4", "sub/B.mp4", "\u00e1.mp4"], path)
    assert found == {
        "a.mp4": Texts("first", ""),
        "sub/B.mp4": Texts("second", "brief"),
        "\u00e1.mp4": Texts("composed otherwise", ""),
    }
    reasons = [(fault.id.split(":")[-1], fault.reason) for fault in faults]
    assert reasons == [
        *(("3", "name_outside"), ("4", "name_outside"), ("6", "broken_row"), ("7", "broken_row")),
        *(("8", "broken_row"), ("10", "broken_row")),
    ]


def test_the_table_of_a_folder_is_found_by_its_name(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/b.mp4").touch()
    (tmp_path / "metadata.csv").write_text("file_name,text\na.mp4,said here\n")
    (tmp_path / "a.txt").write_text("not here")
    assert list_videos(tmp_path) == (["a.mp4"], {})
    assert read_texts(tmp_path, ["a.mp4"], None)[0] == {"a.mp4": Texts("said here", "")}


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("none.csv", None, MissingInputError, "no file with captions"),
        ("x.xlsx", b"", ConfigError, "neither CSV nor JSONL nor Parquet"),
        ("x.csv", b"clip;words\na;b\n", BadInputError, "has the columns clip;words; it needs one of file_name"),
        ("x.csv", b"", BadInputError, r"has the columns \(none\)"),
    ],
)
def test_what_is_no_table_of_captions_is_named(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        read_texts(tmp_path, ["a.mp4"], tmp_path / name)


# --- other sources ---------------------------------------------------------------------------------------------------


def test_a_parquet_table_is_read_without_its_videos(tmp_path):
    table = pa.table(
        {
            "file_name": ["a.mp4", "b.mp4", "c.mp4"],
            "video": [{"bytes": b"\0" * 9, "path": "a.mp4"}] * 3,
            "text": ["one", None, "three"],
            "stage": [1, 2, 3],
        }
    )
    parquet.write_table(table, tmp_path / "t.parquet")
    found, faults = read_texts(tmp_path, ["a.mp4", "b.mp4", "c.mp4"], tmp_path / "t.parquet")
    assert found == {"a.mp4": Texts("one", "", 1)}
    assert reasons(faults) == [("t.parquet:3", "broken_row"), ("b.mp4", "no_text")] or reasons(faults) == [
        ("b.mp4", "no_text"),
        ("t.parquet:3", "broken_row"),
    ]


def test_each_folder_may_have_a_table_of_its_own_and_others_have_text_files(tmp_path):
    for split in ("train", "test", "loose"):
        (tmp_path / split).mkdir()
        (tmp_path / f"{split}/a.txt").write_text(f"{split}, beside")
    for split in ("train", "test"):
        (tmp_path / f"{split}/metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "text": split}))
    found, faults = read_texts(tmp_path, ["loose/a.mp4", "test/a.mp4", "train/a.mp4"], None)
    assert faults == []
    assert {name: text.caption for name, text in found.items()} == {
        "loose/a.mp4": "loose, beside",
        "test/a.mp4": "test",
        "train/a.mp4": "train",
    }


def test_texts_in_a_tar_are_those_of_the_videos_beside_them(tmp_path):
    members = {
        "one.mp4": b"video",
        "one.json": b'{"caption": "from JSON", "prompt": "brief", "stage": 2}',
        "one.txt": b"not this",
        "sub/two.left.mp4": b"video",
        "sub/two.txt": b"from text",
        "three.mp4": b"video",
        "three.json": b'{"width": 9}',
        "four.mp4": b"video",
        "four.json": b"{",
        "._five.mp4": b"of a Mac",
    }
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5  # WebDataset's times are fractions, which need extensions
            archive.addfile(info, io.BytesIO(content))
    videos = find_videos(tmp_path)
    assert (videos.faults, videos.names) == (
        {},
        ["a.tar/four.mp4", "a.tar/one.mp4", "a.tar/sub/two.left.mp4", "a.tar/three.mp4"],
    )
    assert videos.open("a.tar/one.mp4") == b"video"
    found, faults = read_texts(tmp_path, videos.names, None, read_members(videos))
    assert found == {
        "a.tar/one.mp4": Texts("from JSON", "brief", 2),
        "a.tar/sub/two.left.mp4": Texts("from text", ""),
    }
    assert reasons(faults) == [("a.tar/four.mp4", "broken_row")]


def test_a_tar_that_is_damaged_or_has_odd_members_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for name in ("ok.mp4", "twice.mp4", "twice.mp4", "../out.mp4", "x" * 120 + ".mp4"):
            archive.addfile(tarfile.TarInfo(name))
    (tmp_path / "b.tar").write_bytes(b"no tar" * 200)
    videos = find_videos(tmp_path)
    assert videos.names == ["a.tar/ok.mp4"]
    assert sorted(reason for reason, _ in videos.faults.values()) == ["damaged", *["unreadable_member"] * 3]


def test_the_probable_encoding_of_a_text_file_is_named(tmp_path):
    text = "Рыжая кошка бежит по траве, потом прыгает на забор и смотрит на птиц."
    (tmp_path / "a.txt").write_bytes(text.encode("cp1251"))
    found, (fault,) = read_texts(tmp_path, ["a.mp4"], None)
    assert (found, fault.reason) == ({}, "damaged_text")
    assert "not UTF-8, but perhaps cp1251" in fault.detail
