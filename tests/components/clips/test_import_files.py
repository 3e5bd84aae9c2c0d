"""No link out of an imported folder is followed, and files that can't be opened are reported with a reason."""

import os
import socket

import pytest

from components.clips.import_files import VIDEOS, list_videos
from components.clips.import_texts import Texts, read_texts
from univigu.errors import MissingInputError


@pytest.fixture
def folder(tmp_path):
    """A folder with two videos, beside a private folder."""
    for name in ("mine/a.mp4", "mine/deep/b.MOV", "theirs/secret.mp4", "theirs/more/c.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "theirs/secret.txt").write_text("a secret text")
    return tmp_path / "mine"


def reasons(faults):
    return {name: reason for name, (reason, _) in faults.items()}


def test_videos_are_found_by_their_names_in_every_folder_but_hidden_ones(folder):
    for name in (".hidden.mp4", ".trash/d.mp4", "note.txt", "e.webm/f.mp4"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    assert list_videos(folder) == (["a.mp4", "deep/b.MOV", "e.webm/f.mp4"], {})
    assert {".gif", ".ts", ".wmv", ".mp4"} <= VIDEOS


def test_a_link_out_of_the_folder_is_named_and_not_followed(folder):
    links = {
        "file.mp4": "../theirs/secret.mp4",
        "absolute.mp4": str(folder.parent / "theirs/secret.mp4"),
        "deep/up.mp4": "../../theirs/secret.mp4",
        "all": "../theirs",
        "over.mp4": "all/secret.mp4",  # in the middle of the path
        "twice.mp4": "over.mp4",
        "parent": "..",
        "broken.mp4": "nothing.mp4",
        "broken-out.mp4": "../nothing.mp4",
        "loop.mp4": "loop.mp4",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    names, faults = list_videos(folder)
    assert names == ["a.mp4", "deep/b.MOV"]
    broken = {"broken.mp4", "broken-out.mp4", "loop.mp4"}
    assert reasons(faults) == {name: "broken_link" if name in broken else "outside" for name in links}


def test_a_link_within_the_folder_is_another_name_and_link_cycles_end(folder):
    (folder / "again.mp4").symlink_to("deep/b.MOV")
    (folder / "circle").symlink_to(".")
    (folder / "deep/back").symlink_to("..")
    assert list_videos(folder) == (["a.mp4", "again.mp4", "deep/b.MOV"], {})


def test_pipes_sockets_and_devices_are_not_opened(folder):
    os.mkfifo(folder / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)  # a socket's path must be short
        try:
            server.bind("socket.mp4")
        finally:
            os.chdir(here)
    (folder / "link.mp4").symlink_to("pipe.mp4")
    (folder / "device.mp4").symlink_to("/dev/zero")
    names, faults = list_videos(folder)
    assert names == ["a.mp4", "deep/b.MOV"]
    assert reasons(faults) == {
        "pipe.mp4": "not_a_file",
        "socket.mp4": "not_a_file",
        "link.mp4": "not_a_file",
        "device.mp4": "outside",
    }


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    (tmp_path / "way").symlink_to("mine")
    (folder / "out.mp4").symlink_to("../theirs/secret.mp4")
    names, faults = list_videos(tmp_path / "way")
    assert (names, reasons(faults)) == (["a.mp4", "deep/b.MOV"], {"out.mp4": "outside"})


def test_a_text_or_a_table_that_is_a_link_out_of_the_folder_is_not_read(folder):
    (folder / "a.txt").symlink_to("../theirs/secret.txt")
    os.mkfifo(folder / "deep/b.txt")
    texts, faults = read_texts(folder, ["a.mp4", "deep/b.MOV"], None)
    assert texts == {}
    assert [(fault.id, fault.reason) for fault in faults] == [("a.mp4", "outside"), ("deep/b.MOV", "not_a_file")]
    (folder.parent / "theirs/all.csv").write_text("file_name,text\na.mp4,a secret text\n")
    (folder / "metadata.csv").symlink_to("../theirs/all.csv")
    (folder / "a.txt").unlink()
    (folder / "a.txt").write_text("its own text")
    texts, faults = read_texts(folder, ["a.mp4"], None)
    assert texts == {"a.mp4": Texts("its own text", "")}
    assert [(fault.id, fault.reason) for fault in faults] == [("metadata.csv", "outside")]
    assert read_texts(folder, ["a.mp4"], folder / "metadata.csv")[0] == {
        "a.mp4": Texts("a secret text", "")
    }  # asked for


def test_a_folder_without_any_video_is_an_error(tmp_path):
    for folder, message in ((tmp_path, "no video in"), (tmp_path / "none", "no folder")):
        with pytest.raises(MissingInputError, match=message):
            list_videos(folder)
