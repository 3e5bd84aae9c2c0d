"""Notes for monitoring: small JSON files in the work root that say what is running, waiting or has failed.

`univigu metrics` reads them, so it needs no network and no account. A note is ``.univigu/monitor/KIND/NAME.json``. No
output depends on a note, and a note that can't be written or removed stops no work.
"""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from components.pipeline.state import STATE
from univigu.files import read_json_object, write_json

TRAINING = "training"  # a training run's newest metrics; `components.tracking` writes it
QUEUE = "queue"  # how long a TrainJob has waited for its nodes
DEFERRED = "deferred"  # a run that an Airflow task waits for, and its time limit
FAILURE = "failure"  # the error that ended a step's last run
METRICS_EVERY_S = 10.0  # between two writings of a run's metrics
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def note_path(root: Path, kind: str, name: str) -> Path:
    """The file of a note; characters of `name` that are unusual in a file's name are replaced."""
    return root / STATE / "monitor" / kind / f"{_UNSAFE.sub('_', name)[:100].lstrip('.') or '_'}.json"


def write_note(path: Path, content: Mapping[str, Any]) -> None:
    """Write a note, or leave the old one where the disk is full or read-only."""
    with suppress(OSError, ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)


def remove_note(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def read_notes(root: Path, kind: str) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """Each note of a kind, in the order of their names; None for one that can't be read."""
    for path in sorted((root / STATE / "monitor" / kind).glob("*.json")):
        try:
            yield path, read_json_object(path)
        except FileNotFoundError:
            continue  # removed meanwhile
        except (OSError, ValueError):
            yield path, None


class MetricsNote:
    """The note of a training run: its newest metrics, its parameters, and whether it is running.

    ``began`` and ``latest`` are the first and the newest step that this process has trained, with their Unix times.
    """

    def __init__(self, path: Path, parameters: Mapping[str, Any]) -> None:
        self.path, self._written = path, 0.0
        self._content: dict[str, Any] = {"parameters": dict(parameters), "started": time.time(), "metrics": {}}

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Merge in what was measured at a step; metrics without a speed are those of an interrupted run."""
        self._content["metrics"] |= {name: float(value) for name, value in metrics.items()}
        if "samples_per_second" in metrics:
            self._content["latest"] = {"step": step, "time": time.time()}
            self._content.setdefault("began", self._content["latest"])
            if time.monotonic() - self._written > METRICS_EVERY_S or not self._written:
                self._write("RUNNING")

    def end(self, status: str) -> None:
        """Write the last metrics and how the run ended; nothing for a run that trained no step."""
        if "latest" in self._content:
            self._write(status)

    def _write(self, status: str) -> None:
        self._written = time.monotonic()
        write_note(self.path, {**self._content, "status": status})


class QueueNote:
    """The note of a TrainJob: since when it waits for its nodes, and until when it waited."""

    def __init__(self, path: Path, job: str, step: str) -> None:
        self.path, self._waiting = path, False
        self._content: dict[str, Any] = {"job": job, "step": step}

    def update(self, waiting: bool) -> None:
        """Note the time if the job has begun to wait, or has stopped waiting."""
        if waiting != self._waiting:
            self._waiting = waiting
            self._content |= {"since": time.time(), "until": None} if waiting else {"until": time.time()}
            write_note(self.path, self._content)
