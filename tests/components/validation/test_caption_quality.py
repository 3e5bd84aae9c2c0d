"""validate-pairs lets an independent reader compare captions with their videos, if the profile asks for it."""

import csv
import json
import shutil

import numpy as np
import pytest

from components.cli import edits
from components.clips.import_videos import import_folder
from components.digits import world
from components.pipeline.runner import run_stage
from components.pipeline.tables import read_table
from univigu.errors import BadInputError, MissingInputError
from univigu.video import encode_mp4

RIGHT, WRONG, STAGE_1 = 8, 4, 4
OPTIONS = {"licence": "CC0-1.0", "source": "a test", "texts": "captions"}


@pytest.fixture
def profile(profile):
    profile["import_videos"]["max_rejected_share"] = profile["validate_data"]["max_rejected_share"] = 1.0
    profile["validate_data"].update(min_rows=1, caption_checks=[], heldout_share=0.1)
    profile["synthesize_videos"]["checks"] = {}
    return profile


@pytest.fixture
def root(tmp_path, profile, tiny_wan_folder):
    """Imported clips of the toy dataset, some with the caption of another clip; validated."""
    root, videos = tmp_path / "root", tmp_path / "videos"
    shutil.copytree(tiny_wan_folder, root / profile["base"])
    rng = np.random.default_rng(0)
    shown = [world.sample_attributes(rng) for _ in range(RIGHT + WRONG + STAGE_1)]
    told = [*shown[:RIGHT], *np.roll(np.array(shown[RIGHT : RIGHT + WRONG], object), 1), *shown[RIGHT + WRONG :]]
    videos.mkdir()
    rows = []
    for number, frames in enumerate(world.render(shown, world.draw_scans(shown, world.heldout_scans(), 3), 3)):
        (videos / f"{number:02d}.mp4").write_bytes(encode_mp4(frames, 8))
        caption = world.write_plain_caption(told[number])
        stage = 2 if number < RIGHT + WRONG else 1
        rows.append({"file_name": f"{number:02d}.mp4", "prompt": f"clip {number}", "caption": caption, "stage": stage})
    with (videos / "metadata.csv").open("w") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    import_folder(videos, None, OPTIONS, profile, root)
    for step in ("validate-prompts", "validate-clips"):
        run_stage(step, profile, root)
    return root


def wrong(root):
    """The ids of the clips with the caption of another one."""
    rows = read_table(root / "data/clips", "clips").to_pylist()
    return {row["id"] for row in rows if RIGHT <= int(row["prompt"].removeprefix("clip ")) < RIGHT + WRONG}


@pytest.mark.slow
def test_captions_of_other_clips_are_scored_and_quarantined_as_the_profile_says(root, profile):
    plain = run_stage("validate-pairs", profile, root)
    assert not (root / "data/pairs/caption_quality.json").exists()
    profile["validate_data"]["caption_quality"] = {"mode": "score", "least": 0.8}
    scored = run_stage("validate-pairs", profile, root)
    assert (scored["rows_out"], scored["reasons"]) == (plain["rows_out"], {}) == (RIGHT + WRONG + STAGE_1, {})
    facts = scored["facts"]["caption_quality"]
    assert (facts["reader"], facts["captions"], facts["below"]) == ("recogniser", RIGHT + WRONG, WRONG)
    scores = json.loads((root / "data/pairs/caption_quality.json").read_text())
    assert {clip for clip, score in scores.items() if score < 0.8} == wrong(root)

    profile["validate_data"]["caption_quality"]["mode"] = "enforce"
    assert run_stage("validate-pairs", profile, root)["reasons"] == {"caption_quality": WRONG}
    rejected = read_table(root / "data/pairs", "rejected").to_pylist()
    assert {row["id"].removeprefix("2-") for row in rejected} == wrong(root)
    clip = edits.open_clip(root, min(scores.keys() - wrong(root)))
    with pytest.raises(BadInputError, match="would reject this caption as 'caption_quality'"):
        edits.propose_caption(root, profile, clip, edits.open_clip(root, min(wrong(root))).caption, "a test")


@pytest.mark.slow
def test_a_clip_model_reads_captions_and_a_missing_one_is_named(root, profile, clip_folder):
    profile["validate_data"]["caption_quality"] = {"mode": "score", "model": "model/clip", "least": 1.0}
    with pytest.raises(MissingInputError, match="no folder 'model/clip' under"):
        run_stage("validate-pairs", profile, root)
    shutil.copytree(clip_folder, root / "model/clip")
    facts = run_stage("validate-pairs", profile, root)["facts"]["caption_quality"]
    assert (len(facts["reader"]), facts["captions"], facts["below"]) == (64, RIGHT + WRONG, RIGHT + WRONG)
    assert -1 <= facts["mean"] < 1  # its weights are random
