"""The one file of the library that knows MLflow: putting a model into the registry, and getting it out again.

A registered version is a model from code (no pickle): the pipeline's folder, this library, and the evidence that came
with it (model card, evaluation, manifests) all lie inside it, so a pull needs no checkout.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from univigu.errors import (
    ConfigError,
    CorruptDataError,
    DiskFullError,
    MissingInputError,
    TransientError,
    UniViGUError,
)
from univigu.files import link_or_copy

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

    from univigu.pipeline import UniViGUPipeline

NAME = "uni-vigu"
CHAMPION = "champion"  # what is used
CANDIDATE = "candidate"  # what was registered last
PREVIOUS = "previous"  # who was champion before, for a rollback
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
_UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow's codes for a name or alias that isn't there
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}  # for the first call alone

Uri = str | None


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
    """A file or folder that `register_version` put into a version, on this machine's disk.

    `uri` is a ``models:/name/version`` or ``models:/name@alias``. Raises as `load_pipeline` does.
    """
    with _store(tracking_uri) as store:
        from mlflow import artifacts
        from mlflow.exceptions import MlflowException

        try:
            return Path(artifacts.download_artifacts(artifact_uri=f"{uri}/artifacts/{name}"))
        except (MlflowException, OSError) as error:
            if not isinstance(error, FileNotFoundError) and getattr(error, "error_code", "") not in _UNKNOWN:
                raise store_error(error, store) from error
            raise MissingInputError(
                f"There is no model at {uri} in {without_password(store)}; register one that is trained (`univigu run "
                f"register-model`), train one (`make demo`), or give a model's folder."
            ) from error


def version_at(name: str, alias: str, tracking_uri: Uri = None) -> "ModelVersion | None":
    """The version of `name` that holds `alias`, if any does."""
    with _store(tracking_uri):
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
    with _store(tracking_uri):
        from mlflow import MlflowClient

        conditions = [f"name = '{_quotable(name)}'", *(f"tags.`{key}` = '{value}'" for key, value in tags.items())]
        found = MlflowClient().search_model_versions(" AND ".join(conditions))
        return max(found, key=lambda version: int(version.version), default=None)


def versions(name: str, tracking_uri: Uri = None) -> "list[ModelVersion]":
    """Every version of `name` with its aliases, the newest first."""
    with _store(tracking_uri):
        from mlflow import MlflowClient

        client, found, page = MlflowClient(), [], None
        while page is None or page:
            listed = client.search_model_versions(f"name = '{_quotable(name)}'", max_results=1000, page_token=page)
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
    """Whether the version's files still lie where it says; the registry's database outlives a lost folder of them."""
    with _store(tracking_uri) as store:
        from mlflow import artifacts
        from mlflow.exceptions import MlflowException

        try:
            return bool(artifacts.list_artifacts(artifact_uri=f"models:/{version.name}/{version.version}"))
        except (MlflowException, OSError) as error:
            if getattr(error, "error_code", None) == _UNKNOWN[0]:
                return False
            raise store_error(error, store) from error


def register_version(
    pipeline: Path,
    name: str,
    *,
    experiment_id: str,
    card: str,
    evidence: Mapping[str, Path],
    tags: Mapping[str, str],
    parameters: Mapping[str, Any],
    metrics: Mapping[str, float],
    scratch: Path | None = None,
    tracking_uri: Uri = None,
) -> "ModelVersion":
    """Make a new version of `name` from a pipeline's folder, and a run of its own in that experiment.

    card: the model card, which becomes the version's description too. evidence: folders that go into the version under
    their names, for `artifact`. tags: on the version and on the run. parameters, metrics: on the run.
    scratch: a folder for temporary files; on the pipeline's own disk it saves a copy.
    """
    with _store(tracking_uri):
        import mlflow

        with mlflow.start_run(experiment_id=experiment_id, run_name=f"register {name}", tags=dict(tags)) as run:
            mlflow.log_params(dict(parameters))
            mlflow.log_metrics(dict(metrics))
            source = _log_files(pipeline, card, evidence, scratch, name="model")
            client = mlflow.MlflowClient()
            _ensure_name(client, name)
            return client.create_model_version(
                name, source=source, run_id=run.info.run_id, tags=dict(tags), description=shorten(card)
            )


def restore_files(
    version: "ModelVersion",
    pipeline: Path,
    card: str,
    evidence: Mapping[str, Path],
    scratch: Path | None = None,
    tracking_uri: Uri = None,
) -> None:
    """Put back the files of a version that lost them (see `has_files`); its number, aliases and tags stay."""
    with _store(tracking_uri):
        _log_files(pipeline, card, evidence, scratch, model_id=version.source.rpartition("/")[2])


def _log_files(pipeline: Path, card: str, evidence: Mapping[str, Path], scratch: Path | None, **where: str) -> str:
    """Log the model from code with everything that travels with it; returns its address.

    where: the ``name`` of a new model in the run under way, or the ``model_id`` of one that is there.
    """
    import mlflow

    with tempfile.TemporaryDirectory(dir=scratch) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # hints for a signature, which is given
        readme = Path(folder) / "README.md"
        readme.write_text(card, encoding="utf-8")
        contents = {"card": readme}
        for title, source in {**evidence, "pipeline": pipeline}.items():
            contents[title] = Path(folder) / title  # its name inside the version is the last part of this path
            shutil.copytree(source, contents[title], copy_function=link_or_copy)
        return mlflow.pyfunc.log_model(
            **where,
            python_model=str(Path(__file__).with_name("mlflow_model.py")),
            code_paths=[str(Path(__file__).parent)],
            artifacts={title: str(path) for title, path in contents.items()},
            pip_requirements=requirements(),
            signature=signature(),
        ).model_uri


def set_alias(name: str, alias: str, version: int | str, tracking_uri: Uri = None) -> None:
    """Point `alias` at this version of `name`, and at no other."""
    with _store(tracking_uri):
        from mlflow import MlflowClient

        MlflowClient().set_registered_model_alias(name, alias, str(version))


def set_tags(version: "ModelVersion", tags: Mapping[str, str], tracking_uri: Uri = None) -> None:
    """Add tags to a version; those of the same name are replaced."""
    with _store(tracking_uri):
        from mlflow import MlflowClient

        for key, value in tags.items():
            MlflowClient().set_model_version_tag(version.name, version.version, key, value)


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


def _quotable(name: str) -> str:
    if "'" in name:
        raise ConfigError(f'"{name}" is no name of a model, as it has a quotation mark in it; give another.')
    return name


def without_login(uri: str) -> str:
    """The address of an MLflow server without the login in it, which goes to the variables that MLflow reads it from.

    MLflow's own messages and logs repeat whole addresses.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return uri
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    if os.environ.get("MLFLOW_TRACKING_URI") == uri:
        os.environ["MLFLOW_TRACKING_URI"] = bare
    return bare


def without_password(uri: str) -> str:
    """The address of a store as messages and logs may have it: with asterisks in the password's place."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(uri).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):  # no URL: a folder, or a word that MLflow knows
        return uri.rpartition("@")[2]


def store_error(error: Exception, uri: str) -> UniViGUError:
    """What to tell people of a store that failed: its disk is full, its database damaged, or it is not there."""
    from sqlalchemy.exc import DatabaseError

    place = without_password(uri)
    cause = error  # the first one: MLflow's and requests' own words repeat the whole query
    while earlier := cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__):
        cause = earlier
    reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    if "disk is full" in reason or "No space left" in str(error):  # without an errno
        return DiskFullError(
            f"The disk is full, so MLflow's store at {place} can't be used; make room and run it again."
        )
    # the class itself: those below it say that a database is busy, or not to be reached
    if any(type(one) is DatabaseError for one in (error, error.__cause__, error.__context__)):
        return CorruptDataError(
            f"MLflow's database {place} can't be read ({reason}); put back a copy of it, or move it away and run "
            f"`univigu run register-model`, which begins a new one."
        )
    return TransientError(
        f"MLflow's store at {place} does not answer ({reason}); start it, or set MLFLOW_TRACKING_URI, and run again."
    )


@contextmanager
def explained(uri: str):
    """Turn what MLflow raises about its store into what `store_error` says of it."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise store_error(error, uri) from error


@contextmanager
def in_a_hurry():
    """Let MLflow give up on a server within seconds, not minutes, where the user has not said how patient to be."""
    hurried = {name: value for name, value in _PATIENCE.items() if name not in os.environ}
    os.environ.update(hurried)
    try:
        yield
    finally:
        for name in hurried:
            os.environ.pop(name)


def _require_answer(uri: str) -> None:
    from mlflow import MlflowClient

    try:
        with in_a_hurry():
            MlflowClient().search_registered_models(max_results=1)
    except Exception as error:  # MLflow passes on whatever its database driver or HTTP client raises
        raise store_error(error, uri) from error


@contextmanager
def _store(tracking_uri: Uri):
    """MLflow pointed at `tracking_uri` (None: where it points already); it calls nobody and unpickles nothing.

    Raises `TransientError` where the store does not answer, or stops answering within the block, and `CorruptDataError`
    where its database is damaged.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    before, chosen = mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI")
    if tracking_uri is not None:
        mlflow.set_tracking_uri(without_login(tracking_uri))
    try:
        store = mlflow.get_tracking_uri()
        _require_answer(store)
        with explained(store):
            yield store
    finally:
        if tracking_uri is not None:
            mlflow.set_tracking_uri(before)
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow notes the store there, as if the user had chosen it
            if chosen is not None:
                os.environ["MLFLOW_TRACKING_URI"] = chosen
