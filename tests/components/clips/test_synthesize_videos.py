"""Prompts become checked clips: deterministic, resumable, and without blank ones."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import yaml

from components.clips import synthesize_videos as module
from components.clips.archive import open_clip, read_clips
from components.clips.gate import examine
from components.pipeline.processes import make_parts
from components.pipeline.runner import run_stage
from components.pipeline.tables import read_table
from univigu.errors import ConfigError, GateFailedError, MissingInputError, PreemptedError, UniViGUError

STEP = "synthesize-videos"


@pytest.fixture
def finished(finished_clips, tmp_path):
    """A copy of a work root with the clips made, and their manifest."""
    root, manifest = finished_clips
    return shutil.copytree(root, tmp_path / "copy"), manifest


def snapshot(root):
    home = root / "data/clips"
    return {file.relative_to(home).as_posix(): file.read_bytes() for file in home.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_every_clip_matches_its_row(finished, profile):
    root, manifest = finished
    clips = read_table(root / "data/clips", "clips").to_pylist()
    assert (manifest["rows_in"], len(clips)) == (10, 10)
    assert [clip["prompt_id"] for clip in clips] == [f"p{i:02d}" for i in range(10)]
    assert {clip["generator_digest"] for clip in clips} == {manifest["inputs"]["generator"]}
    assert {clip["stage"] for clip in clips} == {1, 2}
    assert len({clip["seed"] for clip in clips}) == 10
    for clip, content in read_clips(root / "data/clips", clips):
        frames, fps = open_clip(clip, content)
        assert (frames.shape, fps) == ((9, 32, 32, 3), 8.0)
        assert json.loads(clip["scores"])["contrast"] > 0


@pytest.mark.slow
def test_a_run_killed_within_a_shard_loses_one_batch_and_resumes_to_the_same_bytes(
    finished, new_root, profile, monkeypatch
):
    root = new_root("killed")
    batches = root / ".univigu/staging" / STEP / "shards/.00001.batches"
    code = "import json, sys, pathlib; from components.pipeline.runner import run_stage; "
    code += "run_stage(sys.argv[1], json.loads(sys.argv[2]), pathlib.Path(sys.argv[3]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, STEP, json.dumps(profile), str(root)], stderr=subprocess.PIPE
    )
    while not (batches / "0000.json").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert not (root / "data/clips").exists()
    made = (root / ".univigu/staging" / STEP / "shards/00000/clips.tar").stat().st_mtime_ns
    asked = []
    ask = module.map_generated
    monkeypatch.setattr(
        module, "map_generated", lambda use, pipe, rows, *rest: asked.extend(rows) or ask(use, pipe, rows, *rest)
    )
    run_stage(STEP, profile, root)
    assert (root / "data/clips/shards/00000/clips.tar").stat().st_mtime_ns == made
    assert snapshot(root) == snapshot(finished[0])
    assert {row["prompt_id"] for row in asked}.isdisjoint(["p00", "p01", "p02", "p03", "p04"])


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

    def refuse(*_, **__):
        raise AssertionError("the generator was loaded")

    monkeypatch.setattr(module, "load_generator", refuse)
    assert run_stage(STEP, profile, root) == manifest


def test_the_share_of_stage_1_is_kept_and_a_prompt_keeps_its_stage():
    prompts = [{"id": hashlib.sha256(bytes([i % 256, i // 256])).hexdigest()[:12], "text": ""} for i in range(2000)]
    stages = [module.plan_clip(prompt, 0, 0.4)["stage"] for prompt in prompts]
    assert abs(stages.count(1) / 2000 - 0.4) < 0.04
    assert [module.plan_clip(prompt, 0, 0.4)["stage"] for prompt in reversed(prompts)] == stages[::-1]


def blank_base(root, profile):
    """Make the base's autoencoder decode everything to one colour."""
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
    results = examine(videos, [{"id": "a"}, {"id": "b"}], [])
    assert [finding.reason for _, _, finding in results] == [None, "broken"]


@pytest.mark.parametrize(("key", "value"), [("height", 30), ("frames", 10)])
def test_a_size_that_the_base_cannot_make_is_refused(finished, profile, key, value):
    profile["video"][key] = value
    with pytest.raises(ConfigError, match=r"choose sides that are multiples of 16 and 4k \+ 1 frames"):
        run_stage(STEP, profile, finished[0])


def test_an_unknown_check_is_refused(finished, profile):
    profile["synthesize_videos"]["checks"] = {"beauty": {"mode": "score"}}
    with pytest.raises(ConfigError, match="no check 'beauty'"):
        run_stage(STEP, profile, finished[0])


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one_and_no_generator_is_needed_afterwards(
    finished, new_root, profile, monkeypatch
):
    root = new_root("parts")
    (root / "profile.yaml").write_text(yaml.safe_dump(profile))
    make_parts(STEP, str(root / "profile.yaml"), root, 2)
    assert not (root / "data/clips").exists()
    monkeypatch.setattr(module, "load_generator", lambda *_, **__: pytest.fail("the generator was loaded"))
    run_stage(STEP, profile, root)
    assert snapshot(root) == snapshot(finished[0])


def test_a_failing_process_reports_its_error_once_and_keeps_its_exit_code(new_root, profile, capfd):
    root = new_root("failing-parts")
    profile["synthesize_videos"]["checks"] = {"beauty": {"mode": "score"}}
    (root / "profile.yaml").write_text(yaml.safe_dump(profile))
    with pytest.raises(UniViGUError, match="no check 'beauty'") as failure:
        make_parts(STEP, str(root / "profile.yaml"), root, 2)
    assert failure.value.exit_code == ConfigError.exit_code
    assert "beauty" not in capfd.readouterr().err


@pytest.mark.slow
def test_sigterm_also_stops_the_processes(new_root, profile):
    root = new_root("stopped-parts")
    (root / "profile.yaml").write_text(yaml.safe_dump(profile))
    command = [sys.executable, "-m", "components.cli.main", "run", STEP, "--processes", "2"]
    where = ["--root", str(root), "--profile", str(root / "profile.yaml")]
    with subprocess.Popen([*command, *where], stderr=subprocess.PIPE, text=True) as process:
        while len(children := psutil.Process(process.pid).children()) < 2 and process.poll() is None:
            time.sleep(0.05)
        process.terminate()
        assert "received SIGTERM; run it again" in process.stderr.read()
    assert process.returncode == PreemptedError.exit_code
    assert not any(child.is_running() for child in children)


def test_scores_are_kept_of_clips_that_pass(new_root, profile):
    root = new_root("scored")
    settings = profile["synthesize_videos"]
    settings.update(clips=2)
    settings["checks"]["motion"]["mode"] = settings["checks"]["flicker"]["mode"] = "score"
    run_stage(STEP, profile, root)
    clips = read_table(root / "data/clips", "clips").to_pylist()
    kept = {"contrast", "smoothness", "motion", "flicker", "displacement"}
    assert [set(json.loads(clip["scores"])) for clip in clips] == [kept] * 2


def test_the_error_for_a_missing_base_has_the_command_that_fetches_it(new_root, profile):
    profile["generator"] = "model/Wan2.1-T2V-14B-Diffusers"
    with pytest.raises(MissingInputError, match=r"`univigu fetch Wan-AI/Wan2\.1-T2V-14B-Diffusers --to "):
        run_stage(STEP, profile, new_root("unfetched"))
