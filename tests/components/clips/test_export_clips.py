"""Exported clips are imported again as they were, whatever the layout."""

import csv
import json
import shutil
import tarfile

import numpy as np
import pytest

from components.clips import export_clips as module
from components.clips.export_clips import TARGETS, export_clips
from components.clips.import_videos import import_folder
from components.pipeline.tables import read_table
from small_videos import write_video
from univigu.errors import ConfigError, MissingInputError

OPTIONS = {"licence": "CC0-1.0", "source": "a test", "texts": "captions"}
CAPTION = "A red five moves slowly to the right, and its background stays as dark as it was at the start, number {}."


def contents(root):
    """What a clip is: the digest of its bytes, its texts and its stage."""
    captions = {row["clip_id"]: row["text"] for row in read_table(root / "data/captions", "captions").to_pylist()}
    clips = read_table(root / "data/clips", "clips").to_pylist()
    return {(row["sha256"], row["prompt"], row["stage"], captions[row["id"]]) for row in clips}


@pytest.fixture
def profile(profile):
    for check in profile["synthesize_videos"]["checks"].values():
        check["mode"] = "off"
    profile["text"]["caption_tokens"] = [8, 400]
    return profile


@pytest.fixture
def make_root(tmp_path, profile, tiny_wan_folder):
    def make(name):
        shutil.copytree(tiny_wan_folder, tmp_path / name / profile["base"])
        return tmp_path / name

    return make


@pytest.mark.slow
def test_an_export_is_imported_again_as_the_same_clips_and_texts(tmp_path, profile, make_root, monkeypatch):
    monkeypatch.setattr(module, "PER_TAR", 3)
    videos = tmp_path / "videos"
    for number in range(4):
        write_video(videos / f"{number}.mp4", np.arange(9 if number else 27) / 8, dark=20 * number)
    rows = [f'{number}.mp4,"{CAPTION.format(number)}",prompt {number},{1 + number % 2}' for number in range(3)]
    (videos / "metadata.csv").write_text("\n".join(["file_name,caption,prompt,stage", *rows, '3.mp4,,"ein Wort, é",']))
    import_folder(videos, None, OPTIONS, profile, make_root("root"))
    first = contents(tmp_path / "root")
    assert len(first) == 6
    assert {stage for _, _, stage, _ in first} == {1, 2}
    for target in TARGETS:
        assert export_clips(tmp_path / "root", target, tmp_path / target) == 6
        manifest = import_folder(tmp_path / target, None, OPTIONS, profile, make_root(f"again-{target}"))
        assert (manifest["rows_in"], manifest["rows_out"]) == (6, 6)
        assert contents(tmp_path / f"again-{target}") == first
    check_layouts(tmp_path)


def check_layouts(folder):
    """Other tools find what they expect, with where each clip comes from."""
    with (folder / "folder/metadata.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    lines = [json.loads(line) for line in (folder / "hf/metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == [line["file_name"] for line in lines]
    assert {(line["licence"], line["source"]) for line in lines} == {("CC0-1.0", "a test")}
    assert sorted(line["start"] for line in lines) == [0, 0, 0, 0, 1.125, 2.25]
    assert len({line["parent_sha256"] for line in lines}) == 4
    names = [sorted(path.name for path in (folder / "webdataset").iterdir())]
    assert names == [["clips-000000.tar", "clips-000001.tar"]]
    with tarfile.open(folder / "webdataset/clips-000000.tar") as archive:
        found = archive.getnames()
    assert len(found) == 9
    assert [name.partition(".")[2] for name in found[:3]] == ["json", "mp4", "txt"]
    key = found[0].partition(".")[0]
    texts = {line["file_name"]: line.get("caption") or line["prompt"] for line in lines}
    assert (folder / f"folder/{key}.txt").read_text() == texts[f"{key}.mp4"]


def test_an_export_replaces_nothing_and_leaves_nothing_of_a_failure(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    with pytest.raises(ConfigError, match="full is not an empty folder"):
        export_clips(tmp_path, "hf", tmp_path / "full")
    with pytest.raises(ConfigError, match="'zip' is not a layout to export to; choose one of folder, webdataset, hf"):
        export_clips(tmp_path, "zip", tmp_path / "new")
    with pytest.raises(MissingInputError):
        export_clips(tmp_path, "hf", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
