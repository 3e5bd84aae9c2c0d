"""A killed study resumes at the step where it was, a failing arm leaves the others, and equal trainings are shared."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from components.bench.study import results
from components.bench.study.arms import DATA, Study, arm_profile, data_profile, load_study, write_profile
from components.bench.study.gallery import read_gallery
from components.bench.study.probes import caption_one, caption_until_sure
from components.bench.study.run import read_failure, run_study, study_folder, with_random_weights
from components.digits import world
from components.digits.benchmark import load_heldout, render
from components.pipeline.manifests import describe_files, files_digest, write_manifest
from components.pipeline.profiles import load_profile
from components.pipeline.runner import IMPORTED
from components.pipeline.stages import find_stage
from components.pipeline.tables import write_table
from univigu.files import file_sha256
from univigu.pipeline import UniViGUPipeline

HELDOUT = Path(__file__).parents[4] / "data" / "heldout.json"
TRAINED = "data/{}/manifest.json"
ARMS = {
    "profile": "smoke",
    "reference": "recipe",
    "settings": {
        "evaluate_model.captions": 2,
        "evaluate_model.generations": 2,
        "evaluate_model.joint": 2,
        "evaluate_model.compared_caption_steps": [],
        "train_stage_*.samples_every": 0,
    },
    "budgets": {
        "short": {
            "seeds": [0],
            "settings": {
                "train_stage_*.steps": 2,
                "train_stage_*.batch_size": 2,
                "train_stage_*.heldout_every": 2,
                "train_stage_*.checkpoint_every": 1,
            },
        }
    },
    "arms": [
        {"name": "recipe", "family": "headline", "question": "How well?"},
        {
            "name": "broken",
            "family": "prior",
            "question": "What if nothing fits?",
            "settings": {"train_stage_2.freeze": ["nothing.*"]},
        },
    ],
    "probes": [
        {"name": "plain", "family": "cost", "question": "What does it cost?", "videos": 2},
        {
            "name": "short-clips",
            "family": "video_tokens",
            "question": "And less to see?",
            "against": "plain",
            "frames": 5,
            "size": 16,
            "steps": [1, 3],
            "entropy": 100.0,
        },
    ],
}


def import_data(folder, study):
    """Leave outputs of all steps before training as `univigu data import` does: steps that are not made again."""
    import torch

    from univigu.training.data import write_empty_prompt, write_latents

    values = load_profile(str(write_profile(folder / "profile.yaml", data_profile(study))))
    generator, length = torch.Generator().manual_seed(0), values["text"]["caption_tokens"][1]
    ids = torch.randint(4, 60, (12, length), generator=generator)
    ids[:, 20], ids[:, 21:] = 1, 0
    latents = folder / find_stage("encode-latents").home
    write_latents(
        latents / "shards/00000/latents.safetensors",
        latents=torch.randn(12, 4, 3, 8, 8, generator=generator),
        prompt_embeds=[torch.randn(5, 32, generator=generator) for _ in range(12)],
        prompt_ids=ids,
        target_ids=ids,
    )
    write_empty_prompt(latents, torch.randn(1, 32, generator=generator))
    size = {"frames": world.FRAMES, "height": world.SIZE, "width": world.SIZE}
    digests = dict.fromkeys(("video_sha256", "vae_digest", "tokenizer_digest"), "0")
    where = {"shard": "shards/00000/latents.safetensors", **size, **digests}
    rows = [
        {"id": f"s{row:02d}", "stage": 1 + row % 2, "split": "heldout" if row >= 8 else "train", "row": row, **where}
        for row in range(12)
    ]
    write_table(latents, "latents", rows)
    for step in DATA:
        home = folder / find_stage(step).home
        home.mkdir(parents=True, exist_ok=True)
        write_table(home, "rejected", [])
        files = describe_files(home)
        counts = {"rows_in": 12, "rows_out": 12, "quarantined": 0, "reasons": {}}
        write_manifest(home, {"step": f"{IMPORTED}{step}", "digest": files_digest(files), "files": files, **counts})


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_wan_folder):
    """A work root with a random base and the shared data of the study in ``arms.yaml``."""
    root = tmp_path_factory.mktemp("study")
    shutil.copytree(tiny_wan_folder, root / "model/tiny-wan")
    (root / "data/prompts").mkdir(parents=True)
    shutil.copy(HELDOUT, root / "data/heldout.json")
    (root / "arms.yaml").write_text(yaml.safe_dump(ARMS))
    study = load_study(root / "arms.yaml")
    import_data(study_folder(root, study) / "data", study)
    return root


def stage_1(folder):
    """The finished outputs of stage 1, each once, although work roots share them by hard links."""
    return {path.stat().st_ino: path for path in folder.glob("trained/*/data/stage1/manifest.json")}


def wait_for(process, happened):
    while not happened():
        assert process.poll() is None, "the study ended before it was killed"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_study_resumes_where_it_was_and_a_failing_arm_is_named_while_the_rest_stands(root):
    command = [sys.executable, "-m", "components.cli.main", "study", "run", "--jobs", "1", "--arms", "arms.yaml"]
    log = root / "output.txt"
    with log.open("w") as stream:
        killed = subprocess.Popen(command, cwd=root, stdout=stream, stderr=stream)
    study = load_study(root / "arms.yaml")
    folder = study_folder(root, study)
    wait_for(killed, lambda: stage_1(folder))
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    (before,) = stage_1(folder).values()
    made = (before.stat().st_ino, before.stat().st_mtime_ns)
    assert not list(folder.glob("arms/*/reports/manifest.json"))

    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 70, done.stderr
    assert "recipe 0 | train-stage-1: finished" in done.stderr
    (after,) = stage_1(folder).values()  # made once, for both arms
    assert (after.stat().st_ino, after.stat().st_mtime_ns) == made

    last = done.stderr[done.stderr.rindex("univigu: ") :]
    assert "1 of 2 arms failed" in last
    assert "broken, seed 0: `freeze` has 'nothing.*', which matches no weight" in last
    report = json.loads((root / results.REPORT).read_text())
    assert report.keys() == {"about", "headline", "cost", "video_tokens"}
    assert report["headline"]["recipe"]["captions"].keys() == {"value", "low", "high", "n", "seeds"}
    assert report["headline"]["recipe"]["captions"]["n"] == 2
    assert "nothing.*" in report["about"]["arms"]["broken"]["failures"]["0"]
    assert "nothing.*" in (root / "reports/study.html").read_text()
    assert "recipe" in done.stdout

    # probes measure the same model, and make what the page shows
    check_probes(report)
    assert {row["task"] for row in read_gallery(folder / "arms/recipe-short-0")} == {"captions", "generation", "joint"}
    assert (root / "reports/study.html").read_text().count("<video") == 6

    # a second run verifies what is there, and makes nothing again
    probed = folder / "arms/recipe-short-0/probes/plain.json"
    before = probed.stat().st_mtime_ns
    assert [one.failure for one in run_study(study, "short", [study.find("recipe")], root)] == [""]
    arm = folder / "arms/recipe-short-0"
    assert results.is_finished(arm, arm_profile(study, study.find("recipe"), "short", 0, "model/tiny-wan"))
    assert read_failure(arm) == ""
    assert probed.stat().st_mtime_ns == before

    # of a model that is never sure, a caption takes all steps, and is that of so many steps
    (item,) = load_heldout(HELDOUT)["captions"][:1]
    pipeline, (frames,) = UniViGUPipeline.from_pretrained(arm / "data/stage2/model"), render([item])
    pipeline.set_progress_bar_config(disable=True)
    assert caption_until_sure(pipeline, item, frames, 3, 1e-9) == (caption_one(pipeline, item, frames, 3), 3)

    # figures are only of the declared settings, and of files that are intact
    changed = study.model_dump()
    changed["budgets"]["short"]["settings"]["train_stage_1.batch_size"] = 4
    assert results.read_arm(Study(**changed), study.find("recipe"), "short", root).tasks == {}
    items = arm / "reports/items.parquet"
    items.write_bytes(items.read_bytes()[:-1])
    assert results.read_arm(study, study.find("recipe"), "short", root).tasks == {}


def check_probes(report):
    plain, short = report["cost"]["plain"], report["video_tokens"]["short-clips"]
    assert plain["captions"]["value"] == report["headline"]["recipe"]["captions"]["value"]
    assert short["steps_per_caption_until_sure"]["value"] == 1.0  # at so high an entropy, it is sure at once
    assert short["operations_per_caption"]["value"] < plain["operations_per_caption"]["value"] / 2
    assert short["operations_per_caption_in_1_steps"]["value"] < short["operations_per_caption_in_3_steps"]["value"]
    assert plain["operations_per_video"]["value"] > plain["operations_per_caption"]["value"]
    assert "captions.difference" in short


def test_random_weights_have_the_base_s_size_and_repeat_for_a_seed(tmp_path, tiny_wan_folder):
    from safetensors.numpy import load_file

    name = "transformer/diffusion_pytorch_model.safetensors"
    for folder, seed in (("one", 0), ("again", 0), ("other", 1)):
        with_random_weights(tiny_wan_folder, tmp_path / folder, seed)
    assert file_sha256(tmp_path / "one" / name) == file_sha256(tmp_path / "again" / name)
    assert file_sha256(tmp_path / "one" / name) != file_sha256(tmp_path / "other" / name)
    old, new = load_file(tiny_wan_folder / name), load_file(tmp_path / "other" / name)
    assert {key: value.shape for key, value in old.items()} == {key: value.shape for key, value in new.items()}
    key = "blocks.0.attn1.to_q.weight"
    assert not np.allclose(old[key], new[key])
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert file_sha256(tmp_path / "one" / vae) == file_sha256(tiny_wan_folder / vae)
