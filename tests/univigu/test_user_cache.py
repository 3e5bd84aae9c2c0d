"""What is kept for later processes is found again whole, or not at all."""

import os

import pytest

from univigu.user_cache import keep, read_kept


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/univigu"


@pytest.mark.parametrize("content", [b"", b"tables", b"\n\n", bytes(range(256)) * 4000])
def test_what_is_kept_is_found_under_its_name_and_stamp_only(content):
    keep("tables", b"1", content)
    assert read_kept("tables", b"1") == content
    assert read_kept("tables", b"2") is None
    assert read_kept("others", b"1") is None


@pytest.mark.parametrize("damage", [lambda kept: b"", lambda kept: kept[:-1], lambda kept: b"0" + kept[1:]])
def test_damaged_bytes_are_not_found_and_are_replaced(cache, damage):
    keep("tables", b"1", b"content")
    file = cache / "tables"
    file.write_bytes(damage(file.read_bytes()))
    assert read_kept("tables", b"1") is None
    keep("tables", b"1", b"content")
    assert read_kept("tables", b"1") == b"content"


def test_a_pipe_in_place_of_a_file_is_not_waited_for(cache):
    cache.mkdir(parents=True)
    os.mkfifo(cache / "tables")
    assert read_kept("tables", b"1") is None


@pytest.mark.parametrize("place", ["taken/by a file", "/" + "x" * 300, "relative"])
def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch, place):
    (tmp_path / "taken").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/{place}" if "/" in place else place)
    keep("tables", b"1", b"content")
    assert read_kept("tables", b"1") is None
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
