"""MLflow's store when it fails, or after it was moved."""

import errno
import shutil
import sqlite3
from contextlib import contextmanager
from urllib.parse import quote

import mlflow
import pytest

from components import tracking
from components.training.tracked_run import start_run
from univigu import registry
from univigu.errors import DiskFullError, MissingInputError, TransientError


@contextmanager
def unwritable(database, monkeypatch):
    """Within the block, this database can be read only: root may write any file, so SQLite itself has to refuse."""
    connect = sqlite3.connect

    def open_to_read(path, *arguments, **options):
        if path != database:
            return connect(path, *arguments, **options)
        return connect(f"file:{quote(str(path))}?mode=ro", *arguments, uri=True, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", open_to_read)
        yield


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
def test_a_moved_or_copied_work_root_takes_its_artifacts_along_also_one_that_can_not_be_written(
    tmp_path, capsys, monkeypatch
):
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
    assert registry.artifact("models:/moved/1", "lineage.txt", store).is_relative_to(tmp_path / "copy")
    assert "mlflow.db now says" in capsys.readouterr().err
    (tmp_path / "alone").mkdir()
    shutil.copy(old / "mlflow.db", tmp_path / "alone")
    store = tracking.existing_store(tmp_path / "alone")
    assert registry.artifact("models:/moved/1", "lineage.txt", store).is_relative_to(old)  # the only files there are
    (tmp_path / "link").symlink_to(old)
    assert tracking.existing_store(tmp_path / "link")
    assert capsys.readouterr().err == ""

    shutil.rmtree(tmp_path / "copy")
    old.rename(new)
    with unwritable(new / "mlflow.db", monkeypatch):
        store = tracking.existing_store(new)
        with pytest.raises(MissingInputError, match="can't be reached"):
            registry.artifact("models:/moved/1", "lineage.txt", store)
        store = tracking.store_to_read(new)
        assert registry.artifact("models:/moved/1", "lineage.txt", store).is_relative_to(new)
    assert capsys.readouterr().err == ""
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
