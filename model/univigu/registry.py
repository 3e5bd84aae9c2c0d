"""The registered model in MLflow's registry: its versions, their aliases and tags, and loading one.

`univigu.registration` registers versions.
"""

import atexit
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from univigu.confidence_reference import FILE, REGISTERED
from univigu.errors import ConfigError, MissingInputError, UniViGUError, storage_fault
from univigu.mlflow_store import Uri, opened, store_error, without_password, without_secrets

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

    from univigu.pipeline import UniViGUPipeline

NAME = "uni-vigu"
CHAMPION = "champion"  # the version in use
CANDIDATE = "candidate"  # the version that was registered last
PREVIOUS = "previous"  # the champion before, for a rollback
_ADDRESS = re.compile(r"models:/[^/@]+(?:[/@][^/@]+)?")
_UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow's codes for an unknown name or alias


def load_pipeline(model: str | Path = NAME, tracking_uri: Uri = None) -> "UniViGUPipeline":
    """The pipeline in a folder, at a ``models:/`` address, or of the champion of a registered name.

    Raises `MissingInputError` where there is no such model, `CorruptDataError` where its files or the registry's
    database can't be read, and `TransientError` where the registry doesn't answer.
    """
    from univigu.pipeline import UniViGUPipeline

    return UniViGUPipeline.from_pretrained(pipeline_folder(model, tracking_uri), use_safetensors=True)


def pipeline_folder(model: str | Path = NAME, tracking_uri: Uri = None) -> Path:
    """The folder of the pipeline's files (see `load_pipeline`); a registered model's files are fetched if necessary."""
    if isinstance(model, Path) or Path(model).is_dir():
        return Path(model)
    uri = model if model.startswith("models:/") else f"models:/{model}@{CHAMPION}"
    pipeline, evaluation = REGISTERED
    return artifact(uri, pipeline, tracking_uri, beside=(f"{evaluation}/{FILE}",))


def artifact(uri: str, name: str, tracking_uri: Uri = None, beside: Sequence[str] = ()) -> Path:
    """The local path of a file or folder that was registered with a version.

    `uri` is ``models:/name/version`` or ``models:/name@alias``. Remote files are fetched into a folder that is removed
    when the process ends, and with them the files of `beside` that the version has. Raises as `load_pipeline` does;
    where the version exists but its files can't be reached, the `MissingInputError` has their location.
    """
    with opened(tracking_uri) as store, _reachable(uri, name, store) as repository:
        if _is_local(repository):
            return Path(repository.download_artifacts(f"artifacts/{name}", None))
        target = _folder_until_exit()
        for path in (f"artifacts/{other}" for other in beside):
            if any(found.path == path for found in repository.list_artifacts(path.rpartition("/")[0])):
                repository.download_artifacts(path, target)
        return Path(repository.download_artifacts(f"artifacts/{name}", target))


def download(uri: str, folder: Path, tracking_uri: Uri = None) -> None:
    """Copy all files of a version into an existing folder; `uri` and errors as in `artifact`."""
    with opened(tracking_uri) as store, _reachable(uri, "", store) as repository:
        repository.download_artifacts("", str(folder))


@contextmanager
def _reachable(uri: str, name: str, store: str) -> "Iterator[ArtifactRepository]":
    """MLflow's repository object for the files of a version, with errors for its file or folder `name`."""
    place = _place(uri, store)
    try:
        yield repository_at(place)
    except Exception as error:  # each kind of store has its own exceptions
        raise _files_error(error, uri, name, place) from error


def _place(uri: str, store: str) -> str:
    """The address of a version's files."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository

    if not _ADDRESS.fullmatch(uri):
        raise ConfigError(
            f"'{uri}' is not the address of a model; give the path of an existing folder, a registered name, "
            f"models:/NAME/VERSION or models:/NAME@ALIAS."
        )
    try:
        return ModelsArtifactRepository.get_underlying_uri(uri)
    except MlflowException as error:
        if error.error_code not in _UNKNOWN:
            raise
        raise MissingInputError(
            f"There is no model at {uri} in {without_password(store)}; register a trained one (`univigu run "
            f"register-model`), train one (`make demo`), or give a model's folder."
        ) from error


def repository_at(place: str) -> "ArtifactRepository":
    """MLflow's repository object for the files at an address."""
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
    """The error for a version's files that can't be read: disk, server, or a location that can't be reached."""
    from requests.exceptions import ConnectionError, Timeout

    if fault := storage_fault(error, Path(tempfile.gettempdir())):
        return fault
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, ConnectionError | Timeout) or (isinstance(status, int) and status >= 500):
        return store_error(error, place)
    shown = without_password(place)
    if _lists_anything(place):
        return MissingInputError(
            f"The model at {uri} has no '{name}' among its files at {shown}; register it again (`univigu run "
            f"register-model` where it was trained)."
        )
    reason = without_secrets(str(error).partition("\n")[0]) or type(error).__name__
    return MissingInputError(
        f"The model at {uri} is registered, but its files can't be reached from this machine: they should be at "
        f"{shown} ({reason}); make that location reachable, or restore the files with `univigu run register-model` "
        f"where the model was trained."
    )


def _lists_anything(place: str) -> bool:
    try:
        return bool(repository_at(place).list_artifacts())
    except Exception:  # each kind of store has its own exceptions; the location can't be reached
        return False


def version_at(name: str, alias: str, tracking_uri: Uri = None) -> "ModelVersion | None":
    """The version of `name` with the alias `alias`, or None."""
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
    """The newest version of `name` with all these tags, or None."""
    with opened(tracking_uri):
        from mlflow import MlflowClient

        conditions = [f"name = '{quotable(name)}'", *(f"tags.`{key}` = '{value}'" for key, value in tags.items())]
        found = MlflowClient().search_model_versions(" AND ".join(conditions))
        return max(found, key=lambda version: int(version.version), default=None)


def versions(name: str, tracking_uri: Uri = None) -> "list[ModelVersion]":
    """All versions of `name` with their aliases, newest first."""
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
            version.aliases = sorted(aliases.get(str(version.version), []))  # a search does not return them
        return sorted(found, key=lambda version: int(version.version), reverse=True)


def find_version(name: str, version: int | str, tracking_uri: Uri = None) -> "ModelVersion":
    """The version of `name` with that number or alias; raises `MissingInputError` with a list of the existing ones."""
    wanted = str(version)
    found = versions(name, tracking_uri)
    for one in found:
        if wanted == str(one.version) or wanted in one.aliases:
            return one
    if not found:
        raise MissingInputError(
            f"No model is registered as '{name}'; register a trained one (`univigu run register-model`)."
        )
    named = ", ".join(" ".join([str(one.version), *one.aliases]) for one in found[:10])
    raise MissingInputError(f"'{name}' has no version or alias '{version}'; use one of: {named}.")


def has_files(version: "ModelVersion", tracking_uri: Uri = None) -> bool:
    """Whether the version's files still exist; the registry's database keeps a version whose folder was lost."""
    return bool(_sizes(version, [""], tracking_uri))


def lost_files(version: "ModelVersion", sizes: Mapping[str, int | None], tracking_uri: Uri = None) -> list[str]:
    """The names of a version's files that are missing, or whose size in bytes is not the given one."""
    there = _sizes(version, sorted({name.rpartition("/")[0] for name in sizes}), tracking_uri)
    return [name for name, size in sizes.items() if name not in there or size not in (None, there[name])]


def _sizes(version: "ModelVersion", folders: list[str], tracking_uri: Uri) -> dict[str, int | None]:
    """The contents of these folders of a version: name to size in bytes, or to None for a folder."""
    uri = f"models:/{version.name}/{version.version}"
    with opened(tracking_uri) as store, _reachable(uri, "", store) as repository:
        return {file.path: file.file_size for folder in folders for file in repository.list_artifacts(folder)}


def set_alias(name: str, alias: str, version: int | str, tracking_uri: Uri = None) -> None:
    """Move `alias` to this version of `name`."""
    with opened(tracking_uri):
        from mlflow import MlflowClient

        MlflowClient().set_registered_model_alias(name, alias, str(version))


def set_tags(version: "ModelVersion", tags: Mapping[str, str], tracking_uri: Uri = None) -> None:
    """Add tags to a version; existing tags of the same name are replaced."""
    with opened(tracking_uri):
        from mlflow import MlflowClient

        for key, value in tags.items():
            MlflowClient().set_model_version_tag(version.name, version.version, key, value)


def quotable(name: str) -> str:
    """The name, if it can be used in a filter of MLflow's; raises `ConfigError` otherwise."""
    if "'" in name:
        raise ConfigError(f'"{name}" can\'t be the name of a model, because it has a quotation mark; use another name.')
    return name
