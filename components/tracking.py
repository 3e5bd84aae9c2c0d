"""The MLflow tracking store.

The store is ``mlflow.db`` in the work root, where `mlflow ui` finds it, or the server in MLFLOW_TRACKING_URI. A step
connects to it before it computes anything, so a server that does not answer stops the step at once.

MLflow stores absolute locations of artifacts. `follow_move` corrects them after the work root was moved or copied.
"""

import atexit
import getpass
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from univigu.errors import ConfigError, MissingInputError
from univigu.mlflow_store import (
    first_contact,
    quiet_mlflow,
    without_login,
    without_password,
    without_secrets,
)

EXPERIMENT = "uni-vigu"
NOTE = "mlflow.note.content"  # the tag with a description, which MLflow shows as Markdown
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # opens on runs and models, not on traces of an agent
_ABOUT = (
    "Training runs have loss curves, held-out losses by step, and samples. Runs called *register ...* have the scores "
    "of a version, and its report under *Artifacts*. Versions and their aliases are under *Models*."
)
_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def actor() -> str:
    """The login name of this process; after UNIVIGU_ACTOR, if that names a person on whose behalf it acts.

    Anyone can set a variable, so the login name is always there.
    """
    try:
        login = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have only a number
        login = f"uid {os.getuid()}"
    named = os.environ.get("UNIVIGU_ACTOR")
    return f"{named}, says {login}" if named else login


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI if it is set, otherwise ``mlflow.db`` in the work root."""
    return without_login(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve() / 'mlflow.db'}")


def existing_store(root: Path, otherwise: str = "set MLFLOW_TRACKING_URI") -> str:
    """`tracking_uri` for readers: raises `MissingInputError` if the store doesn't exist yet.

    MLflow would create an empty database instead. `otherwise` is the last remedy that the error message offers.
    """
    uri = tracking_uri(root)
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (root / "mlflow.db").is_file():
        raise MissingInputError(
            f"No model is registered in {root.resolve()}, which has no mlflow.db; run `make demo` there, run "
            f"`univigu run register-model` if a model is trained, give another --root, or {otherwise}."
        )
    follow_move(root)
    return uri


def store_to_read(root: Path, otherwise: str = "set MLFLOW_TRACKING_URI") -> str:
    """`existing_store` for those who only read a version's files, also in a moved root whose disk can't be written.

    There it is a copy of the database with corrected locations, which is removed when the process ends.
    """
    uri, move = existing_store(root, otherwise), _find_move(root)
    if move is None:
        return uri
    database = root.resolve() / "mlflow.db"
    return f"sqlite:///{_corrected_copy(database, database.stat().st_mtime_ns, *move)}"


@cache
def _corrected_copy(database: Path, _changed: int, old: str, new: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="univigu-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = Path(shutil.copyfile(database, folder / database.name))
    _correct_locations(copy, old, new)
    return copy


def follow_move(root: Path) -> None:
    """Correct the locations in ``mlflow.db`` after its work root was moved or copied; MLflow stores them whole.

    Nothing changes for a copy of the database alone, whose files are those of the original. A database that can't be
    read or written is left to MLflow, whose message explains it.
    """
    move = _find_move(root)
    if move is None:
        return
    try:
        _correct_locations(root / "mlflow.db", *move)
    except sqlite3.Error:
        return
    print(f"MLflow's artifacts were at {move[0]}; mlflow.db now says {move[1]}.", file=sys.stderr)


def _find_move(root: Path) -> tuple[str, str] | None:
    """The address of the artifacts in ``mlflow.db`` and the one that they have now; None where they are the same."""
    path, new = root / "mlflow.db", root.resolve() / "mlruns"
    if os.environ.get("MLFLOW_TRACKING_URI") or not path.is_file():
        return None
    try:
        with closing(sqlite3.connect(path, timeout=60)) as database:
            query = "SELECT artifact_location FROM experiments WHERE name = ?"
            (old,) = database.execute(query, (EXPERIMENT,)).fetchone() or (new.as_uri(),)
    except sqlite3.Error:
        return None
    if old == new.as_uri() or not (old.startswith("file:///") and old.endswith("/mlruns")):
        return None
    original = Path(unquote(urlsplit(old).path))
    if original.exists() and (not new.is_dir() or new.samefile(original)):
        return None  # a copy of the database alone, or one folder under two names
    return old, new.as_uri()


def _correct_locations(database: Path, old: str, new: str) -> None:
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        for table, column in _LOCATIONS:
            connection.execute(  # the names are constants
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                (new, len(old) + 1, len(old), old),
            )


def open_tracking(root: Path, experiment: str = EXPERIMENT) -> str:
    """Set MLflow's tracking URI to the store of the work root; returns the id of `experiment`, created if necessary.

    From here on MLflow sends no telemetry and unpickles nothing. A store in the work root keeps artifacts in
    ``mlruns``. Raises `TransientError` if the store can't be reached, `CorruptDataError` if its database is damaged,
    and `ConfigError` if the experiment is deleted.
    """
    follow_move(root)
    mlflow, uri = quiet_mlflow(), tracking_uri(root)
    chosen = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    if not chosen:
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow set it; for another root it would look like the user's
    with first_contact(uri):
        client = mlflow.MlflowClient()
        found = client.get_experiment_by_name(experiment)
        if found is None:
            location = (root.resolve() / "mlruns").as_uri() if uri.startswith("sqlite:") else None
            try:
                tags = {**_KIND, NOTE: _ABOUT} if experiment == EXPERIMENT else _KIND
                return client.create_experiment(experiment, artifact_location=location, tags=tags)
            except mlflow.exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = client.get_experiment_by_name(experiment)  # another process created it at the same time
        # pyrefly: ignore[missing-attribute]
        if found.lifecycle_stage != "active":
            raise ConfigError(
                # pyrefly: ignore[missing-attribute]
                f"The experiment '{experiment}' in {without_password(uri)} is deleted; restore it with "
                f"`mlflow experiments restore --experiment-id {found.experiment_id}`."
            )
        for key, value in _KIND.items():
            # pyrefly: ignore[missing-attribute]
            if key not in found.tags:  # of an earlier release
                # pyrefly: ignore[missing-attribute]
                client.set_experiment_tag(found.experiment_id, key, value)
        # pyrefly: ignore[missing-attribute]
        return found.experiment_id


def find_run(root: Path, tags: Mapping[str, str]) -> str | None:
    """The id of the newest finished run with these tags, or None."""
    experiment = open_tracking(root)
    import mlflow

    wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in sorted(tags.items()))
    runs = mlflow.search_runs(
        experiment_ids=[experiment],
        filter_string=f"{wanted} and attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
        output_format="list",
    )
    return runs[0].info.run_id if runs else None


@contextmanager
def single_requests() -> Iterator[None]:
    """MLflow sends each request of the block once, whatever the user has set: for what must not be done twice."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    chosen = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        os.environ.pop(name)
        if chosen is not None:
            os.environ[name] = chosen


def flatten(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn ``{"a": {"b": 1}}`` into ``{"a.b": 1}``, and remove logins from addresses."""
    flat: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = redacted(value)
    return flat


def redacted(value: Any) -> Any:
    """A JSON value without the secrets in its strings."""
    if isinstance(value, Mapping):
        return {name: redacted(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(one) for one in value]
    return without_secrets(value) if isinstance(value, str) else value
