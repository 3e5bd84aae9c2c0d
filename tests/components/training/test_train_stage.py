"""The training steps: they write a usable pipeline, log to MLflow, and resume after being stopped."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from components.cli import data as data_commands
from components.pipeline.runner import run_stage
from components.pipeline.state import STATE
from components.pipeline.tables import read_table
from components.tracking import find_run, flatten, tracking_uri
from components.training.train_stage import model_digest
from univigu import UniViGUPipeline
from univigu.errors import BadInputError, ConfigError, CorruptDataError, PreemptedError, TransientError
from univigu.training import remote_shards
from univigu.training.data import write_latents


@pytest.fixture
def profile(profile):
    for section in ("train_stage_1", "train_stage_2"):
        profile[section].update(steps=4, batch_size=4, checkpoint_every=2, heldout_every=4)
    return profile


def runs_of(root):
    mlflow.set_tracking_uri(tracking_uri(root))
    return mlflow.search_runs(experiment_names=["uni-vigu"], output_format="list")


@pytest.mark.slow
def test_both_stages_write_a_working_pipeline_and_a_run_that_refers_to_the_data(latents_root, profile):
    root = latents_root
    first, second = (run_stage(f"train-stage-{number}", profile, root) for number in (1, 2))
    assert (first["rows_in"], first["rows_out"], first["facts"]["heldout_samples"]) == (6, 6, 2)
    for home in ("stage1", "stage2"):
        names = {path.name for path in (root / "data" / home).iterdir()}
        assert names == {"model", "curves.csv", "heldout.json", "heldout.csv", "rejected.parquet", "manifest.json"}
        assert not [path for path in (root / "data" / home).rglob("*") if path.suffix in {".pt", ".bin", ".pkl"}]
    curves = (root / "data/stage2/curves.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in curves] == ["step", "1", "2", "3", "4"]
    heldout = json.loads((root / "data/stage2/heldout.json").read_text())
    assert len(heldout["video_mse"]) == len(heldout["text_ce"]) == len(heldout["tau"]) == 10
    assert heldout["step"] == 4

    pipeline = UniViGUPipeline.from_pretrained(root / "data/stage2/model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.fps == profile["video"]["fps"]
    assert pipeline.config.caption_steps == profile["model"]["sampling"]["caption_steps"]
    assert isinstance(pipeline.caption(np.zeros((9, 32, 32, 3), np.uint8), num_inference_steps=2)[0], str)

    found = find_run(root, {"univigu.stage": "train-stage-2", "univigu.dataset_digest": second["inputs"]["latents"]})
    run = mlflow.get_run(found)
    assert run.data.params["train_stage_2.learning_rate"] == str(profile["train_stage_2"]["learning_rate"])
    assert run.inputs.dataset_inputs[0].dataset.digest == second["inputs"]["latents"][:36]
    history = mlflow.MlflowClient().get_metric_history(found, "loss")
    assert [metric.step for metric in history] == [1, 2, 3, 4]
    assert run.data.metrics["heldout_video_gain"] == pytest.approx(heldout["video_gain"])
    assert run.data.tags["univigu.model_digest"] == model_digest(root / "data/stage2")
    assert run.data.tags["univigu.input.model_digest"] == first["digest"] == second["inputs"]["model"]
    parent = mlflow.get_run(find_run(root, {"univigu.stage": "train-stage-1"})).data.tags
    assert parent["univigu.model_digest"] == model_digest(root / "data/stage1") != run.data.tags["univigu.model_digest"]
    assert parent["univigu.input.base_digest"] == first["inputs"]["base"]

    again = run_stage("train-stage-1", profile, root)
    assert again["digest"] == first["digest"]


@pytest.mark.slow
def test_a_stage_resumes_after_sigterm_in_the_same_mlflow_run(latents_root, profile):
    profile["train_stage_1"].update(steps=60, checkpoint_every=1000)
    curves = latents_root / STATE / "scratch/train-stage-1/curves.csv"

    def stop_after_some_steps():
        while not curves.is_file() or len(curves.read_text().splitlines()) < 4:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_after_some_steps, daemon=True).start()
    with pytest.raises(PreemptedError) as stopped:
        run_stage("train-stage-1", profile, latents_root)
    assert stopped.value.exit_code == 81
    assert not (latents_root / "data/stage1").exists()
    (run,) = runs_of(latents_root)
    assert run.info.status == "KILLED"

    run_stage("train-stage-1", profile, latents_root)
    (same,) = runs_of(latents_root)
    assert (same.info.run_id, same.info.status) == (run.info.run_id, "FINISHED")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert sorted(metric.step for metric in history) == list(range(1, 61))


def start_together(root, profile):
    (root / "two.yaml").write_text(yaml.safe_dump(profile))
    where = ["--profile", str(root / "two.yaml"), "--root", str(root), "--processes", "2"]
    command = [sys.executable, "-m", "components.cli.main", "run", "train-stage-1", *where]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def losses(curves):
    return [float(row["loss"]) for row in csv.DictReader(curves.read_text().splitlines())]


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_resume_after_sigterm(latents_root, profile):
    root = latents_root
    profile["train_stage_1"].update(steps=40, checkpoint_every=1000)
    run_stage("train-stage-1", profile, root)
    alone = losses(root / "data/stage1/curves.csv")

    process = start_together(root, profile)
    curves = root / STATE / "scratch/train-stage-1/curves.csv"
    while not curves.is_file() or len(curves.read_text().splitlines()) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 81, said
    assert [line for line in said.splitlines() if line.startswith("univigu: ")] == [
        "univigu: The step received SIGTERM; run it again to resume from what it has finished."
    ]

    process = start_together(root, profile)
    out, said = process.communicate()
    assert process.returncode == 0, said
    assert out == "train-stage-1: 6 rows in, 6 out, 0 quarantined\n"
    assert "Resuming after step" in said
    assert losses(root / "data/stage1/curves.csv") == pytest.approx(alone, rel=1e-3)


@pytest.mark.slow
def test_samples_are_logged_to_the_run_during_training(latents_root, profile):
    profile["train_stage_1"].update(samples_every=2, ema_decay=0.9)
    run_stage("train-stage-1", profile, latents_root)
    (run,) = runs_of(latents_root)
    client = mlflow.MlflowClient()
    for step in (2, 4):
        files = client.list_artifacts(run.info.run_id, f"samples/step-{step:08d}")
        assert [Path(file.path).suffix for file in files] == [".mp4"] * 2
        assert all(file.file_size > 200 for file in files)
    pictures = [Path(file.path) for file in client.list_artifacts(run.info.run_id, "images")]
    assert {path.suffix for path in pictures} == {".png", ".webp"}
    assert all(path.name.startswith("samples") for path in pictures)
    assert run.data.tags["mlflow.note.content"].startswith("Stage 1, *knowledge recall*: from the base `tiny-wan`")
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "samples.json")).read_text())
    rows = [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]
    assert [row["step"] for row in rows] == [2, 2, 4, 4]
    assert all(isinstance(row["said"], str) and row["target"] for row in rows)


@pytest.mark.slow
def test_unmerged_adapters_are_saved_beside_the_model_and_the_next_stage_merges_them(latents_root, profile):
    for number in (1, 2):
        lora = {"rank": 2, "alpha": 2.0, "targets": ["to_q"], "merge": number == 2}
        profile[f"train_stage_{number}"].update(lora=lora, steps=2)
        run_stage(f"train-stage-{number}", profile, latents_root)
    first, second = (latents_root / "data" / home / "model" for home in ("stage1", "stage2"))
    adapter = load_file(first / "pytorch_lora_weights.safetensors")
    assert len(adapter) == 2 * 4
    assert all(name.startswith("transformer.blocks.") for name in adapter)
    assert not (second / "pytorch_lora_weights.safetensors").exists()
    assert UniViGUPipeline.from_pretrained(first).get_active_adapters() == ["trained"]
    before, after = (load_file(one / "transformer/diffusion_pytorch_model.safetensors") for one in (first, second))
    assert not torch.equal(before["blocks.0.attn1.to_q.weight"], after["blocks.0.attn1.to_q.weight"])


@pytest.mark.slow
def test_latents_in_an_object_store_train_the_same_model(latents_root, profile, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(remote_shards.time, "sleep", lambda _: None)
    here = run_stage("train-stage-1", profile, latents_root)["digest"]
    shard = latents_root / "data/latents/shards/00000/latents.safetensors"
    data_commands.offload(str(tmp_path / "store"), remove=True, root=latents_root)
    assert "1 shards" in capsys.readouterr().out
    assert not shard.exists()
    assert run_stage("train-stage-1", profile, latents_root)["digest"] == here

    stored = tmp_path / "store/shards/00000/latents.safetensors"
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    shutil.rmtree(latents_root / STATE / "cache")
    with pytest.raises(CorruptDataError, match="upload the latents again"):
        run_stage("train-stage-1", profile, latents_root)


@pytest.mark.slow
def test_all_sizes_are_trained_and_left_over_samples_are_in_the_manifest(latents_root, profile, recommit):
    home = latents_root / "data/latents"
    rows = read_table(home, "latents").to_pylist()
    generator, length = torch.Generator().manual_seed(1), profile["text"]["caption_tokens"][1]
    ids = torch.randint(4, 60, (6, length), generator=generator)
    write_latents(
        home / "shards/00001/latents.safetensors",
        latents=torch.randn(6, 4, 2, 8, 12, generator=generator),
        prompt_embeds=[torch.randn(5, 32, generator=generator) for _ in range(6)],
        prompt_ids=ids,
        target_ids=ids,
    )
    wide = {"frames": 5, "height": 32, "width": 48, "shard": "shards/00001/latents.safetensors"}
    rows += [
        {**rows[0], **wide, "id": f"wide-{row}", "row": row, "split": "heldout" if row > 4 else "train"}
        for row in range(6)
    ]
    recommit(latents_root, "encode-latents", {"latents": rows})
    manifest = run_stage("train-stage-1", profile, latents_root)
    assert manifest["facts"]["training_samples"] == 11
    small, large = manifest["facts"]["buckets"]
    assert (small["frames_height_width"], small["samples"]) == ([5, 32, 48], 5)
    assert small["batches"] + large["batches"] == 4
    assert (small["batches"] * 4 + small["left_over"]) % 5 == 0
    assert json.loads((latents_root / "data/stage1/heldout.json").read_text())["samples"] == 3


@pytest.mark.slow
def test_left_over_samples_of_a_single_size_are_reported_too(latents_root, profile, capsys):
    profile["train_stage_1"]["steps"] = 1
    manifest = run_stage("train-stage-1", profile, latents_root)
    size = [profile["video"][name] for name in ("frames", "height", "width")]
    (bucket,) = manifest["facts"]["buckets"]
    assert bucket == {"frames_height_width": size, "samples": 6, "batches": 1, "left_over": 2}
    assert f"bucket frames_height_width {size} samples 6 batches 1 left_over 2" in capsys.readouterr().err


def test_a_base_of_another_architecture_is_rejected_before_weights_are_loaded(latents_root, profile):
    config = latents_root / profile["base"] / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "CogVideoXTransformer3DModel"}))
    with pytest.raises(BadInputError, match="is CogVideoXTransformer3DModel, not WanTransformer3DModel"):
        run_stage("train-stage-1", profile, latents_root)
    assert not (latents_root / "mlflow.db").exists()


@pytest.mark.slow
def test_a_run_that_needs_too_much_memory_is_rejected_with_suggestions(latents_root, profile, monkeypatch):
    monkeypatch.setattr("univigu.training.memory_check.free_memory", lambda: 10**6)
    with pytest.raises(ConfigError, match=r"needs .* GiB per process, and 0\.0 are free \(.*zero_stage: 1 on more"):
        run_stage("train-stage-1", profile, latents_root)
    assert not (latents_root / "mlflow.db").exists()


def test_a_run_that_offloads_more_than_the_machine_has_is_rejected_by_one_process_for_all(
    latents_root, profile, monkeypatch
):
    profile["train_stage_1"].update(zero_stage=2, offload=["optimizer"])
    monkeypatch.setattr("univigu.training.memory_check.free_host_memory", lambda: 10**6)
    monkeypatch.setattr("univigu.training.memory_check.free_memory", lambda: 10**12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match=r"machine's own memory for all its processes, .*set offload: \[\], or lora"):
        run_stage("train-stage-1", profile, latents_root)
    assert not (latents_root / "mlflow.db").exists()


@pytest.mark.slow
def test_only_the_first_of_several_processes_reads_weights_and_the_model_is_the_same(latents_root, profile, tmp_path):
    profile["train_stage_1"].update(steps=2, heldout_every=2)
    alone = tmp_path / "alone"
    shutil.copytree(latents_root, alone)
    run_stage("train-stage-1", profile, alone)
    profile["train_stage_1"].update(zero_stage=3, samples_every=2, gradient_checkpointing=True)
    (latents_root / "profile.yaml").write_text(yaml.safe_dump(profile))
    command = [sys.executable, "-m", "univigu.training.launch", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "components.cli.main", "run", "train-stage-1", "--profile", "profile.yaml", "--root", "."]
    done = subprocess.run(command, cwd=latents_root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    files = [root / "data/stage1/model/transformer" for root in (alone, latents_root)]
    expected, found = (load_file(next(folder.glob("*.safetensors"))) for folder in files)
    assert expected.keys() == found.keys()
    assert all(torch.allclose(found[name], tensor, atol=1e-3) for name, tensor in expected.items())
    (run,) = runs_of(latents_root)
    assert len(mlflow.MlflowClient().list_artifacts(run.info.run_id, "samples/step-00000002")) == 2


def test_an_unreachable_tracking_server_stops_training_before_it_starts(latents_root, profile, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(TransientError, match="MLFLOW_TRACKING_URI"):
        run_stage("train-stage-1", profile, latents_root)
    assert not (latents_root / STATE / "scratch/train-stage-1/checkpoints").exists()


def test_latents_of_another_text_length_are_rejected(latents_root, profile):
    profile["text"]["caption_tokens"] = [32, 48]
    with pytest.raises(BadInputError, match="run encode-latents again"):
        run_stage("train-stage-1", profile, latents_root)


def test_nested_parameters_are_named_with_dots():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": 3}) == {"a.b": 1, "a.c.d": [2], "e": 3}
