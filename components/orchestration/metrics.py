"""Prometheus metrics of a work root: its training runs, steps, captions, queues, and its disk.

They are read from files that runs leave in the work root (`components.pipeline.notes`, the records of steps, the
journal of paid answers) each time they are asked for. So the exporter needs no network and no account, may mount the
work root read-only, and still answers when MLflow doesn't. Times are Unix timestamps, as Prometheus advises: the age of
something is `time() - NAME`, also while the exporter is down.
"""

import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from components.pipeline.notes import DEFERRED, FAILURE, QUEUE, TRAINING, read_notes
from components.pipeline.stages import find_stage
from components.pipeline.state import STATE
from univigu import __version__
from univigu.files import read_json_object

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

CAPTIONS = "caption-videos"
_CAPTIONS_HOME = find_stage(CAPTIONS).home
EXPORTED: Mapping[str, tuple[str, tuple[str, ...]]] = {  # name -> (what it is, its labels)
    "univigu_build_info": ("Always 1; the version of the exporter.", ("version",)),
    "univigu_unreadable_files": ("Files of the work root that the exporter could not read.", ()),
    "univigu_disk_free_bytes": ("Free space on the disk of the work root.", ()),
    "univigu_disk_size_bytes": ("Size of the disk of the work root.", ()),
    "univigu_training_active": ("1 while a training process runs, or was killed without a word; else 0.", ("step",)),
    "univigu_training_step": ("The newest training step.", ("step",)),
    "univigu_training_steps": ("The number of training steps of the whole run.", ("step",)),
    "univigu_training_updated_timestamp_seconds": ("When the newest training step was noted.", ("step",)),
    "univigu_training_remaining_seconds": ("Time that the remaining steps need at the present speed.", ("step",)),
    "univigu_training_loss": ("Loss of the newest step; NaN or Inf if that ended the run.", ("step",)),
    "univigu_training_learning_rate": ("Learning rate of the newest step.", ("step",)),
    "univigu_training_gradient_norm": ("Norm of the gradient of the newest step.", ("step",)),
    "univigu_training_samples_per_second": ("Samples per second, over all GPUs.", ("step",)),
    "univigu_training_tokens_per_second": ("Tokens per second, over all GPUs.", ("step",)),
    "univigu_training_mfu_ratio": ("Share of the GPUs' peak FLOP/s (MFU), 0 to 1.", ("step",)),
    "univigu_training_data_wait_ratio": ("Share of the time spent waiting for data, 0 to 1.", ("step",)),
    "univigu_training_checkpoint_timestamp_seconds": (
        "When the newest checkpoint was written, or the run started if that was later.",
        ("step",),
    ),
    "univigu_training_checkpoint_interval_seconds": ("Time between checkpoints at the present speed.", ("step",)),
    "univigu_step_seconds": ("Duration of a step's last run that succeeded.", ("step",)),
    "univigu_step_finished_timestamp_seconds": ("When a step last succeeded.", ("step",)),
    "univigu_step_rows_in": ("Rows that a step's last run read.", ("step",)),
    "univigu_step_rows_out": ("Rows that a step's last run wrote.", ("step",)),
    "univigu_step_peak_memory_bytes": ("Most memory that a process of a step's last run used.", ("step",)),
    "univigu_step_quarantined_rows": ("Rows that a step's last run rejected, by reason.", ("step", "reason")),
    "univigu_step_failed": ("1 if a step's last run failed, with the class of the error.", ("step", "error")),
    "univigu_step_failed_timestamp_seconds": ("When a step's last run failed.", ("step",)),
    "univigu_captions_per_second": ("Captions per second of the last run of caption-videos.", ()),
    "univigu_caption_usage": ("What the last run's captions have cost, by unit: usd, tokens, requests.", ("unit",)),
    "univigu_caption_spent_total": ("Cost of all requests to a captioning service, by unit.", ("unit",)),
    "univigu_queue_waiting": ("1 while a TrainJob waits for its nodes, else 0.", ("step", "job")),
    "univigu_queue_wait_seconds": (
        "How long a TrainJob waits for its nodes, or waited last.",
        ("step", "job"),
    ),
    "univigu_deferred_since_timestamp_seconds": ("Since when an Airflow task waits for a run.", ("run",)),
    "univigu_deferred_end_timestamp_seconds": ("When the run of an Airflow task exceeds its time limit.", ("run",)),
}
_MEASURED = {  # metrics of a training run -> the name that it logs
    "univigu_training_loss": "loss",
    "univigu_training_learning_rate": "learning_rate",
    "univigu_training_gradient_norm": "grad_norm",
    "univigu_training_samples_per_second": "samples_per_second",
    "univigu_training_tokens_per_second": "tokens_per_second",
    "univigu_training_mfu_ratio": "mfu",
    "univigu_training_data_wait_ratio": "loading_share",
}
_NOT_FINITE = re.compile(r"The loss is (nan|-?inf) at step \d+")  # the message of `univigu.training.loop`
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, sqlite3.Error)


class Sample(NamedTuple):
    """One value of a metric; `labels` has the values of the labels that `EXPORTED` names."""

    name: str
    value: float
    labels: tuple[str, ...] = ()


def registry(root: Path) -> "CollectorRegistry":
    """A Prometheus registry of the work root's metrics, which are read anew at each collection."""
    from prometheus_client import CollectorRegistry

    made = CollectorRegistry()
    made.register(_Collector(root))
    return made


class _Collector:
    def __init__(self, root: Path) -> None:
        self.root = root

    def describe(self) -> "list[Metric]":
        return []  # otherwise a registration would read everything

    def collect(self) -> "Iterator[Metric]":
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {}
        for name, (about, labels) in EXPORTED.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            families[name] = kind(name.removesuffix("_total"), about, labels=labels)
        for sample in read_samples(self.root):
            families[sample.name].add_metric(sample.labels, sample.value)
        yield from families.values()


def read_samples(root: Path) -> list[Sample]:
    """All metrics of a work root. What can't be read is left out and counted in `univigu_unreadable_files`."""
    found = [Sample("univigu_build_info", 1.0, (__version__,))]
    unreadable = 0
    for source in _sources(root):
        try:
            found += list(source())
        except _UNREADABLE:
            unreadable += 1
    return [*found, Sample("univigu_unreadable_files", unreadable)]


def _sources(root: Path) -> Iterator[Callable[[], Iterator[Sample]]]:
    """One function per file, so that a damaged file hides nothing but itself."""
    yield partial(_disk, root)
    failures = {path.stem: note for path, note in read_notes(root, FAILURE)}
    for path, note in read_notes(root, TRAINING):
        yield partial(_training, root, path.stem, note, failures.get(path.stem))
    for kind, read in ((QUEUE, _queue), (DEFERRED, _deferred), (FAILURE, _failure)):
        for path, note in read_notes(root, kind):
            yield partial(read, path.stem, note)
    for path in sorted((root / STATE / "runs").glob("*.json")):
        yield partial(_step, path)
    if (manifest := root / _CAPTIONS_HOME / "manifest.json").is_file():
        yield partial(_caption_usage, manifest)
    for path in sorted((root / STATE / "answers" / CAPTIONS).glob("*.sqlite")):
        yield partial(_spent, path)


def _disk(root: Path) -> Iterator[Sample]:
    facts = os.statvfs(root)
    yield Sample("univigu_disk_free_bytes", facts.f_bavail * facts.f_frsize)
    yield Sample("univigu_disk_size_bytes", facts.f_blocks * facts.f_frsize)


def _training(root: Path, step: str, note: Any, failure: Any) -> Iterator[Sample]:
    settings, metrics = note["parameters"], dict(note["metrics"])
    if failure and (said := _NOT_FINITE.search(failure["message"])):
        metrics["loss"] = float(said[1])
    section, latest = step.replace("-", "_"), note["latest"]
    steps, interval = settings[f"{section}.steps"], settings[f"{section}.checkpoint_every"]
    seconds = _seconds_per_step(note, settings[f"{section}.batch_size"])
    try:
        saved = (root / STATE / "scratch" / step / "checkpoints" / "latest").stat().st_mtime
    except FileNotFoundError:
        saved = 0.0
    values = {
        "univigu_training_active": note["status"] == "RUNNING",
        "univigu_training_step": latest["step"],
        "univigu_training_steps": steps,
        "univigu_training_updated_timestamp_seconds": latest["time"],
        "univigu_training_remaining_seconds": seconds * (steps - latest["step"]),
        "univigu_training_checkpoint_timestamp_seconds": max(saved, note["started"]),
        "univigu_training_checkpoint_interval_seconds": seconds * interval,
        **{name: metrics[key] for name, key in _MEASURED.items() if key in metrics},
    }
    for name, value in values.items():
        yield Sample(name, float(value), (step,))


def _seconds_per_step(note: Mapping[str, Any], batch_size: int) -> float:
    """The time of a step with its share of evaluations and checkpoints; without these after the first step."""
    began, latest = note["began"], note["latest"]
    if latest["step"] > began["step"]:
        return (latest["time"] - began["time"]) / (latest["step"] - began["step"])
    return batch_size / note["metrics"]["samples_per_second"]


def _queue(_: str, note: Any) -> Iterator[Sample]:
    labels, waiting = (str(note["step"]), str(note["job"])), note["until"] is None
    yield Sample("univigu_queue_waiting", float(waiting), labels)
    yield Sample("univigu_queue_wait_seconds", (time.time() if waiting else note["until"]) - note["since"], labels)


def _deferred(_: str, note: Any) -> Iterator[Sample]:
    yield Sample("univigu_deferred_since_timestamp_seconds", float(note["since"]), (str(note["run"]),))
    yield Sample("univigu_deferred_end_timestamp_seconds", float(note["end"]), (str(note["run"]),))


def _failure(step: str, note: Any) -> Iterator[Sample]:
    yield Sample("univigu_step_failed", 1.0, (step, str(note["error"])))
    yield Sample("univigu_step_failed_timestamp_seconds", float(note["time"]), (step,))


def _step(path: Path) -> Iterator[Sample]:
    """The record of a step's last run that succeeded (`components.pipeline.runner`)."""
    record, labels = read_json_object(path), (path.stem,)
    yield Sample("univigu_step_seconds", float(record["seconds"]), labels)
    yield Sample("univigu_step_finished_timestamp_seconds", path.stat().st_mtime, labels)
    yield Sample("univigu_step_rows_in", float(record["rows_in"]), labels)
    yield Sample("univigu_step_rows_out", float(record["rows_out"]), labels)
    yield Sample("univigu_step_peak_memory_bytes", record["peak_rss_mb"] * 2.0**20, labels)
    for reason, count in record["reasons"].items():
        yield Sample("univigu_step_quarantined_rows", float(count), (path.stem, reason))
    if path.stem == CAPTIONS:
        yield Sample("univigu_captions_per_second", record["rows_out"] / record["seconds"])


def _caption_usage(manifest: Path) -> Iterator[Sample]:
    for unit, amount in read_json_object(manifest)["facts"].get("usage", {}).items():
        yield Sample("univigu_caption_usage", float(amount), (unit,))


def _spent(path: Path) -> Iterator[Sample]:
    """The sums of the captioner's journal, which grow with each request (`components.captions.captioners.client`)."""
    with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=1)) as journal:
        for unit, amount in journal.execute("SELECT name, amount FROM spent").fetchall():
            yield Sample("univigu_caption_spent_total", float(amount), (str(unit),))
