"""An evaluation is read completely, or reported as unreadable."""

import errno
import json

import pytest

from components.evaluation.evaluate_model import summarise_rows
from components.pipeline.tables import write_table
from components.registry import evaluations
from components.registry.evaluations import UnreadableEvaluationError, claims, read_evaluation
from univigu.errors import CorruptDataError


@pytest.fixture
def folder(tmp_path):
    rows = [
        {
            "task": task,
            "clip_id": f"heldout-{item:03d}",
            "truth": "{}",
            "correct": json.dumps({"colour": item < 5, "digit": True}),
            "open_attributes": [],
        }
        for task in ("captions", "generation", "joint", "joint_shuffled")
        for item in range(10)
    ]
    write_table(tmp_path, "items", rows)
    (tmp_path / "scores.json").write_text(json.dumps(summarise_rows(rows, seed=0)))
    return tmp_path


def test_figures_and_items_are_read(folder):
    found = read_evaluation(folder)
    assert found.scores["captions.mean"]["value"] == 0.75
    assert len(claims(found, "captions.mean")) == 10
    assert all(set(right) == {"colour"} for right in claims(found, "captions.colour").values())
    assert claims(found, "captions.beauty") == {}


@pytest.mark.parametrize(
    "figure", ["1" + "0" * 400, "1e999", "NaN", "true", '"high"', "null", "[]", "1" * 5000], ids=lambda text: text[:8]
)
def test_a_value_that_is_not_a_number_is_named(folder, figure):
    score = f'{{"value": {figure}, "low": 0, "high": 1, "n": 3}}'
    (folder / "scores.json").write_text(f'{{"captions": {{"mean": {score}}}}}')
    with pytest.raises(UnreadableEvaluationError, match=r"can't be read .*; run `evaluate-model` again"):
        read_evaluation(folder)


def test_a_version_of_an_earlier_release_has_its_scores_in_metrics_json(folder):
    scores = read_evaluation(folder).scores
    (folder / "scores.json").rename(folder / "metrics.json")
    assert read_evaluation(folder).scores == scores
    (folder / "metrics.json").write_text('{"captions": {"mean": 0.5}}')  # what the step writes now
    with pytest.raises(UnreadableEvaluationError, match="it has no scores"):
        read_evaluation(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 10**6, b'{"a":' * 900 + b"1" + b"}" * 900])
def test_damaged_metrics_are_named(folder, content):
    (folder / "scores.json").write_bytes(content)
    try:
        assert read_evaluation(folder).scores == {}  # deep, and without a figure in it
    except UnreadableEvaluationError as error:
        assert "\n" not in str(error)  # noqa: PT017 (either is right, as it depends on the depth of the stack)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"\xff\xff\xff\x7fPAR1"])
def test_damaged_items_are_named(folder, content):
    (folder / "items.parquet").write_bytes(content)
    with pytest.raises(UnreadableEvaluationError, match="can't be read"):
        read_evaluation(folder)


def test_a_failing_disk_is_not_reported_as_a_damaged_evaluation(folder, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(evaluations, "read_json_object", fail)
    with pytest.raises(CorruptDataError, match="The disk fails at"):
        read_evaluation(folder)
