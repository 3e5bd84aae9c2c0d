"""Captions that don't fit their clips are found before anything is trained on them."""

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from components.bench.caption_quality import _by_recogniser, measure_captions
from components.cli.main import app
from components.clips.import_videos import import_folder
from components.digits import world
from univigu.errors import ConfigError
from univigu.video import encode_mp4

RIGHT, WRONG = 8, 4


@pytest.fixture
def root(tmp_path, profile, tiny_wan_folder):
    """Clips of the toy dataset, of which the last ones have captions about another clip."""
    profile["synthesize_videos"].update(checks={}, stage_1_share=0.0)
    shutil.copytree(tiny_wan_folder, tmp_path / "root" / profile["base"])
    rng = np.random.default_rng(0)
    attributes = [world.sample_attributes(rng) for _ in range(RIGHT + WRONG)]
    clips = world.render(attributes, world.draw_scans(attributes, world.heldout_scans(), 3), 3)
    told = [*attributes[:RIGHT], *np.roll(np.array(attributes[RIGHT:], object), 1)]
    (tmp_path / "videos").mkdir()
    for number, (frames, one) in enumerate(zip(clips, told, strict=True)):
        (tmp_path / f"videos/{number:02d}.mp4").write_bytes(encode_mp4(frames, 8))
        (tmp_path / f"videos/{number:02d}.txt").write_text(world.write_plain_caption(one))
    options = {"licence": "CC0-1.0", "source": "a test", "texts": "captions"}
    assert import_folder(tmp_path / "videos", None, options, profile, tmp_path / "root")["rows_out"] == RIGHT + WRONG
    return tmp_path / "root", {world.write_plain_caption(one) for one in told[RIGHT:]}


@pytest.mark.slow
def test_the_recogniser_finds_captions_of_other_clips_and_the_command_reports_them(root):
    root, wrong = root
    done = CliRunner().invoke(app, ["data", "score-captions", "--root", str(root)])
    assert done.exception is None
    found = json.loads((root / "reports/caption-quality.json").read_text())
    assert (found["reader"], found["captions"]) == ("recogniser", RIGHT + WRONG)
    assert {line["caption"] for line in found["lowest"][:WRONG]} == wrong
    assert found["lowest"][WRONG]["score"] > 0.8
    assert 0.5 < found["quality"]["low"] <= found["quality"]["value"] < 0.95
    assert measure_captions(root, None, 5)["captions"] == 5


@pytest.mark.slow
def test_a_clip_model_scores_each_clip_by_similarity_and_all_by_retrieval(root, clip_folder):
    found = measure_captions(root[0], clip_folder, 500)
    assert (found["reader"], found["captions"], found["quality"]["n"]) == ("clip", RIGHT + WRONG, RIGHT + WRONG)
    assert -1 <= found["lowest"][0]["score"] < found["mean_score"] <= 1
    assert 0 <= found["quality"]["value"] < 1  # the weights are random


def test_clips_of_another_size_need_a_model(tmp_path):
    with pytest.raises(ConfigError, match="name the folder of a CLIP-like model with --clip"):
        _by_recogniser(tmp_path, [{"frames": 9, "height": 64, "width": 32}])
