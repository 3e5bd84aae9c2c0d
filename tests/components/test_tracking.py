"""MLflow runs when the store fails, or when other processes interfere."""

import errno
import json
import shutil

import mlflow
import numpy as np
import pytest

from components import tracking
from components.registry import promotion
from univigu import registry
from univigu.errors import DiskFullError, PreemptedError, TransientError


def start(root, **changes):
    return tracking.start_run(root, "train-stage-1", parameters={}, tags={}, datasets={}, **changes)


@pytest.fixture
def impatient(monkeypatch):
    """MLflow retries a failing server only once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


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


def test_a_server_that_fails_in_the_middle_is_a_transient_error(failing_after_one_answer, monkeypatch, impatient):
    for ask in (registry.versions, lambda name, uri: registry.version_at(name, "champion", uri)):
        failing_after_one_answer.answers = 1
        with pytest.raises(TransientError, match=r"MLflow's store at .* does not answer"):
            ask("uni-vigu", failing_after_one_answer.url)


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


def test_a_disk_that_fills_during_a_download_is_not_reported_as_a_missing_model(versions, monkeypatch):
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    number = versions.add("filling", 10)
    monkeypatch.setattr(LocalArtifactRepository, "download_artifacts", fill)
    with pytest.raises(DiskFullError, match="free some space"):
        registry.artifact(f"models:/filling/{number}", "evaluation", tracking.tracking_uri(versions.root))


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
    with tracking.start_run(tmp_path, "x", parameters=parameters, tags={}, datasets={}) as run:
        pass
    params = mlflow.MlflowClient().get_run(run.run_id).data.params
    assert params == {"captioner.url": "https://***@host/v1?token=***&n=1", "captioner.n": "3"}


@pytest.mark.slow
def test_a_moved_work_root_takes_its_artifacts_along(tmp_path, capsys):
    old, new = tmp_path / "old place", tmp_path / "new"
    old.mkdir()
    with tracking.start_run(old, "x", parameters={}, tags={}, datasets={}, description="**What** it is") as run:
        run.client.log_text(run.run_id, "kept", "artifacts/lineage.txt")
    assert run.client.get_run(run.run_id).data.tags["mlflow.note.content"] == "**What** it is"
    run.client.create_registered_model("moved")
    uri = run.client.get_run(run.run_id).info.artifact_uri
    run.client.create_model_version("moved", uri, run.run_id)

    shutil.copytree(old, tmp_path / "copy")
    store = tracking.existing_store(tmp_path / "copy")
    assert registry.artifact("models:/moved/1", "lineage.txt", store).is_relative_to(old)  # a copy has its original's

    shutil.rmtree(tmp_path / "copy")
    old.rename(new)
    store = tracking.existing_store(new)
    assert registry.artifact("models:/moved/1", "lineage.txt", store).read_text() == "kept"
    assert "mlflow.db now says" in capsys.readouterr().err
    with start(new) as run:
        run.client.log_text(run.run_id, "more", "more.txt")
    assert len(list((new / "mlruns").rglob("more.txt"))) == 1
    assert not old.exists()
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_the_experiment_opens_in_the_mode_for_training_also_one_of_an_earlier_release(tmp_path):
    def kind(experiment):
        return mlflow.MlflowClient().get_experiment(experiment).tags.get("mlflow.experimentKind")

    assert kind(tracking.open_tracking(tmp_path)) == "custom_model_development"
    earlier = mlflow.MlflowClient().create_experiment("earlier")
    assert tracking.open_tracking(tmp_path, "earlier") == earlier
    assert kind(earlier) == "custom_model_development"


def test_the_frames_of_clips_are_one_picture():
    clips = [np.full((17, 32, 40, 3), value, np.uint8) for value in (10, 200)]
    sheet = tracking.filmstrips(clips)
    assert sheet.shape == (2 * 64, 9 * 80, 3)
    assert (sheet[:64] == 10).all()
    assert (sheet[64:] == 200).all()
