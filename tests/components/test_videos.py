"""Clips on disk: shards that are the same each time, and nothing read that was not meant."""

import hashlib
import io
import tarfile

import numpy as np
import pytest

from components.videos import open_clip, read_clips, read_tar, write_tar
from univigu.errors import BadInputError, CorruptDataError, MissingInputError
from univigu.video import encode_mp4

MEMBERS = {"b.mp4": b"second", "a.mp4": b"first", "empty.mp4": b""}


def test_a_tar_is_the_same_bytes_whatever_the_order_and_comes_back_whole(tmp_path):
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


def test_a_missing_damaged_or_cut_tar_says_what_to_do(tmp_path):
    with pytest.raises(MissingInputError, match="run the step"):
        list(read_tar(tmp_path / "none.tar"))
    (tmp_path / "text.tar").write_text("no tar at all, but long enough to be looked at " * 50)
    with pytest.raises(CorruptDataError, match="damaged"):
        list(read_tar(tmp_path / "text.tar"))
    write_tar(tmp_path / "cut.tar", {"a.mp4": bytes(5000)})
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:2000])
    with pytest.raises(CorruptDataError, match="damaged"):
        list(read_tar(tmp_path / "cut.tar"))


def test_clips_are_read_in_the_order_of_their_rows(tmp_path):
    write_tar(tmp_path / "0.tar", {"a": b"0a", "b": b"0b"})
    write_tar(tmp_path / "1.tar", {"a": b"1a"})
    rows = [{"shard": shard, "member": member} for shard, member in (("0.tar", "b"), ("1.tar", "a"), ("0.tar", "a"))]
    assert [content for _, content in read_clips(tmp_path, rows)] == [b"0b", b"1a", b"0a"]


def test_a_clip_is_opened_only_if_it_is_what_its_row_says():
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    content = encode_mp4(frames, 8)
    row = {"id": "c", "sha256": hashlib.sha256(content).hexdigest(), "frames": 5, "height": 16, "width": 16}
    assert open_clip(row, content)[0].shape == frames.shape
    with pytest.raises(BadInputError, match="not those that its row names"):
        open_clip(row, content[:-1])
    with pytest.raises(BadInputError, match="not its row's"):
        open_clip({**row, "frames": 9}, content)
