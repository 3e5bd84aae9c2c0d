"""The MLflow run of a training when the store fails, or when the training was killed."""

import json
import signal
import time

import mlflow
import numpy as np
import pytest

from components import tracking
from components.pipeline.runner import run_stage
from components.registry import promotion
from components.training.tracked_run import filmstrips, start_run
from components.training.train_stage import model_digest
from mlflow_gate import gated
from univigu import registry
from univigu.errors import PreemptedError, TransientError


def start(root, **changes):
    return start_run(root, "train-stage-1", **{"parameters": {}, "tags": {}, "datasets": {}, **changes})


@pytest.fixture
def gate(mlflow_server, monkeypatch):
    """MLflow's server behind a gate; named by MLFLOW_TRACKING_URI."""
    with gated(mlflow_server) as gate:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", gate.url)
        yield gate


@pytest.mark.slow
def test_what_the_store_refuses_once_is_sent_again(gate, tmp_path, capfd):
    clip = np.zeros((9, 32, 32, 3), np.uint8)
    with start(tmp_path) as run:
        gate.refused += ["runs/log-batch", "samples/step-00000002", "runs/update"]
        run.log(1, {"loss": 2.0})
        run.flush()
        run.log(2, {"loss": 1.0})
        run.log_samples(2, [{"caption": "a six"}], {"a six": clip}, 8)
    assert gate.refused == []
    client = mlflow.MlflowClient()
    assert {entry.step: entry.value for entry in client.get_metric_history(run.run_id, "loss")} == {1: 2.0, 2: 1.0}
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(run.run_id)} >= {"samples", "samples.json"}
    assert [file.path for file in client.list_artifacts(run.run_id, "samples/step-00000002")] == [
        "samples/step-00000002/0-a_six.mp4"
    ]
    assert "MLflow" not in capfd.readouterr().err


@pytest.mark.slow
def test_training_goes_on_while_mlflow_is_down_and_sends_the_metrics_of_that_time_later(
    mlflow_server, tmp_path, monkeypatch, impatient, capfd
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)
    with start(tmp_path) as run:
        run.log(1, {"loss": 3.0})
        run.flush(wait=True)
        mlflow_server.stop(signal.SIGKILL)
        began = time.monotonic()
        run.log(2, {"loss": 2.0})
        run.flush()
        run.log_samples(2, [{"caption": "a six"}], {}, 8)
        run.log(3, {"loss": 1.0})
        assert time.monotonic() - began < 20
        mlflow_server.start()
        run.log(4, {"loss": 0.5})
    client = mlflow.MlflowClient()
    history = {entry.step: entry.value for entry in client.get_metric_history(run.run_id, "loss")}
    assert history == {1: 3.0, 2: 2.0, 3: 1.0, 4: 0.5}
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert "The samples of step 2 were not logged to MLflow; training continues." in capfd.readouterr().err


@pytest.mark.slow
def test_training_that_ends_while_mlflow_is_down_is_finished_by_the_same_command(
    gate, latents_root, profile, monkeypatch, capfd
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")  # of its 7 retries
    steps = profile["train_stage_1"]["samples_every"] = profile["train_stage_1"]["steps"]
    gate.drops += ["samples/step-"] * 4  # each of two attempts to log samples retries once, as training waits for them
    gate.closes_at.append("runs/set-tag")  # when all steps are trained
    with pytest.raises(TransientError, match="does not answer"):
        run_stage("train-stage-1", profile, latents_root)
    said = capfd.readouterr().err
    assert f"The samples of step {steps} were not logged to MLflow; training continues." in said
    gate.closed = False
    run_stage("train-stage-1", profile, latents_root)
    assert f"Resuming after step {steps}" in capfd.readouterr().err
    found = mlflow.search_runs(experiment_names=["uni-vigu"], output_format="list")
    (run,) = [run for run in found if run.data.tags.get("univigu.stage") == "train-stage-1"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["univigu.model_digest"] == model_digest(latents_root / "data/stage1")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [entry.step for entry in history] == [*range(1, steps + 1)]


@pytest.mark.slow
def test_a_store_that_fails_during_training_loses_only_the_curves(
    mlflow_server, tmp_path, monkeypatch, impatient, capfd
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url.replace("//", "//me:s3cret@"))

    def train():
        with start(tmp_path) as run:
            run.log(1, {"loss": 2.0})
            run.flush(wait=True)
            mlflow_server.stop()
            run.log(2, {"loss": 1.0})
            run.log_samples(2, [{"caption": "a six"}], {}, 8)
            for ask in (
                lambda: run.set_tags({"univigu.model_digest": "0"}),
                lambda: registry.version_at("uni-vigu", "champion", tracking.tracking_uri(tmp_path)),
                lambda: promotion.promote("uni-vigu", 1, "why not", root=tmp_path),
            ):
                with pytest.raises(TransientError, match="does not answer"):
                    ask()
            raise PreemptedError("saved step 2")

    with pytest.raises(PreemptedError, match="saved step 2"):
        train()
    said = "".join(capfd.readouterr())
    for part in ("The samples of step 2 were not", "Some metrics were not", "MLflow still shows the run as running"):
        assert part in said
    assert "s3cret" not in said


@pytest.mark.slow
def test_a_deleted_run_is_not_resumed(tmp_path):
    note = tmp_path / "mlflow.json"
    with pytest.raises(PreemptedError), start(tmp_path, note=note):
        raise PreemptedError("told to stop")
    first = json.loads(note.read_text())["run_id"]
    with start(tmp_path, note=note) as run:
        assert run.run_id == first
    mlflow.MlflowClient().delete_run(first)
    with start(tmp_path, note=note) as run:
        assert run.run_id != first
    assert json.loads(note.read_text())["run_id"] == run.run_id


@pytest.mark.slow
def test_an_invalid_note_names_no_run(tmp_path):
    path = tmp_path / "mlflow.json"
    for note in ("[]", "5", '{"run_id": [1]}', '{"run_id": "none of them"}', "\0" * 30):
        path.write_text(note)
        with start(tmp_path, note=path) as run:
            assert json.loads(path.read_text())["run_id"] == run.run_id


@pytest.mark.slow
def test_a_run_whose_process_was_killed_before_it_wrote_the_run_id_is_resumed(tmp_path, monkeypatch):
    note = tmp_path / "mlflow.json"
    with pytest.raises(PreemptedError), start(tmp_path, note=note) as run:
        raise PreemptedError("killed")
    noted = json.loads(note.read_text())
    del noted["run_id"]  # as it is until MLflow has answered
    note.write_text(json.dumps(noted))
    with start(tmp_path, note=note) as again:
        assert again.run_id == run.run_id


@pytest.mark.slow
def test_a_login_in_a_parameter_is_not_logged(tmp_path):
    parameters = {"captioner": {"url": "https://me:s3cret@host/v1?token=abcdef&n=1", "n": 3}}
    with start(tmp_path, parameters=parameters) as run:
        pass
    params = mlflow.MlflowClient().get_run(run.run_id).data.params
    assert params == {"captioner.url": "https://***@host/v1?token=***&n=1", "captioner.n": "3"}


def test_the_frames_of_clips_are_one_picture():
    clips = [np.full((17, 32, 40, 3), value, np.uint8) for value in (10, 200)]
    sheet = filmstrips(clips)
    assert sheet.shape == (2 * 64, 9 * 80, 3)
    assert (sheet[:64] == 10).all()
    assert (sheet[64:] == 200).all()
