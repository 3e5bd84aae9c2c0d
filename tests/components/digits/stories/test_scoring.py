"""Scores add up: what is not right is contradicted or left out, and grammar is counted apart from truth."""

import json

import numpy as np
import pytest

from components.digits.stories.scenes import sample_scene
from components.digits.stories.scoring import score_items, score_texts
from components.digits.stories.writer import write_caption


@pytest.fixture(scope="module")
def told():
    rng = np.random.default_rng(11)
    drawn = [sample_scene(rng) for _ in range(60)]
    return drawn, [write_caption(scene, rng) for scene in drawn]


def test_true_captions_score_full_marks(told):
    scores = score_texts(*told)
    assert {name: score["value"] for name, score in scores.items() if not name.startswith("right.")} == {
        "right": 1.0,
        "contradicted": 0.0,
        "left_out": 0.0,
        "whole": 1.0,
    }
    assert {score["n"] for name, score in scores.items() if name in ("right", "whole")} == {60}
    assert {"right.digit", "right.place", "right.first", "right.then", "right.passes"} <= scores.keys()


def test_captions_of_other_scenes_are_grammatical_and_wrong(told):
    drawn, captions = told
    scores = score_texts(drawn, captions[1:] + captions[:1])
    assert scores["whole"]["value"] == 1
    assert scores["right"]["value"] < 0.3
    assert scores["contradicted"]["value"] > 0.7


def test_empty_texts_leave_everything_out(told):
    scores = score_texts(told[0], [""] * 60)
    assert "contradicted" not in scores
    assert (scores["left_out"]["value"], scores["right"]["value"], scores["whole"]["value"]) == (1, 0, 0)


def test_the_items_of_an_evaluation_are_scored_by_the_way_of_captioning(told):
    rows = [
        {"task": task, "truth": json.dumps(scene), "text": text}
        for scene, caption in zip(*told, strict=True)
        for task, text in (("captions", caption), ("captions_in_1_steps", f"{caption} a a"), ("generation", None))
    ]
    scores = score_items(rows)
    assert {task: by_name["whole"]["value"] for task, by_name in scores.items()} == {
        "captions": 1.0,
        "captions_in_1_steps": 0.0,
    }
