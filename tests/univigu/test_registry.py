"""Loading a model from the registry: a missing model is named, and told apart from an unreachable one."""

import shutil

import mlflow
import pytest

from univigu import registry
from univigu.errors import ConfigError, MissingInputError


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """A registry whose `uni-vigu` has a champion, with files in a folder that can be removed."""
    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    with registry.opened(uri):
        client = mlflow.MlflowClient()
        (folder / "files/artifacts/pipeline").mkdir(parents=True)
        (folder / "files/artifacts/pipeline/model_index.json").write_text("{}")
        client.create_registered_model("uni-vigu")
        client.create_model_version("uni-vigu", (folder / "files").as_uri())
        client.create_model_version("uni-vigu", "file:///nowhere-at-all/mlruns/models/m-1/artifacts")
        client.create_model_version("uni-vigu", "s3://key:s3cret@bucket.invalid/models/m-1")
        client.set_registered_model_alias("uni-vigu", "champion", "2")
    return uri


@pytest.mark.slow
def test_the_files_of_a_version_are_found_by_number(uri):
    assert [file.name for file in registry.pipeline_folder("models:/uni-vigu/1", uri).iterdir()] == ["model_index.json"]


def test_unreachable_files_are_told_apart_from_a_missing_model(uri):
    with pytest.raises(MissingInputError, match=r"is registered, but its files can't be reached .*/nowhere-at-all/"):
        registry.pipeline_folder("uni-vigu", uri)
    assert not registry.has_files(registry.find_version("uni-vigu", 2, uri), uri)


def test_the_location_of_files_is_shown_without_credentials(uri):
    with pytest.raises(MissingInputError, match="can't be reached") as error:
        registry.pipeline_folder("models:/uni-vigu/3", uri)
    assert "bucket.invalid" in str(error.value)
    assert "s3cret" not in str(error.value)


def test_a_missing_artifact_of_a_version_is_named(uri):
    with pytest.raises(MissingInputError, match="has no 'evaluation' among its files at"):
        registry.artifact("models:/uni-vigu/1", "evaluation", uri)


@pytest.mark.parametrize("model", ["nobody", "models:/uni-vigu/9", "models:/uni-vigu@candidate", "models:/m-none"])
def test_a_missing_model_is_reported(uri, model):
    with pytest.raises(MissingInputError, match="There is no model at"):
        registry.pipeline_folder(model, uri)


@pytest.mark.parametrize("model", ["models:/uni-vigu@", "models:/", "models:/uni-vigu/1/2", "a/b", "https://host/x"])
def test_an_invalid_model_address_is_refused(uri, model):
    with pytest.raises(ConfigError, match="is not the address of a model"):
        registry.pipeline_folder(model, uri)


def test_a_name_with_a_quotation_mark_is_refused(uri):
    with pytest.raises(ConfigError, match="quotation mark"):
        registry.versions("it's", uri)


def test_lost_files_are_found_by_name_and_size(uri):
    version = registry.find_version("uni-vigu", 1, uri)
    name = "artifacts/pipeline/model_index.json"
    assert registry.lost_files(version, {name: 2, "artifacts/README.md": None}, uri) == ["artifacts/README.md"]
    assert registry.lost_files(version, {name: 3}, uri) == [name]
    shutil.rmtree(registry.pipeline_folder("models:/uni-vigu/1", uri))
    assert registry.lost_files(version, {name: 2}, uri) == [name]
