"""Training runs and steps as the studio shows them: from the notes in the work root, and from MLflow."""

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from components.cli.studio.training import LOSSES, read_losses
from components.cli.studio.work import Studio, explain
from components.orchestration.metrics import Sample, read_samples
from components.pipeline.notes import FAILURE, read_notes
from components.pipeline.stages import STAGES, find_stage
from components.registry.evaluations import HEADLINES, read_evaluation
from components.tracking import EXPERIMENT, store_to_read
from univigu.errors import BadInputError, MissingInputError
from univigu.mlflow_store import opened

MOST_RUNS = 100  # in the list of runs
MOST_POINTS = 400  # of a curve
LARGEST_TABLE = 4 << 20  # bytes of a run's table of samples
SILENT_S = 120.0  # after which a training process is doubted
FIRST = ("loss", "video_mse", "text_ce", "token_accuracy")  # metrics that are listed first
HELDOUT = "heldout_"
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_STEP = re.compile(r"step-(\d{8})")
_FILE = re.compile(r"\d+-[\w-]{1,60}\.mp4")


class Run(NamedTuple):
    """A training run in MLflow."""

    id: str
    label: str
    metrics: tuple[str, ...]
    ended: bool


class Point(NamedTuple):
    """A point of a run's curve: the mean over some consecutive steps."""

    run: str
    step: float
    value: float


# --- from the work root ----------------------------------------------------------------------------------------------


def read_work(root: Path) -> dict[str, list[dict[str, Any]]]:
    """What is training (`training`), and how each step ended last (`steps`); needs no MLflow."""
    samples = read_samples(root)
    values = {(one.name, one.labels): one.value for one in samples}
    failures = {path.stem: note or {} for path, note in read_notes(root, FAILURE)}

    def value(name: str, step: str) -> float | None:
        return values.get((f"univigu_{name}", (step,)))

    names = [stage.name for stage in STAGES]
    return {
        "training": [_training(name, value) for name in names if value("training_steps", name)],
        "steps": [
            {
                "name": name,
                "finished": _when(value("step_finished_timestamp_seconds", name)),
                "seconds": value("step_seconds", name),
                "rows_in": value("step_rows_in", name),
                "rows_out": value("step_rows_out", name),
                "rejected": _rejected(samples, name),
                "failure": failures[name].get("message", "it failed") if name in failures else "",
            }
            for name in names
        ],
    }


def read_results(root: Path) -> dict[str, Any]:
    """Held-out `losses` by tau with their `loss_names`, and the `scores` of the last evaluation, or their error."""
    return {"losses": read_losses(root), "loss_names": LOSSES, "scores": _read_scores(root)}


def _read_scores(root: Path) -> list[tuple[str, Any]] | str:
    """The headline scores of the last evaluation, none where there was none, or why they can't be read."""
    folder = root / find_stage("evaluate-model").home
    if not (folder / "scores.json").is_file():
        return []
    try:
        return _headlines(folder, (folder / "scores.json").stat().st_mtime_ns)
    except Exception as error:
        return explain(error)


@lru_cache(maxsize=2)
def _headlines(folder: Path, _changed: int) -> list[tuple[str, Any]]:
    found = read_evaluation(folder).scores
    return [(key, found[key]) for key in HEADLINES if key in found]


def _training(step: str, value: Any) -> dict[str, Any]:
    silent = time.time() - value("training_updated_timestamp_seconds", step)
    active = bool(value("training_active", step))
    return {
        "name": step,
        "active": active and silent < SILENT_S,
        "silent": f"{silent / 60:.0f} minutes" if active and silent >= SILENT_S else "",
        "at": int(value("training_step", step)),
        "steps": int(value("training_steps", step)),
        "loss": value("training_loss", step),
        "speed": value("training_samples_per_second", step),
        "remaining": _duration(value("training_remaining_seconds", step)),
    }


def _rejected(samples: Sequence[Sample], step: str) -> str:
    found = [one for one in samples if one.name == "univigu_step_quarantined_rows" and one.labels[0] == step]
    return ", ".join(f"{one.labels[1]} {one.value:.0f}" for one in found)


def _when(timestamp: float | None) -> str:
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d %H:%M") if timestamp else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


# --- from MLflow -----------------------------------------------------------------------------------------------------


@contextmanager
def _client(studio: Studio) -> Iterator[Any]:
    with studio.store:
        store = store_to_read(studio.root, "start a training run")
        with opened(store):
            from mlflow import MlflowClient

            yield MlflowClient()


def list_runs(studio: Studio) -> list[Run]:
    """The training runs in MLflow, the newest first. Raises `MissingInputError` if there is no tracking store yet."""
    with _client(studio) as client:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return []
        found = client.search_runs(
            [experiment.experiment_id], "metrics.loss > -1e300", max_results=MOST_RUNS, order_by=["start_time DESC"]
        )
    return [
        Run(
            run.info.run_id,
            f"{run.info.run_name}, {_when(run.info.start_time / 1000)} ({run.info.status.lower()}, "
            f"{run.info.run_id[:6]})",
            tuple(sorted(run.data.metrics)),
            run.info.status != "RUNNING",
        )
        for run in found
    ]


def list_metrics(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """The names of the metrics of some runs: those of training, and those of held-out samples."""
    names = sorted({name for run in runs for name in run.metrics})
    training = [name for name in names if not name.startswith(HELDOUT)]
    first = [name for name in FIRST if name in training]
    return [*first, *(name for name in training if name not in first)], [
        one for one in names if one.startswith(HELDOUT)
    ]


def read_curves(studio: Studio, runs: Sequence[Run], metric: str) -> list[Point]:
    """The curves of a metric, each of at most `MOST_POINTS` points."""
    points = []
    for run in runs:
        if metric in run.metrics:
            with _client(studio) as client:
                history = client.get_metric_history(run.id, metric)
            points += [Point(run.label, *pair) for pair in thin([(one.step, one.value) for one in history])]
    return points


def thin(pairs: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` means over consecutive pairs (step, value), in the order of the steps."""
    pairs = sorted(pairs)
    size = max(1, -(-len(pairs) // most))
    groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def read_run_samples(studio: Studio, run: Run) -> dict[int, list[dict[str, Any]]]:
    """What a run captioned and generated on the way, by step: `prompt`, `target`, `said`, and `video`, a name or ""."""
    with _client(studio) as client:
        if not any(one.path == "samples.json" for one in client.list_artifacts(run.id)):
            return {}
        path = Path(client.download_artifacts(run.id, "samples.json", _folder(studio, run.id)))
        if path.stat().st_size > LARGEST_TABLE:
            raise BadInputError(f"The samples of this run have more than {LARGEST_TABLE >> 20} MB; see them in MLflow.")
        table = json.loads(path.read_text(encoding="utf-8"))
        steps: dict[int, list[dict[str, Any]]] = {}
        for row in table["data"]:
            one = dict(zip(table["columns"], row, strict=True))
            steps.setdefault(int(one["step"]), []).append({**one, "video": ""})
        for step, rows in steps.items():
            for artifact in client.list_artifacts(run.id, f"samples/step-{step:08d}"):
                number, _, _ = Path(artifact.path).name.partition("-")
                if number.isdecimal() and int(number) < len(rows):
                    rows[int(number)]["video"] = (
                        f"{run.id}/{Path(artifact.path).parent.name}/{Path(artifact.path).name}"
                    )
    return steps


def read_sample_video(studio: Studio, name: str) -> bytes:
    """The mp4 of a sample that `read_run_samples` named; raises `MissingInputError` if there is none."""
    run_id, _, rest = name.partition("/")
    step, _, file = rest.partition("/")
    if not (_RUN_ID.fullmatch(run_id) and _STEP.fullmatch(step) and _FILE.fullmatch(file)):
        raise MissingInputError("There is no such sample; open the page of runs again.")
    with _client(studio) as client:
        folder = f"samples/{step}"
        if not any(Path(one.path).name == file for one in client.list_artifacts(run_id, folder)):
            raise MissingInputError("There is no such sample; open the page of runs again.")
        return Path(client.download_artifacts(run_id, f"{folder}/{file}", _folder(studio, run_id))).read_bytes()


def _folder(studio: Studio, run_id: str) -> str:
    """Where files of a tracking server are put."""
    folder = studio.cache / "runs" / run_id
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)
