"""Putting a pipeline into MLflow's registry, as a version that needs no checkout.

A registered version is a model from code (no pickle): the pipeline's folder, this library, and the evidence that came
with it (model card, evaluation, manifests) are all inside it.

A version is made in two moves: `uploaded` sends the files, which takes time and says nothing yet, and `create_version`
makes them a version, at once. What a process leaves that is killed before that is discarded by `tidy_uploads`.
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

from univigu.errors import BadInputError
from univigu.files import link_or_copy
from univigu.mlflow_store import Uri, opened, without_password, without_secrets
from univigu.processes import has_ended, this_process
from univigu.registry import quotable, repository_at

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

# What inference imports; a version pins them at what it was made with.
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
LONGEST_DESCRIPTION = 5000  # characters that a database behind MLflow may hold
_NAME_TAG, _PROCESS_TAG = "univigu.registers", "univigu.process"  # of an upload's run: for which name, and by whom
_ABANDONED_S = 24 * 3600.0  # longer than any upload by a machine that can't be asked takes


@dataclass
class Upload:
    """Files in MLflow's store, with a run of their own, of which `create_version` may make a version."""

    run_id: str
    source: str = ""  # MLflow's address of the files
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
    """Send a pipeline's folder to the store, as a model with a run in that experiment, for a version of `name`.

    card: the model card. evidence: folders that go into the version under their names, for `artifact`. tags,
    parameters, metrics: on the run. Temporary files go where `tempfile` puts them; on the pipeline's own disk that
    saves a copy. An upload of which the block makes no version is discarded.
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
            yield upload
        finally:
            mlflow.end_run("FINISHED" if upload.version else "FAILED")
            if upload.version is None:
                _discard(mlflow.MlflowClient(), run)


def create_version(upload: Upload, name: str, card: str, tags: Mapping[str, str]) -> "ModelVersion":
    """Make a new version of `name`, with the card as its description, within the block of `uploaded`."""
    from mlflow import MlflowClient

    client = MlflowClient()
    _ensure_name(client, name)
    upload.version = client.create_model_version(
        name, source=upload.source, run_id=upload.run_id, tags=dict(tags), description=shorten(card)
    )
    return upload.version


def tidy_uploads(name: str, experiment_id: str, tracking_uri: Uri = None) -> None:
    """Discard the uploads for `name` whose process was killed, or failed, before it made a version of them.

    Their runs are marked as killed and deleted, as MLflow deletes (`mlflow gc` removes them for good), and their files
    are removed. The run of one that was killed right after it made its version is marked as finished.
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
    if not folder.endswith(f"/{model.model_id}"):  # not one that MLflow made for this model alone
        return
    try:
        repository_at(folder).delete_artifacts()
    except Exception as error:  # of each kind of store its own, and some can't delete
        logging.getLogger(__name__).warning("Left at %s: %s", without_password(folder), without_secrets(str(error)))


def restore_files(
    version: "ModelVersion",
    pipeline: Path,
    card: str,
    evidence: Mapping[str, Path],
    tracking_uri: Uri = None,
) -> None:
    """Put back the files of a version that lost some (see `lost_files`); its number, aliases and tags stay."""
    # pyrefly: ignore[missing-attribute]
    if not version.source.startswith("models:/m-"):
        raise BadInputError(
            # pyrefly: ignore[bad-argument-type]
            f"Version {version.version} of '{version.name}' lost files at {without_password(version.source)}, and was "
            f"not uploaded by this step, so they can't be put back; delete that version, and run again."
        )
    with opened(tracking_uri):
        # pyrefly: ignore[missing-attribute]
        _log_files(pipeline, card, evidence, model_id=version.source.rpartition("/")[2])


def _log_files(pipeline: Path, card: str, evidence: Mapping[str, Path], **where: str) -> str:
    """Log the model from code with everything that travels with it; returns its address.

    where: the ``name`` of a new model in the run under way, or the ``model_id`` of one that is there.
    """
    import mlflow

    with tempfile.TemporaryDirectory(prefix="univigu-") as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # hints for a signature, which is given
        folder = Path(temporary)
        readme = folder / "README.md"
        readme.write_text(card, encoding="utf-8")
        contents = {"card": readme}
        for title, source in {**evidence, "pipeline": pipeline}.items():
            contents[title] = folder / title  # its name inside the version is the last part of this path
            shutil.copytree(source, contents[title], copy_function=link_or_copy)
        return mlflow.pyfunc.log_model(
            **where,
            python_model=str(Path(__file__).with_name("mlflow_model.py")),
            code_paths=[str(Path(__file__).parent)],
            artifacts={title: str(path) for title, path in contents.items()},
            pip_requirements=requirements(),
            signature=signature(),
        ).model_uri


def requirements() -> list[str]:
    """What a pull has to install: the packages that inference imports, at the versions that run here."""
    return [f"{package}=={installed_version(package).partition('+')[0]}" for package in REQUIREMENTS]


def signature() -> "ModelSignature":
    """Columns in and out, and params with their defaults.

    0 steps, a guidance of -1 and a temperature of -1 stand for the model's own. The temperature is of the words, so it
    counts in the tasks caption and joint.
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
    """A card as a version's description: without its front matter, and cut between sections where it is too long."""
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
