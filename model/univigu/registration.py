"""Registering a pipeline in MLflow's registry, as a version that works without a checkout of this repository.

A registered version is a model from code (nothing is pickled). It contains the pipeline's folder, this library, and its
evidence (model card, evaluation, manifests).

Registration has two phases: `uploaded` sends the files, which takes time and has no visible effect, and
`create_version` makes a version of them atomically. `tidy_uploads` discards what a process leaves that is killed in
between.
"""

import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from univigu import version_files
from univigu.errors import BadInputError
from univigu.files import link_or_copy
from univigu.mlflow_store import Uri, opened, without_password, without_secrets
from univigu.processes import has_ended, this_process
from univigu.registry import quotable, repository_at

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

# The packages that inference imports; a version pins them to the versions that it was created with.
REQUIREMENTS = (
    "mlflow",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "av",
    "ftfy",
    "numpy",
    "pandas",
)
ADAPTER = "pytorch_lora_weights.safetensors"  # beside the parts of a model with an adapter (`lora.FILE`)
LONGEST_DESCRIPTION = 5000  # characters, a limit of the databases that MLflow supports
_NAME_TAG, _PROCESS_TAG = "univigu.registers", "univigu.process"  # tags of an upload's run: model name and process
_ABANDONED_S = 24 * 3600.0  # after this time, an upload from a machine that can't be checked counts as abandoned


@dataclass
class Upload:
    """Files in MLflow's store, with a run of their own, from which `create_version` makes a version."""

    run_id: str
    source: str = ""  # MLflow's address of the files
    digest: str = ""  # of the files that are there (`univigu.version_files`)
    version: "ModelVersion | None" = None


@contextmanager
def uploaded(
    pipeline: Path,
    name: str,
    *,
    experiment_id: str,
    card: str,
    evidence: Mapping[str, Path],
    tags: Mapping[str, str],
    parameters: Mapping[str, Any],
    metrics: Mapping[str, float],
    tracking_uri: Uri = None,
) -> Iterator[Upload]:
    """Upload a pipeline's folder, as a model with a run in that experiment, for a version of `name`.

    card: the model card. evidence: folders that are stored in the version under their names, for `artifact`. tags,
    parameters, metrics: those of the run. Temporary files are hard links if `tempfile`'s folder is on the pipeline's
    disk, otherwise copies. An upload that the block makes no version of is discarded.
    """
    with opened(tracking_uri):
        import mlflow

        marks = {_NAME_TAG: name, _PROCESS_TAG: this_process()}
        run = mlflow.start_run(experiment_id=experiment_id, run_name=f"register {name}", tags={**tags, **marks})
        upload = Upload(run.info.run_id)
        try:
            mlflow.log_params(dict(parameters))
            mlflow.log_metrics(dict(metrics))
            upload.source = _log_files(pipeline, card, evidence, name="model")
            upload.digest = version_files.stored_digest(upload.source, _pipeline_files(pipeline))
            yield upload
        finally:
            mlflow.end_run("FINISHED" if upload.version else "FAILED")
            if upload.version is None:
                _discard(mlflow.MlflowClient(), run)


def create_version(upload: Upload, name: str, card: str, tags: Mapping[str, str]) -> "ModelVersion":
    """Create a new version of `name`, with the card as its description. Call it within the block of `uploaded`.

    Its tag `version_files.TAG` has the digest of the files that are in the store.
    """
    from mlflow import MlflowClient

    client = MlflowClient()
    _ensure_name(client, name)
    files = {version_files.TAG: upload.digest}
    upload.version = client.create_model_version(
        name,
        source=upload.source,
        run_id=upload.run_id,
        model_id=_model_id(upload.source),  # without it, a server refuses the source (MLflow 3.17.2)
        tags={**tags, **files},
        description=shorten(card),
    )
    return upload.version


def _model_id(source: str) -> str:
    """The id of the logged model at ``models:/m-…``."""
    return source.rpartition("/")[2]


def _pipeline_files(pipeline: Path) -> dict[str, Path]:
    """The files of a pipeline's folder by their names in a version."""
    found = (path for path in pipeline.rglob("*") if path.is_file())
    return {f"artifacts/pipeline/{path.relative_to(pipeline).as_posix()}": path for path in found}


def tidy_uploads(name: str, experiment_id: str, tracking_uri: Uri = None) -> None:
    """Discard the uploads for `name` whose process was killed, or failed, before it created a version.

    Their runs are marked as killed and deleted (`mlflow gc` removes them permanently), and their files are removed. A
    run whose process was killed right after it created its version is marked as finished.
    """
    with opened(tracking_uri):
        from mlflow import MlflowClient

        client = MlflowClient()
        unfinished = f"tags.`{_NAME_TAG}` = '{quotable(name)}' and attributes.status != 'FINISHED'"
        for run in client.search_runs([experiment_id], unfinished):
            if client.search_model_versions(f"run_id = '{run.info.run_id}'"):
                client.set_terminated(run.info.run_id, "FINISHED")
            elif not _is_under_way(run):
                client.set_terminated(run.info.run_id, "KILLED")
                _discard(client, run)


def _is_under_way(run: "Run") -> bool:
    age = time.time() - run.info.start_time / 1000
    process = run.data.tags.get(_PROCESS_TAG, "")
    return run.info.status == "RUNNING" and age < _ABANDONED_S and not has_ended(process)


def _discard(client: Any, run: "Run") -> None:
    made = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    for model in made:
        _delete_files(model)
        client.delete_logged_model(model.model_id)
    client.delete_run(run.info.run_id)


def _delete_files(model: Any) -> None:
    folder = model.artifact_location.rstrip("/").removesuffix("/artifacts")
    if not folder.endswith(f"/{model.model_id}"):  # not a folder of this model alone
        return
    try:
        repository_at(folder).delete_artifacts()
    except Exception as error:  # each kind of store has its own, and some can't delete
        logging.getLogger(__name__).warning(
            "The files at %s were not deleted: %s", without_password(folder), without_secrets(str(error))
        )


def restore_files(
    version: "ModelVersion",
    pipeline: Path,
    card: str,
    evidence: Mapping[str, Path],
    tracking_uri: Uri = None,
) -> None:
    """Upload the files of a version again (see `lost_files`); its number, aliases and tags don't change."""
    # pyrefly: ignore[missing-attribute]
    if not version.source.startswith("models:/m-"):
        raise BadInputError(
            # pyrefly: ignore[bad-argument-type]
            f"Version {version.version} of '{version.name}' has lost files at {without_password(version.source)}. They "
            f"can't be restored, because this step did not upload them; delete that version, and run again."
        )
    with opened(tracking_uri):
        # pyrefly: ignore[bad-argument-type]
        _log_files(pipeline, card, evidence, model_id=_model_id(version.source))


def _log_files(pipeline: Path, card: str, evidence: Mapping[str, Path], **where: str) -> str:
    """Log the model from code with all its files; returns its address.

    where: the ``name`` of a new model in the active run, or the ``model_id`` of an existing one.
    """
    import mlflow

    with tempfile.TemporaryDirectory(prefix="univigu-") as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # hints about signatures; ours is given
        folder = Path(temporary)
        readme = folder / "README.md"
        readme.write_text(card, encoding="utf-8")
        contents = {"card": readme}
        for title, source in {**evidence, "pipeline": pipeline}.items():
            contents[title] = folder / title  # the last part of this path is its name in the version
            shutil.copytree(source, contents[title], copy_function=link_or_copy)
        return mlflow.pyfunc.log_model(
            **where,
            python_model=str(Path(__file__).with_name("mlflow_model.py")),
            code_paths=[str(Path(__file__).parent)],
            artifacts={title: str(path) for title, path in contents.items()},
            pip_requirements=requirements(pipeline),
            signature=signature(),
        ).model_uri


def requirements(pipeline: Path) -> list[str]:
    """The packages that inference with a pipeline's folder imports, pinned to the versions installed here."""
    packages = [*REQUIREMENTS, "peft"] if (pipeline / ADAPTER).is_file() else REQUIREMENTS
    return [f"{package}=={installed_version(package).partition('+')[0]}" for package in packages]


def signature() -> "ModelSignature":
    """The columns of input and output, and the params with their defaults.

    0 steps, a guidance of -1 and a temperature of -1 select the model's own values. The temperature applies to text, so
    it is used by the tasks caption and joint.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    def columns(*names: str) -> Schema:
        return Schema([ColSpec("string", name, required=False) for name in names])

    params = [
        ParamSpec("task", "string", "caption"),
        ParamSpec("steps", "long", 0),
        ParamSpec("guidance", "double", -1.0),
        ParamSpec("temperature", "double", -1.0),
        ParamSpec("seed", "long", 0),
    ]
    return ModelSignature(columns("video", "prompt"), columns("caption", "video"), ParamSchema(params))


def shorten(card: str) -> str:
    """A card as a version's description: without its front matter, and cut between sections if it is too long."""
    text = card.partition("\n---\n")[2].strip() if card.startswith("---\n") else card
    if len(text) <= LONGEST_DESCRIPTION:
        return text
    more = "\n\nThe whole card is `artifacts/README.md` of this version.\n"
    return text[: text.rfind("\n## ", 0, LONGEST_DESCRIPTION - len(more))] + more


def _ensure_name(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
