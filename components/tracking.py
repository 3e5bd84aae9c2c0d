"""The MLflow tracking store, and the MLflow run of a training stage.

The store is ``mlflow.db`` in the work root, where `mlflow ui` finds it, or the server in MLFLOW_TRACKING_URI. A step
connects to it before it computes anything, so a server that does not answer stops the step at once.

MLflow stores absolute locations of artifacts. `follow_move` corrects them after the work root was moved.
"""

import getpass
import os
import secrets
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from components.pipeline.notes import TRAINING, MetricsNote, note_path
from univigu.errors import ConfigError, MissingInputError, PreemptedError
from univigu.files import read_json_object, write_json
from univigu.mlflow_store import (
    explained,
    first_contact,
    quiet_mlflow,
    short_timeouts,
    store_error,
    without_login,
    without_password,
    without_secrets,
)

if TYPE_CHECKING:
    import numpy as np

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
_NOTE_TAG = "univigu.note"  # identifies a training run in its note file until MLflow has assigned the run id
FLUSH_EVERY_S = 10.0


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


def follow_move(root: Path) -> None:
    """Correct the locations in ``mlflow.db`` after its work root was moved; without a server, MLflow stores them whole.

    Nothing changes while the old ``mlruns`` exists: then this root is a copy, whose files are those of the original. A
    database that can't be read or written is left to MLflow, whose message explains it.
    """
    path, new = root / "mlflow.db", (root.resolve() / "mlruns").as_uri()
    if os.environ.get("MLFLOW_TRACKING_URI") or not path.is_file():
        return
    try:
        with closing(sqlite3.connect(path, timeout=60)) as database, database:
            query = "SELECT artifact_location FROM experiments WHERE name = ?"
            (old,) = database.execute(query, (EXPERIMENT,)).fetchone() or (new,)
            moved = old.startswith("file:///") and old.endswith("/mlruns")
            if old == new or not moved or Path(unquote(urlsplit(old).path)).exists():
                return
            for table, column in _LOCATIONS:
                database.execute(  # the names are constants
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, len(old), old),
                )
    except sqlite3.Error:
        return
    print(f"MLflow's artifacts were at {old}; mlflow.db now says {new}.", file=sys.stderr)


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


@contextmanager
def start_run(
    root: Path,
    name: str,
    *,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    datasets: Mapping[str, tuple[str, str]],
    description: str = "",
    note: Path | None = None,
) -> Iterator["TrackedRun"]:
    """An MLflow run called `name`; an interrupted run that the file `note` names is resumed.

    parameters: nested, flattened with dots. datasets: (source, digest) by name. description: Markdown. note: a file
    that survives a killed process. A run that ends with `PreemptedError` is marked KILLED, with another error FAILED.
    """
    experiment = open_tracking(root)
    import mlflow

    store, status = tracking_uri(root), "FAILED"
    metrics = MetricsNote(note_path(root, TRAINING, name), flatten(parameters))
    try:
        with explained(store):
            run = _resume_or_start(mlflow, experiment, name, note)
            mlflow.log_params(flatten(parameters))
            if not run.inputs.dataset_inputs:
                for dataset, (source, digest) in datasets.items():
                    mlflow.log_input(_dataset(dataset, source, digest), context="training")
            mlflow.set_tags({**tags, **({NOTE: description} if description else {})})
            tracked = TrackedRun(mlflow.MlflowClient(), run.info.run_id, store, metrics)
        yield tracked
        tracked.flush(wait=True)
        status = "FINISHED"
    except PreemptedError:
        status = "KILLED"
        with short_timeouts():  # SIGKILL follows soon after SIGTERM
            tracked.flush(wait=True)
        raise
    finally:
        metrics.end(status)
        try:
            with nullcontext() if status == "FINISHED" else short_timeouts():
                mlflow.end_run(status)
        except Exception as error:
            print(f"MLflow still shows the run as running: {store_error(error, store)}", file=sys.stderr)


class TrackedRun:
    """Sends metrics to MLflow in batches, every few seconds and asynchronously, so that logging does not block.

    The newest are in `note` too, which doesn't depend on MLflow.
    """

    def __init__(self, client: Any, run_id: str, store: str, note: MetricsNote) -> None:
        self.client, self.run_id, self.store, self._note = client, run_id, store, note
        self._buffer: list[Any] = []
        self._pending: list[Any] = []
        self._flushed = time.monotonic()
        history = client.get_metric_history(run_id, "loss")
        self._logged = max((entry.step for entry in history), default=0)  # last step logged before an interruption

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step, unless the run logged this step before it was interrupted."""
        from mlflow.entities import Metric

        self._note.add(step, metrics)
        if step <= self._logged:
            return
        now = int(time.time() * 1000)
        self._buffer += [Metric(name, float(value), now, step) for name, value in metrics.items()]
        if time.monotonic() - self._flushed > FLUSH_EVERY_S:
            self.flush()

    def log_samples(
        self, step: int, rows: Sequence[Mapping[str, Any]], videos: Mapping[str, "np.ndarray"], fps: float
    ) -> None:
        """Add `rows` to the table ``samples.json``, and each clip, uint8 (F, H, W, 3), as ``samples/STEP/NAME.mp4``.

        MLflow's page of a run also shows the frames of the clips over the steps, as the image ``samples``. Steps that
        were logged before an interruption are skipped. If the store fails, the samples are lost, with a warning.
        """
        import tempfile

        from univigu.video import encode_mp4

        if step <= self._logged:
            return
        try:
            with tempfile.TemporaryDirectory() as folder:
                for number, (name, frames) in enumerate(videos.items()):
                    safe = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:60]
                    path = Path(folder) / f"{number}-{safe}.mp4"
                    path.write_bytes(encode_mp4(frames, fps))
                if videos:
                    self.client.log_artifacts(self.run_id, folder, f"samples/step-{step:08d}")
                    sheet = filmstrips(list(videos.values()))
                    self.client.log_image(self.run_id, sheet, key="samples", step=step, synchronous=True)
            table = {name: [row[name] for row in rows] for name in rows[0]}
            self.client.log_table(self.run_id, table, "samples.json")
        except Exception as error:
            reason = store_error(error, self.store)
            print(
                f"The samples of step {step} were not logged to MLflow; training continues. {reason}", file=sys.stderr
            )

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Add tags to the run; raises `TransientError` if the store does not answer."""
        with explained(self.store):
            for name, value in tags.items():
                self.client.set_tag(self.run_id, name, value)

    def flush(self, wait: bool = False) -> None:
        """Send buffered metrics; if the store fails, the curves in MLflow have gaps, but training continues."""
        self._flushed = time.monotonic()
        for start in range(0, len(self._buffer), 1000):
            batch = self._buffer[start : start + 1000]
            self._pending.append(self.client.log_batch(self.run_id, metrics=batch, synchronous=False))
        self._buffer = []
        if not wait:
            return
        try:
            for operation in self._pending:
                operation.wait()
        except Exception as error:
            reason = store_error(error, self.store)
            print(
                f"Some metrics were not logged to MLflow; the step's own curves are complete. {reason}", file=sys.stderr
            )
        self._pending = []


def filmstrips(clips: "Sequence[np.ndarray]", frames: int = 9, height: int = 64) -> "np.ndarray":
    """Clips of one size, uint8 (F, H, W, 3), as one picture with a row of at most `frames` frames per clip.

    Small frames are enlarged by a whole factor, to at most `height` pixels.
    """
    import numpy as np

    rows = []
    for clip in clips:
        chosen = clip[np.linspace(0, len(clip) - 1, min(frames, len(clip))).round().astype(int)]
        rows.append(np.concatenate(list(chosen), axis=1))
    scale = max(1, height // clips[0].shape[1])
    return np.concatenate(rows, axis=0).repeat(scale, axis=0).repeat(scale, axis=1)


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


def _resume_or_start(mlflow: Any, experiment: str, name: str, note: Path | None) -> Any:
    """Resume the run that `note` names, or start one.

    The note holds a random tag before the run is created, so the run is found again even if this process is killed
    before it writes the run's id.
    """
    content = _read_note(note)
    existing = _find_noted_run(mlflow, experiment, content)
    tag = {} if existing or note is None else {_NOTE_TAG: secrets.token_hex(16)}
    if tag:
        # pyrefly: ignore[bad-argument-type]
        write_json(note, tag)
    run = mlflow.start_run(
        run_id=existing,
        experiment_id=experiment,
        run_name=None if existing else name,
        tags={"mlflow.user": actor(), **tag},
    )
    if note is not None:
        write_json(note, {**content, **tag, "run_id": run.info.run_id})
    return run


def _read_note(note: Path | None) -> dict[str, Any]:
    try:
        return read_json_object(note) if note is not None else {}
    except (OSError, ValueError):
        return {}


def _find_noted_run(mlflow: Any, experiment: str, note: Mapping[str, Any]) -> str | None:
    """The run that a note names, unless it was deleted."""
    run_id, tag = note.get("run_id"), note.get(_NOTE_TAG)
    client = mlflow.MlflowClient()
    if isinstance(run_id, str):
        try:
            run = client.get_run(run_id).info
        except mlflow.exceptions.MlflowException:
            return None
        return run.run_id if run.lifecycle_stage == "active" else None
    if not isinstance(tag, str) or not tag.isalnum():
        return None
    found = client.search_runs([experiment], f"tags.`{_NOTE_TAG}` = '{tag}'")
    return found[0].info.run_id if found else None


def _dataset(name: str, source: str, digest: str) -> Any:
    from mlflow.data.meta_dataset import MetaDataset

    # pyrefly: ignore[missing-module-attribute]
    from mlflow.data.sources import LocalArtifactDatasetSource

    # MLflow limits a digest to 36 characters; the run's tags hold all of it
    return MetaDataset(source=LocalArtifactDatasetSource(source), name=name, digest=digest[:36])
