"""Training as a step: a usable pipeline comes out, MLflow knows how, and nothing is lost when it is stopped."""

import json
import os
import signal
import threading
import time

import mlflow
import numpy as np
import pytest

from components.pipeline.runner import STATE, run_stage
from components.tracking import find_run, flatten, tracking_uri
from components.train_stage import model_digest
from univigu import UniViGUPipeline
from univigu.errors import BadInputError, PreemptedError, TransientError


@pytest.fixture
def profile(profile):
    for section in ("train_stage_1", "train_stage_2"):
        profile[section].update(steps=4, batch_size=4, checkpoint_every=2, heldout_every=4)
    return profile


def runs_of(root):
    mlflow.set_tracking_uri(tracking_uri(root))
    return mlflow.search_runs(experiment_names=["uni-vigu"], output_format="list")


def test_both_stages_leave_a_pipeline_that_works_and_a_run_that_leads_back_to_the_data(latents_root, profile):
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


def test_a_stage_told_to_stop_goes_on_in_the_same_mlflow_run(latents_root, profile):
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


def test_a_tracking_server_that_is_not_there_stops_training_before_it_begins(latents_root, profile, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(TransientError, match="MLFLOW_TRACKING_URI"):
        run_stage("train-stage-1", profile, latents_root)
    assert not (latents_root / STATE / "scratch/train-stage-1/checkpoints").exists()


def test_latents_of_another_text_length_are_refused(latents_root, profile):
    profile["text"]["caption_tokens"] = [32, 48]
    with pytest.raises(BadInputError, match="run encode-latents again"):
        run_stage("train-stage-1", profile, latents_root)


def test_nested_parameters_are_named_with_dots():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": 3}) == {"a.b": 1, "a.c.d": [2], "e": 3}
