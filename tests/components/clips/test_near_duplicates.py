"""An import keeps the first of several copies of a video, and counts the others."""

import json
import shutil

import numpy as np
import pytest
from scipy.ndimage import zoom

from components.cli.studio import clips
from components.cli.studio.clips import Query
from components.clips.import_videos import import_folder
from components.pipeline.tables import read_table
from univigu.video import decode_mp4, encode_mp4

OPTIONS = {"licence": "CC0-1.0", "source": "a test", "texts": "prompts"}


def blobs(seed):
    """A smooth, drifting picture, uint8 (9, 32, 32, 3)."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (5, 14))
    wide = zoom(coarse, 8, order=3).clip(0, 255)[:32]
    return (
        np.stack([wide[:, 2 * number : 2 * number + 32] for number in range(9)])[..., None].repeat(3, -1).astype("u1")
    )


@pytest.fixture
def folder(tmp_path):
    """A video, a larger and brighter copy of it in 4:2:0, and another video."""
    larger = np.stack([zoom(frame, (2, 2, 1), order=1) for frame in blobs(0)])
    copy = (0.9 * larger + 25).clip(0, 255).astype(np.uint8)
    files = {
        "a": encode_mp4(blobs(0), 8),
        "copy": encode_mp4(copy, 8, "yuv420p"),
        "other": encode_mp4(blobs(1), 8),
    }
    (tmp_path / "videos").mkdir()
    for name, content in files.items():
        (tmp_path / f"videos/{name}.mp4").write_bytes(content)
        (tmp_path / f"videos/{name}.txt").write_text(f"video {name}")
    return tmp_path / "videos"


@pytest.mark.parametrize("mode", ["score", "enforce"])
def test_a_copy_is_scored_or_quarantined_and_the_first_stays(folder, tmp_path, tiny_wan_folder, profile, mode):
    root = tmp_path / "root"
    shutil.copytree(tiny_wan_folder, root / profile["base"])
    profile["synthesize_videos"]["checks"] = {"near_duplicate": {"mode": mode}}
    profile["import_videos"]["max_rejected_share"] = 1.0
    manifest = import_folder(folder, None, OPTIONS, profile, root)
    rows = {row["prompt"]: json.loads(row["scores"]) for row in read_table(root / "data/clips", "clips").to_pylist()}
    assert "picture_hash" not in str(rows)
    assert "picture_distance" not in rows["video a"]
    assert rows["video other"]["picture_distance"] > 0.25
    (first,) = (row["id"] for row in read_table(root / "data/clips", "clips").to_pylist() if row["prompt"] == "video a")
    if mode == "score":
        assert {prompt: score.get("duplicate_of") for prompt, score in rows.items()} == {
            "video a": None,
            "video copy": first,
            "video other": None,
        }
        assert rows["video copy"]["picture_distance"] < 0.1
        assert (len(rows), manifest["reasons"]) == (3, {})
        return
    assert rows.keys() == {"video a", "video other"}
    assert (manifest["rows_in"], manifest["reasons"]) == (3, {"near_duplicate": 1})
    assert manifest["facts"]["videos"] == {"used": 2, "of": 3}
    (rejected,) = read_table(root / "data/clips", "rejected").to_pylist()
    assert rejected["id"] == "copy.mp4"
    assert "of the bits differ from those of clip" in rejected["detail"]
    assert len(read_table(root / "data/clips", "prompts")) == 2
    (shown,) = clips.find(root, Query("near_duplicate")).clips
    assert (shown["twin"], shown["stored"], shown["prompt"]) == (first, True, "video copy")
    assert decode_mp4(clips.read_clip(root, "copy.mp4"))[0].shape == (9, 32, 32, 3)


@pytest.mark.parametrize("seconds", [1, 3])  # one clip, and several
def test_a_file_with_the_same_bytes_names_the_clip_of_the_other(folder, tmp_path, tiny_wan_folder, profile, seconds):
    root = tmp_path / "root"
    shutil.copytree(tiny_wan_folder, root / profile["base"])
    profile["import_videos"]["max_rejected_share"] = 1.0
    content = encode_mp4(np.concatenate([blobs(0)] * seconds), 8)
    for name in ("a", "copy"):
        (folder / f"{name}.mp4").write_bytes(content)
    import_folder(folder, None, OPTIONS, profile, root)
    (shown,) = clips.find(root, Query("duplicate")).clips
    first = min(row["id"] for row in read_table(root / "data/clips", "clips").to_pylist() if row["prompt"] == "video a")
    assert (shown["twin"], shown["stored"], shown["prompt"]) == (first, False, "")
