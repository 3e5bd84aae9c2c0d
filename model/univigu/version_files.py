"""All files of a registered version under one digest, so that a pull gives what was promoted.

Loading a version with MLflow runs code that the version contains, so files that were changed in the store must be found
before that.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from univigu.files import file_sha256, parse_yaml
from univigu.registry import repository_at

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

TAG = "univigu.files_digest"  # of a version
_DESCRIPTION = "MLmodel"
_OF_AN_UPLOAD = {  # keys of the description by which nothing is loaded
    *("artifact_path", "mlflow_version", "model_id", "model_size_bytes", "model_uuid", "run_id", "utc_time_created"),
}
_CACHE = "__pycache__"  # what Python writes beside code that was loaded from the store; a pull leaves it out


def stored_digest(address: str, local: Mapping[str, Path]) -> str:
    """The digest of the files at an address of MLflow's; those in ``local`` (name to path) are not fetched."""
    repository = repository_at(address)
    with tempfile.TemporaryDirectory(prefix="univigu-") as temporary:
        return _digest(
            {
                name: local.get(name) or Path(repository.download_artifacts(name, temporary))
                for name in _names(repository)
            }
        )


def folder_digest(folder: Path) -> str:
    """The same digest, of a version's files in a folder."""
    return _digest({path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()})


def _names(repository: "ArtifactRepository", folder: str = "") -> Iterator[str]:
    for file in repository.list_artifacts(folder):
        if file.is_dir:
            yield from _names(repository, file.path)
        else:
            yield file.path


def _digest(files: Mapping[str, Path]) -> str:
    digests = {
        name: _description_digest(path) if name == _DESCRIPTION else file_sha256(path)
        for name, path in files.items()
        if _CACHE not in name.split("/")
    }
    return _json_digest(digests)


def _description_digest(path: Path) -> str:
    """The digest of the file MLmodel, without what differs when lost files are uploaded again.

    Raises `ValueError` where the file is no description of a model.
    """
    described = parse_yaml(path.read_text(encoding="utf-8"))
    if not isinstance(described, dict):
        raise ValueError("it is no description of a model")
    return _json_digest(_without_origins({key: one for key, one in described.items() if key not in _OF_AN_UPLOAD}))


def _without_origins(value: Any) -> Any:
    """A description's value without the places that artifacts and code were uploaded from."""
    if isinstance(value, list):
        return [_without_origins(one) for one in value]
    if not isinstance(value, dict):
        return value
    kept = {key: _without_origins(one) for key, one in value.items() if not (key == "uri" and "path" in value)}
    if isinstance(code := kept.get("model_code_path"), str):
        kept["model_code_path"] = code.rpartition("/")[2]  # all that MLflow uses of it
    return kept


def _json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
