"""The MLflow run of a training stage: resumed after a kill, and sent to while training goes on."""

import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.pipeline.notes import TRAINING, MetricsNote, note_path
from components.tracking import NOTE, actor, flatten, open_tracking, tracking_uri
from univigu.errors import PreemptedError
from univigu.files import read_json_object, write_json
from univigu.mlflow_store import explained, short_timeouts, store_error
from univigu.threads import side_threads

if TYPE_CHECKING:
    import numpy as np

FLUSH_EVERY_S = 10.0
_NOTE_TAG = "univigu.note"  # identifies a training run in its note file until MLflow has assigned the run id


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
                _end_run(mlflow, status)
        except Exception as error:
            print(f"MLflow still shows the run as running: {store_error(error, store)}", file=sys.stderr)


def _end_run(mlflow: Any, status: str) -> None:
    active = mlflow.active_run()
    try:
        mlflow.end_run(status)  # forgets the run, also where it fails
    except Exception:
        if active is None:
            raise
        mlflow.MlflowClient().set_terminated(active.info.run_id, status)


class TrackedRun:
    """Sends metrics to MLflow in batches, every few seconds and in a thread, so that logging does not block.

    What the store did not take is sent again, so that only a failure at the end leaves gaps. The newest metrics are in
    `note` too, which doesn't depend on MLflow.
    """

    def __init__(self, client: Any, run_id: str, store: str, note: MetricsNote) -> None:
        self.client, self.run_id, self.store, self._note = client, run_id, store, note
        self._buffer: list[Any] = []
        self._sender = side_threads(1, "mlflow")
        self._sent: list[tuple[list[Any], Future[None]]] = []  # batches that the store has not taken yet
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
        were logged before an interruption are skipped. If the store fails twice, the samples are lost, with a warning.
        """
        if step <= self._logged:
            return
        try:
            try:
                self._log_samples(step, rows, videos, fps)
            except Exception:
                self._log_samples(step, rows, videos, fps)
        except Exception as error:
            reason = store_error(error, self.store)
            print(
                f"The samples of step {step} were not logged to MLflow; training continues. {reason}", file=sys.stderr
            )

    def _log_samples(
        self, step: int, rows: Sequence[Mapping[str, Any]], videos: Mapping[str, "np.ndarray"], fps: float
    ) -> None:
        from univigu.video import encode_mp4

        if videos:
            with tempfile.TemporaryDirectory() as folder:
                for number, (name, frames) in enumerate(videos.items()):
                    safe = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:60]
                    path = Path(folder) / f"{number}-{safe}.mp4"
                    path.write_bytes(encode_mp4(frames, fps))
                self.client.log_artifacts(self.run_id, folder, f"samples/step-{step:08d}")
            sheet = filmstrips(list(videos.values()))
            self.client.log_image(self.run_id, sheet, key="samples", step=step, synchronous=True)
        table = {name: [row[name] for row in rows] for name in rows[0]}
        self.client.log_table(self.run_id, table, "samples.json")

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Add tags to the run; raises `TransientError` if the store does not answer."""
        with explained(self.store):
            for name, value in tags.items():
                self.client.set_tag(self.run_id, name, value)

    def flush(self, wait: bool = False) -> None:
        """Send buffered metrics, and those that failed before.

        With ``wait``, until the store has them; if it fails once more, its curves have gaps, and training continues.
        """
        self._flushed = time.monotonic()
        before, self._sent, waiting = self._sent, [], []
        for batch, sent in before:
            if not sent.done():
                self._sent.append((batch, sent))
            elif sent.exception():
                waiting += batch
        waiting += self._buffer
        for start in range(0, len(waiting), 1000):
            batch = waiting[start : start + 1000]
            self._sent.append((batch, self._sender.submit(self._send, batch)))
        self._buffer = []
        if not wait:
            return
        try:
            for batch, sent in self._sent:
                if sent.exception():
                    self._send(batch)
        except Exception as error:
            reason = store_error(error, self.store)
            print(
                f"Some metrics were not logged to MLflow; the step's own curves are complete. {reason}", file=sys.stderr
            )
            for _, sent in self._sent:
                sent.cancel()
        self._sent = []

    def _send(self, batch: list[Any]) -> None:
        self.client.log_batch(self.run_id, metrics=batch)


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
