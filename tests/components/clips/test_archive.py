"""Clips on disk: deterministic shards, and no content from outside them."""

import hashlib
import io
import tarfile

import numpy as np
import pytest

from components.clips.archive import open_clip, read_clips, read_tar, write_tar
from univigu.errors import BadInputError, CorruptDataError, MissingInputError
from univigu.video import encode_mp4

MEMBERS = {"b.mp4": b"second", "a.mp4": b"first", "empty.mp4": b""}


def test_a_tar_has_the_same_bytes_in_any_order_and_is_read_back_completely(tmp_path):
    write_tar(tmp_path / "one.tar", MEMBERS)
    write_tar(tmp_path / "two.tar", dict(reversed(MEMBERS.items())))
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    assert list(read_tar(tmp_path / "one.tar")) == sorted(MEMBERS.items())
    assert list(read_tar(tmp_path / "one.tar", ["b.mp4"])) == [("b.mp4", b"second")]


@pytest.mark.parametrize("name", ["../up.mp4", "/root.mp4", "a/../../b.mp4", "a\\b.mp4", ""])
def test_a_name_that_leaves_the_tar_is_neither_written_nor_read(tmp_path, name):
    with pytest.raises(BadInputError, match="not a plain relative path"):
        write_tar(tmp_path / "bad.tar", {name: b"x"})
    if name:
        with tarfile.open(tmp_path / "hostile.tar", "w") as archive:
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
        with pytest.raises(BadInputError, match="not a plain relative path"):
            list(read_tar(tmp_path / "hostile.tar"))


def test_a_link_in_a_tar_is_not_followed(tmp_path):
    (tmp_path / "secret").write_text("secret")
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        info = tarfile.TarInfo("a.mp4")
        info.type, info.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        archive.addfile(info)
    assert list(read_tar(tmp_path / "link.tar")) == []
    with pytest.raises(CorruptDataError, match=r"no 'a\.mp4'"):
        list(read_tar(tmp_path / "link.tar", ["a.mp4"]))


def test_a_missing_damaged_or_truncated_tar_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(MissingInputError, match="run the step"):
        list(read_tar(tmp_path / "none.tar"))
    (tmp_path / "text.tar").write_text("no tar at all, but long enough to be looked at " * 50)
    with pytest.raises(CorruptDataError, match="damaged"):
        list(read_tar(tmp_path / "text.tar"))
    write_tar(tmp_path / "cut.tar", {"a.mp4": bytes(5000)})
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:2000])
    with pytest.raises(CorruptDataError, match="damaged"):
        list(read_tar(tmp_path / "cut.tar"))


def resize(content, at, size):
    """The tar with another size in the header at `at`, and a matching checksum."""
    header = bytearray(content[at : at + 512])
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
    return content[:at] + header + content[at + 512 :]


@pytest.mark.parametrize("size", [5001, 1 << 33, 1 << 62, -512, -1])
def test_a_member_of_a_size_that_the_tar_can_not_hold_is_told_before_it_is_read(tmp_path, size):
    write_tar(tmp_path / "0.tar", {"a.mp4": bytes(5000)})
    content = (tmp_path / "0.tar").read_bytes()[: 512 + 5000]
    (tmp_path / "0.tar").write_bytes(resize(content, 0, size))
    with pytest.raises(CorruptDataError, match=f"damaged .a member of {size} bytes"):
        list(read_tar(tmp_path / "0.tar"))


def test_a_header_damaged_anywhere_is_reported_in_one_sentence(tmp_path):
    write_tar(tmp_path / "whole.tar", {"a.mp4": bytes(700), "b.mp4": bytes(700)})
    whole = (tmp_path / "whole.tar").read_bytes()
    told = 0
    for at in (*range(512), *range(1536, 2048)):
        (tmp_path / "bad.tar").write_bytes(whole[:at] + bytes([whole[at] ^ 0x81]) + whole[at + 1 :])
        try:
            assert list(read_tar(tmp_path / "bad.tar"))
        except CorruptDataError:
            told += 1
    assert told > 900


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE])
def test_sizes_in_tar_extensions_are_not_trusted(tmp_path, kind):
    """Huge names, and sparse maps of exabytes."""
    with tarfile.open(tmp_path / "odd.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo("a.mp4")
        info.type, info.size = kind, 600
        archive.addfile(info, io.BytesIO(b"12 size=99999999999\n" * 30))
    assert list(read_tar(tmp_path / "odd.tar")) == []


def test_clips_are_read_in_the_order_of_their_rows(tmp_path):
    write_tar(tmp_path / "0.tar", {"a": b"0a", "b": b"0b"})
    write_tar(tmp_path / "1.tar", {"a": b"1a"})
    rows = [{"shard": shard, "member": member} for shard, member in (("0.tar", "b"), ("1.tar", "a"), ("0.tar", "a"))]
    assert [content for _, content in read_clips(tmp_path, rows)] == [b"0b", b"1a", b"0a"]


def test_a_clip_is_opened_only_if_it_matches_its_row():
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    content = encode_mp4(frames, 8)
    row = {"id": "c", "sha256": hashlib.sha256(content).hexdigest(), "frames": 5, "height": 16, "width": 16}
    assert open_clip(row, content)[0].shape == frames.shape
    with pytest.raises(BadInputError, match="not those that its row names"):
        open_clip(row, content[:-1])
    with pytest.raises(BadInputError, match="not its row's"):
        open_clip({**row, "frames": 9}, content)
