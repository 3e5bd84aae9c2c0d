"""What `evaluate-model` measured, as registration and promotion read it: figures, and the scored items behind them."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.evaluation.evaluate_model import STEPS_TASK
from components.pipeline.digests import json_digest
from components.pipeline.tables import read_table
from univigu.errors import BadInputError, storage_fault
from univigu.evaluation.intervals import Score
from univigu.files import read_json_object

SUMS = ("mean", "agreement")  # scores over all attributes of a task
_FIGURES = ("value", "low", "high", "n")
_NO_EVALUATION = (
    *(BadInputError, OSError, ValueError, LookupError, TypeError, AttributeError),
    *(OverflowError, RecursionError),  # of numbers beyond any float, and of nesting without end
)


class UnreadableEvaluationError(BadInputError):
    """An evaluation is missing, damaged, or makes no sense; that the disk doesn't read it is another matter."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured: figures by their dotted names, and the scored items by what was asked of the model."""

    scores: Mapping[str, Score]
    items: Mapping[str, Mapping[str, Any]]
    digest: str  # of what was asked, whatever the model answered


def read_evaluation(folder: Path) -> Evaluation:
    """What `evaluate-model` left: ``metrics.json`` and ``items.parquet``.

    Captions in other numbers of steps than the model's own are no part of the comparison. Raises
    `UnreadableEvaluationError`, and what `storage_fault` says where the disk doesn't read the files.
    """
    try:
        scores = dict(_scores(read_json_object(folder / "metrics.json")))
        rows = [row for row in read_table(folder, "items").to_pylist() if not STEPS_TASK.fullmatch(row["task"])]
        items = {_question(row): {**row, "correct": _claims_of(row)} for row in rows}
    except _NO_EVALUATION as error:
        if fault := storage_fault(error, folder):
            raise fault from error
        said = str(error) or type(error).__name__
        raise UnreadableEvaluationError(
            f"The evaluation in {folder} can't be read ({said}); run `evaluate-model` again."
        ) from error
    return Evaluation(scores=scores, items=items, digest=json_digest(sorted(items)))


def claims(evaluation: Evaluation, metric: str) -> dict[str, dict[str, bool]]:
    """What was right and wrong, by what was asked, of the items that a metric such as ``captions.mean`` is about."""
    task, _, key = metric.partition(".")
    found = {}
    for question, row in evaluation.items.items():
        if row["task"] == task:
            correct = row["correct"]
            found[question] = correct if key in SUMS else {name: correct[name] for name in correct if name == key}
    return {question: correct for question, correct in found.items() if correct}


def _question(row: Mapping[str, Any]) -> str:
    """A digest of what was asked; the truth about a clip that the model made itself is no part of that."""
    asked = [row["task"], row["clip_id"], row["prompt"], row["open_attributes"]]
    return json_digest([*asked, None if row["open_attributes"] else row["truth"]])


def _claims_of(row: Mapping[str, Any]) -> dict[str, bool]:
    correct = json.loads(row["correct"])
    if not isinstance(correct, dict) or not all(isinstance(right, bool) for right in correct.values()):
        raise ValueError(f"what was right about {row['clip_id']} is no table of true and false")
    return correct


def _scores(metrics: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Score]]:
    for key, value in metrics.items():
        if not isinstance(value, dict):
            continue
        if not set(_FIGURES) <= value.keys():
            yield from _scores(value, f"{path}{key}.")
            continue
        if not all(type(value[name]) in (int, float) and math.isfinite(value[name]) for name in _FIGURES):
            raise ValueError(f"the figures of {path}{key} are no numbers")
        yield f"{path}{key}", value
