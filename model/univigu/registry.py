"""The registered model: which versions there are, their aliases and tags, and getting one out of MLflow's registry.

`univigu.registration` puts them in.
"""

import atexit
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from univigu.errors import ConfigError, MissingInputError, UniViGUError, storage_fault
from univigu.mlflow_store import Uri, opened, store_error, without_password, without_secrets

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

    from univigu.pipeline import UniViGUPipeline

NAME = "uni-vigu"
CHAMPION = "champion"  # what is used
CANDIDATE = "candidate"  # what was registered last
PREVIOUS = "previous"  # who was champion before, for a rollback
_ADDRESS = re.compile(r"models:/[^/@]+(?:[/@][^/@]+)?")
_UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow's codes for a name or alias that isn't there


def load_pipeline(model: str | Path = NAME, tracking_uri: Uri = None) -> "UniViGUPipeline":
    """The pipeline in a folder, at a ``models:/`` address, or of a registered name's champion.

    Raises `MissingInputError` where there is no such model, `CorruptDataError` where its files or the registry's
    database can't be read, and `TransientError` where the registry does not answer.
    """
    from univigu.pipeline import UniViGUPipeline

    return UniViGUPipeline.from_pretrained(pipeline_folder(model, tracking_uri), use_safetensors=True)


def pipeline_folder(model: str | Path = NAME, tracking_uri: Uri = None) -> Path:
    """Where the pipeline's files lie (see `load_pipeline`); those of a registered model are fetched if need be."""
    if isinstance(model, Path) or Path(model).is_dir():
        return Path(model)
    uri = model if model.startswith("models:/") else f"models:/{model}@{CHAMPION}"
    return artifact(uri, "pipeline", tracking_uri)


def artifact(uri: str, name: str, tracking_uri: Uri = None) -> Path:
    """A file or folder that was registered with a version, on this machine's disk.

    `uri` is a ``models:/name/version`` or ``models:/name@alias``. What isn't on this disk is fetched into a folder that
    goes when the process ends. Raises as `load_pipeline` does; where the version is known and its files can't be
    reached, the `MissingInputError` names their place.
    """
    with opened(tracking_uri) as store:
        place = _place(uri, store)
        try:
            repository = repository_at(place)
            target = None if _is_local(repository) else _folder_until_exit()
            return Path(repository.download_artifacts(f"artifacts/{name}", target))
        except Exception as error:  # of each kind of store its own
            raise _files_error(error, uri, name, place) from error


def _place(uri: str, store: str) -> str:
    """The address of a version's files."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository

    if not _ADDRESS.fullmatch(uri):
        raise ConfigError(
            f"'{uri}' is no address of a model; give the path of a folder that is there, a registered name, "
            f"models:/NAME/VERSION or models:/NAME@ALIAS."
        )
    try:
        return ModelsArtifactRepository.get_underlying_uri(uri)
    except MlflowException as error:
        if error.error_code not in _UNKNOWN:
            raise
        raise MissingInputError(
            f"There is no model at {uri} in {without_password(store)}; register one that is trained (`univigu run "
            f"register-model`), train one (`make demo`), or give a model's folder."
        ) from error


def repository_at(place: str) -> "ArtifactRepository":
    """MLflow's way to the files at an address."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(place)


def _is_local(repository: "ArtifactRepository") -> bool:
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    return isinstance(repository, LocalArtifactRepository)


def _folder_until_exit() -> str:
    folder = tempfile.mkdtemp(prefix="univigu-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _files_error(error: Exception, uri: str, name: str, place: str) -> UniViGUError:
    """Why a version's files can't be had: the disk, a server that is away, or a place that isn't within reach."""
    from requests.exceptions import ConnectionError, Timeout

    if fault := storage_fault(error, Path(tempfile.gettempdir())):
        return fault
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, ConnectionError | Timeout) or (isinstance(status, int) and status >= 500):
        return store_error(error, place)
    shown = without_password(place)
    if _lists_anything(place):
        return MissingInputError(
            f"The model at {uri} carries no '{name}' among its files at {shown}; register it again (`univigu run "
            f"register-model` where it was trained)."
        )
    reason = without_secrets(str(error).partition("\n")[0]) or type(error).__name__
    return MissingInputError(
        f"The model at {uri} is registered, but its files can't be reached from this machine: they should be at "
        f"{shown} ({reason}); make that place reachable, or put the files back with `univigu run register-model` where "
        f"the model was trained."
    )


def _lists_anything(place: str) -> bool:
    try:
        return bool(repository_at(place).list_artifacts())
    except Exception:  # of each kind of store its own: that place can't be reached either
        return False


def version_at(name: str, alias: str, tracking_uri: Uri = None) -> "ModelVersion | None":
    """The version of `name` that holds `alias`, if any does."""
    with opened(tracking_uri):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        try:
            return MlflowClient().get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code in _UNKNOWN:
                return None
            raise


def version_with(name: str, tags: Mapping[str, str], tracking_uri: Uri = None) -> "ModelVersion | None":
    """The newest version of `name` that carries all these tags, if any does."""
    with opened(tracking_uri):
        from mlflow import MlflowClient

        conditions = [f"name = '{quotable(name)}'", *(f"tags.`{key}` = '{value}'" for key, value in tags.items())]
        found = MlflowClient().search_model_versions(" AND ".join(conditions))
        return max(found, key=lambda version: int(version.version), default=None)


def versions(name: str, tracking_uri: Uri = None) -> "list[ModelVersion]":
    """Every version of `name` with its aliases, the newest first."""
    with opened(tracking_uri):
        from mlflow import MlflowClient

        client, found, page = MlflowClient(), [], None
        while page is None or page:
            listed = client.search_model_versions(f"name = '{quotable(name)}'", max_results=1000, page_token=page)
            found += listed
            page = listed.token or ""
        aliases: dict[str, list[str]] = {}
        for alias, version in (client.get_registered_model(name).aliases if found else {}).items():
            aliases.setdefault(str(version), []).append(alias)
        for version in found:
            version.aliases = sorted(aliases.get(str(version.version), []))  # a search leaves them out
        return sorted(found, key=lambda version: int(version.version), reverse=True)


def find_version(name: str, version: int | str, tracking_uri: Uri = None) -> "ModelVersion":
    """The version of `name` with that number or alias; raises `MissingInputError` with those there are."""
    wanted = str(version)
    found = versions(name, tracking_uri)
    for one in found:
        if wanted == str(one.version) or wanted in one.aliases:
            return one
    if not found:
        raise MissingInputError(
            f"No model is registered as '{name}'; register one that is trained (`univigu run register-model`)."
        )
    named = ", ".join(" ".join([str(one.version), *one.aliases]) for one in found[:10])
    raise MissingInputError(f"'{name}' has no version or alias '{version}'; there are {named}.")


def has_files(version: "ModelVersion", tracking_uri: Uri = None) -> bool:
    """Whether the version's files are still where it says; the registry's database outlives a lost folder of them."""
    return bool(_sizes(version, [""], tracking_uri))


def lost_files(version: "ModelVersion", sizes: Mapping[str, int | None], tracking_uri: Uri = None) -> list[str]:
    """Those of a version's files that are gone, or are not of the size, in bytes; by their names inside it."""
    there = _sizes(version, sorted({name.rpartition("/")[0] for name in sizes}), tracking_uri)
    return [name for name, size in sizes.items() if name not in there or size not in (None, there[name])]


def _sizes(version: "ModelVersion", folders: list[str], tracking_uri: Uri) -> dict[str, int | None]:
    """What is in these folders of a version, by name: the size of a file in bytes, None for a folder."""
    uri = f"models:/{version.name}/{version.version}"
    with opened(tracking_uri) as store:
        place = _place(uri, store)
        try:
            repository = repository_at(place)
            return {file.path: file.file_size for folder in folders for file in repository.list_artifacts(folder)}
        except Exception as error:  # of each kind of store its own
            raise _files_error(error, uri, "", place) from error


def set_alias(name: str, alias: str, version: int | str, tracking_uri: Uri = None) -> None:
    """Point `alias` at this version of `name`, and at no other."""
    with opened(tracking_uri):
        from mlflow import MlflowClient

        MlflowClient().set_registered_model_alias(name, alias, str(version))


def set_tags(version: "ModelVersion", tags: Mapping[str, str], tracking_uri: Uri = None) -> None:
    """Add tags to a version; those of the same name are replaced."""
    with opened(tracking_uri):
        from mlflow import MlflowClient

        for key, value in tags.items():
            MlflowClient().set_model_version_tag(version.name, version.version, key, value)


def quotable(name: str) -> str:
    """A name that a filter of MLflow's can hold; raises `ConfigError` for another."""
    if "'" in name:
        raise ConfigError(f'"{name}" is no name of a model, as it has a quotation mark in it; give another.')
    return name
