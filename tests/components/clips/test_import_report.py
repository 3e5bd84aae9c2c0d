"""What an import says about videos, before and after it."""

import csv
import json
import shutil

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from components.cli.main import app
from components.pipeline.tables import read_table
from small_videos import write_video


@pytest.fixture
def root(tmp_path, tiny_wan_folder, profile):
    shutil.copytree(tiny_wan_folder, tmp_path / "root" / profile["base"])
    return tmp_path / "root"


@pytest.fixture
def profile(profile):
    for check in profile["synthesize_videos"]["checks"].values():
        check["mode"] = "off"
    profile["import_videos"]["max_rejected_share"] = 1.0
    return profile


def import_command(folder, root, profile):
    """The arguments that import a folder whose texts are prompts."""
    file = folder / ".profile.yaml"
    file.write_text(yaml.safe_dump(profile))
    where = ["--profile", str(file), "--root", str(root)]
    return ["data", "import", str(folder), "--licence", "CC0-1.0", "--source", "x", "--texts", "prompts", *where]


def test_a_dry_run_names_what_would_become_of_each_video_and_imports_nothing(root, profile, tmp_path):
    folder = tmp_path / "videos"
    write_video(folder / "long.mp4", np.arange(54) / 16, 32, 48)
    write_video(folder / "short.mp4", np.arange(3) / 8)
    for name in ("long", "short"):
        (folder / f"{name}.txt").write_text(name)
    write_video(folder / "silent.mp4", np.arange(9) / 8)
    call = [*import_command(folder, root, profile), "--table", str(tmp_path / "new/table.csv")]
    done = CliRunner().invoke(app, [*call, "--dry-run"])
    assert "Used 1 of 3 videos, because: no_text 1, too_short 1\n" in done.output
    assert "They would become 3 clips; sizes by videos: 9x32x32 1\n" in done.output
    assert "In no clip" not in done.output
    assert not (root / "data").exists()
    with (tmp_path / "new/table.csv").open(newline="") as stream:
        long, short, silent = csv.DictReader(stream)
    kept = ("file", "frames", "rate", "seconds", "height", "width", "clips", "bucket", "speed", "cut_off", "reason")
    expected = ["long.mp4", "54", "16.00", "3.375", "32", "48", "3", "9x32x32", "1", "0.333", ""]
    assert [long[name] for name in kept] == expected
    assert [(row["file"], row["frames"], row["clips"], row["reason"]) for row in (short, silent)] == [
        ("short.mp4", "3", "0", "too_short"),
        ("silent.mp4", "", "0", "no_text"),
    ]
    assert CliRunner().invoke(app, call).exit_code == 0
    assert len(read_table(root / "data/clips", "clips")) == int(long["clips"])
    assert set(read_table(root / "data/clips", "rejected")["reason"].to_pylist()) == {short["reason"], silent["reason"]}


def test_the_speed_of_a_squeezed_clip_is_recorded(root, profile, tmp_path):
    folder = tmp_path / "videos"
    for name, seconds in {"same": 9 / 8, "fast": 27 / 8, "slow": 7 / 8}.items():
        write_video(folder / f"{name}.mp4", np.arange(round(seconds * 8)) / 8, dark=0)
        (folder / f"{name}.txt").write_text(name)
    done = CliRunner().invoke(app, [*import_command(folder, root, profile), "--take", "squeeze"])
    rows = read_table(root / "data/clips", "clips").to_pylist()
    assert {row["prompt"]: json.loads(row["scores"])["speed"] for row in rows} == {
        "same": 1.0,
        "fast": 3.0,
        "slow": 0.778,
    }
    assert "Clips that play faster than their videos: 1, up to 3 times as fast" in done.output
    assert "Clips that play slower than their videos: 1, up to 0.778 times as fast" in done.output
