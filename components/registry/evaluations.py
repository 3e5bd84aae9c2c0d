"""The output of `evaluate-model`, as registration and promotion read it: scores, and the items behind them."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.evaluation import evaluate_model
from components.evaluation.evaluate_model import STEPS_TASK
from components.pipeline.digests import json_digest
from components.pipeline.tables import read_table
from univigu.errors import BadInputError, storage_fault
from univigu.evaluation.intervals import Score
from univigu.files import read_json_object

AGGREGATES = ("mean", "agreement")  # scores over all attributes of a task
HEADLINES = tuple(".".join(name) for name in evaluate_model.HEADLINES.values())  # by their dotted names
_FIGURES = ("value", "low", "high", "n")
_READ_ERRORS = (
    *(BadInputError, OSError, ValueError, LookupError, TypeError, AttributeError),
    *(OverflowError, RecursionError),  # numbers beyond the range of a float, and nesting that is too deep
)


class UnreadableEvaluationError(BadInputError):
    """An evaluation is missing, damaged, or invalid; a failing disk raises another error."""


@dataclass(frozen=True)
class Evaluation:
    """Scores by their dotted names, and scored items by the digest of the question that the model was asked."""

    scores: Mapping[str, Score]
    items: Mapping[str, Mapping[str, Any]]
    digest: str  # of the questions, not of the answers


def read_evaluation(folder: Path) -> Evaluation:
    """Read ``scores.json`` and ``items.parquet``, the output of `evaluate-model`.

    Versions that were registered before 0.3 have their scores in ``metrics.json``. Captions that were sampled with a
    number of steps other than the model's own are ignored. Raises `UnreadableEvaluationError`, or the error of
    `storage_fault` if the disk fails.
    """
    try:
        present = (folder / "scores.json").is_file() or not (folder / "metrics.json").is_file()
        scores = dict(_scores(read_json_object(folder / ("scores.json" if present else "metrics.json"))))
        if not scores:
            raise ValueError("it has no scores")
        rows = [row for row in read_table(folder, "items").to_pylist() if not STEPS_TASK.fullmatch(row["task"])]
        items = {_question_digest(row): {**row, "correct": _read_claims(row)} for row in rows}
    except _READ_ERRORS as error:
        if fault := storage_fault(error, folder):
            raise fault from error
        reason = str(error) or type(error).__name__
        raise UnreadableEvaluationError(
            f"The evaluation in {folder} can't be read ({reason}); run `evaluate-model` again."
        ) from error
    return Evaluation(scores=scores, items=items, digest=json_digest(sorted(items)))


def claims(evaluation: Evaluation, metric: str) -> dict[str, dict[str, bool]]:
    """For each question that a metric such as ``captions.mean`` covers, which attributes are correct."""
    task, _, key = metric.partition(".")
    found = {}
    for question, row in evaluation.items.items():
        if row["task"] == task:
            correct = row["correct"]
            found[question] = correct if key in AGGREGATES else {name: correct[name] for name in correct if name == key}
    return {question: correct for question, correct in found.items() if correct}


def _question_digest(row: Mapping[str, Any]) -> str:
    """A digest of the question. The reference for a clip that the model itself generated is not part of it."""
    asked = [row["task"], row["clip_id"], row["prompt"], row["open_attributes"]]
    return json_digest([*asked, None if row["open_attributes"] else row["truth"]])


def _read_claims(row: Mapping[str, Any]) -> dict[str, bool]:
    correct = json.loads(row["correct"])
    if not isinstance(correct, dict) or not all(isinstance(right, bool) for right in correct.values()):
        raise ValueError(f"'correct' of {row['clip_id']} does not map attributes to true or false")
    return correct


def _scores(metrics: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Score]]:
    for key, value in metrics.items():
        if not isinstance(value, dict):
            continue
        if not set(_FIGURES) <= value.keys():
            yield from _scores(value, f"{path}{key}.")
            continue
        if not all(type(value[name]) in (int, float) and math.isfinite(value[name]) for name in _FIGURES):
            raise ValueError(f"the values of {path}{key} are not finite numbers")
        yield f"{path}{key}", value
