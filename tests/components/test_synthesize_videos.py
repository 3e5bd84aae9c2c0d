"""Prompts become checked clips: the same each time, resumable, and none that shows nothing."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from components import synthesize_videos as module
from components.pipeline.runner import run_stage
from components.pipeline.tables import read_table
from components.videos import open_clip, read_clips
from univigu.errors import ConfigError, GateFailedError

STEP = "synthesize-videos"


@pytest.fixture
def finished(finished_clips, tmp_path):
    """A copy of a work root with the clips made, and their manifest."""
    root, manifest = finished_clips
    return shutil.copytree(root, tmp_path / "copy"), manifest


def snapshot(root):
    home = root / "data/clips"
    return {file.relative_to(home).as_posix(): file.read_bytes() for file in home.rglob("*") if file.is_file()}


def test_every_clip_is_what_its_row_says(finished, profile):
    root, manifest = finished
    clips = read_table(root / "data/clips", "clips").to_pylist()
    assert (manifest["rows_in"], len(clips)) == (10, 10)
    assert [clip["prompt_id"] for clip in clips] == [f"p{i:02d}" for i in range(10)]
    assert {clip["generator_digest"] for clip in clips} == {manifest["inputs"]["base"]}
    assert {clip["stage"] for clip in clips} == {1, 2}
    assert len({clip["seed"] for clip in clips}) == 10
    for clip, content in read_clips(root / "data/clips", clips):
        frames, fps = open_clip(clip, content)
        assert (frames.shape, fps) == ((9, 32, 32, 3), 8.0)
        assert json.loads(clip["scores"])["contrast"] > 0


def test_killed_after_a_shard_and_run_again_it_ends_with_the_same_bytes(finished, new_root, profile):
    root = new_root("killed")
    code = "import json, sys, pathlib; from components.pipeline.runner import run_stage; "
    code += "run_stage(sys.argv[1], json.loads(sys.argv[2]), pathlib.Path(sys.argv[3]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, STEP, json.dumps(profile), str(root)], stderr=subprocess.PIPE
    )
    first = root / ".univigu/staging" / STEP / "shards/00000"
    while not (root / ".univigu/shards" / STEP / "00000.json").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert not (root / "data/clips").exists()
    made = (first / "clips.tar").stat().st_mtime_ns
    run_stage(STEP, profile, root)
    assert (root / "data/clips/shards/00000/clips.tar").stat().st_mtime_ns == made
    assert snapshot(root) == snapshot(finished[0])


def test_a_corrupt_shard_is_made_again_and_the_others_are_not(finished, profile):
    root, _ = finished
    home = root / "data/clips"
    before = snapshot(root)
    kept = (home / "shards/00000/clips.tar").stat().st_mtime_ns
    corrupt = bytearray((home / "shards/00001/clips.tar").read_bytes())
    corrupt[700] ^= 1
    (home / "shards/00001/clips.tar").write_bytes(corrupt)
    run_stage(STEP, profile, root)
    assert snapshot(root) == before
    assert (home / "shards/00000/clips.tar").stat().st_mtime_ns == kept


def test_with_every_shard_finished_the_generator_is_not_loaded(finished, profile, monkeypatch):
    root, manifest = finished

    def refuse(*_):
        raise AssertionError("the generator was loaded")

    monkeypatch.setattr(module, "load_generator", refuse)
    assert run_stage(STEP, profile, root) == manifest


def test_a_clip_does_not_depend_on_its_batch(tiny_wan_folder, profile):
    pipeline = module.load_generator(tiny_wan_folder, "fp32")
    rows = [module.plan_clip({"id": f"p{i}", "text": f"a red digit {i}"}, 0, 0.5) for i in range(3)]
    together = module.generate(pipeline, rows, profile["video"], profile["synthesize_videos"], 32)
    alone = module.generate(pipeline, rows[1:2], profile["video"], profile["synthesize_videos"], 32)
    np.testing.assert_allclose(alone[0], together[1], atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.05


def test_the_share_of_stage_1_is_kept_and_a_prompt_keeps_its_stage():
    prompts = [{"id": hashlib.sha256(bytes([i % 256, i // 256])).hexdigest()[:12], "text": ""} for i in range(2000)]
    stages = [module.plan_clip(prompt, 0, 0.4)["stage"] for prompt in prompts]
    assert abs(stages.count(1) / 2000 - 0.4) < 0.04
    assert [module.plan_clip(prompt, 0, 0.4)["stage"] for prompt in reversed(prompts)] == stages[::-1]


def blank_base(root, profile):
    """Let the base's autoencoder decode everything to one colour."""
    from safetensors.torch import load_file, save_file

    path = root / profile["base"] / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_out.weight"].zero_()
    save_file(tensors, path, metadata={"format": "pt"})


def test_blank_clips_are_quarantined_and_too_many_of_them_fail_the_step(new_root, profile):
    root = new_root("blank")
    blank_base(root, profile)
    profile["synthesize_videos"]["clips"] = 4
    manifest = run_stage(STEP, profile, root)
    assert (manifest["rows_out"], manifest["reasons"]) == (0, {"blank": 4})
    rejected = read_table(root / "data/clips", "rejected").to_pylist()
    assert json.loads(rejected[0]["row"])["prompt"]
    profile["synthesize_videos"]["max_rejected_share"] = 0.5
    with pytest.raises(GateFailedError, match=r"rejected 4 of 4 rows.*blank 4"):
        run_stage(STEP, profile, root)


def test_a_clip_that_is_not_finite_is_broken(profile):
    videos = np.random.default_rng(0).random((2, 3, 8, 8, 3))
    videos[1, 2, 0, 0, 0] = np.nan
    results = module.examine(videos, [{"id": "a"}, {"id": "b"}], [])
    assert [finding.reason for _, _, finding in results] == [None, "broken"]


@pytest.mark.parametrize(("key", "value"), [("height", 30), ("frames", 10)])
def test_a_size_that_the_base_cannot_make_is_refused(finished, profile, key, value):
    profile["video"][key] = value
    with pytest.raises(ConfigError, match=r"choose sides that are multiples of 16 and 4k \+ 1 frames"):
        run_stage(STEP, profile, finished[0])


def test_an_unknown_check_or_precision_is_refused(finished, profile):
    profile["synthesize_videos"]["precision"] = "int4"
    with pytest.raises(ConfigError, match="no precision 'int4'; choose one of fp32, bf16"):
        run_stage(STEP, profile, finished[0])
    profile["synthesize_videos"]["checks"] = ["beauty"]
    with pytest.raises(ConfigError, match="no check 'beauty'"):
        run_stage(STEP, profile, finished[0])
