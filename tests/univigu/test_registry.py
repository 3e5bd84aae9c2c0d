"""Getting a model out of the registry: what is not there is named, and told from what can't be reached."""

import shutil

import mlflow
import pytest

from univigu import registry
from univigu.errors import ConfigError, MissingInputError


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """A registry whose `uni-vigu` has a champion, with files at a place that can be taken away."""
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


def test_the_files_of_a_version_are_found_by_number(uri):
    assert [file.name for file in registry.pipeline_folder("models:/uni-vigu/1", uri).iterdir()] == ["model_index.json"]


def test_files_out_of_reach_are_not_a_model_that_is_missing(uri):
    with pytest.raises(MissingInputError, match=r"is registered, but its files can't be reached .*/nowhere-at-all/"):
        registry.pipeline_folder("uni-vigu", uri)
    assert not registry.has_files(registry.find_version("uni-vigu", 2, uri), uri)


def test_the_place_of_files_is_told_without_its_login(uri):
    with pytest.raises(MissingInputError, match="can't be reached") as error:
        registry.pipeline_folder("models:/uni-vigu/3", uri)
    assert "bucket.invalid" in str(error.value)
    assert "s3cret" not in str(error.value)


def test_a_part_that_a_version_lacks_is_named(uri):
    with pytest.raises(MissingInputError, match="has no 'evaluation' among its files at"):
        registry.artifact("models:/uni-vigu/1", "evaluation", uri)


@pytest.mark.parametrize("model", ["nobody", "models:/uni-vigu/9", "models:/uni-vigu@candidate", "models:/m-none"])
def test_a_model_that_is_not_there_is_said_to_be_missing(uri, model):
    with pytest.raises(MissingInputError, match="There is no model at"):
        registry.pipeline_folder(model, uri)


@pytest.mark.parametrize("model", ["models:/uni-vigu@", "models:/", "models:/uni-vigu/1/2", "a/b", "https://host/x"])
def test_what_can_be_no_address_of_a_model_is_refused(uri, model):
    with pytest.raises(ConfigError, match="is not the address of a model"):
        registry.pipeline_folder(model, uri)


def test_a_name_that_no_filter_holds_is_refused(uri):
    with pytest.raises(ConfigError, match="quotation mark"):
        registry.versions("it's", uri)


def test_lost_files_are_told_by_name_and_by_size(uri):
    version = registry.find_version("uni-vigu", 1, uri)
    name = "artifacts/pipeline/model_index.json"
    assert registry.lost_files(version, {name: 2, "artifacts/README.md": None}, uri) == ["artifacts/README.md"]
    assert registry.lost_files(version, {name: 3}, uri) == [name]
    shutil.rmtree(registry.pipeline_folder("models:/uni-vigu/1", uri))
    assert registry.lost_files(version, {name: 2}, uri) == [name]
