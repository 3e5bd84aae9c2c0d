"""MLflow's store when it fails, or after it was moved."""

import errno
import shutil

import mlflow
import pytest

from components import tracking
from components.training.tracked_run import start_run
from univigu import registry
from univigu.errors import DiskFullError, TransientError


def start(root, **changes):
    return start_run(root, "train-stage-1", parameters={}, tags={}, datasets={}, **changes)


def test_a_server_that_fails_in_the_middle_is_a_transient_error(failing_after_one_answer, monkeypatch, impatient):
    for ask in (registry.versions, lambda name, uri: registry.version_at(name, "champion", uri)):
        failing_after_one_answer.answers = 1
        with pytest.raises(TransientError, match=r"MLflow's store at .* does not answer"):
            ask("uni-vigu", failing_after_one_answer.url)


def test_a_disk_that_fills_during_a_download_is_not_reported_as_a_missing_model(versions, monkeypatch):
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    number = versions.add("filling", 10)
    monkeypatch.setattr(LocalArtifactRepository, "download_artifacts", fill)
    with pytest.raises(DiskFullError, match="free some space"):
        registry.artifact(f"models:/filling/{number}", "evaluation", tracking.tracking_uri(versions.root))


@pytest.mark.slow
def test_a_moved_work_root_takes_its_artifacts_along(tmp_path, capsys):
    old, new = tmp_path / "old place", tmp_path / "new"
    old.mkdir()
    with start(old, description="**What** it is") as run:
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
