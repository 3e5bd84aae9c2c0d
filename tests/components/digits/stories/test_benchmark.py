"""The held-out set is what its generator writes, holds scans that training never saw, and can be scored exactly."""

import json
from pathlib import Path

import numpy as np
import pytest

from components.digits import benchmark as first_world
from components.digits import world
from components.digits.prompts import heldout_prompts, words, write_prompts
from components.digits.stories import benchmark
from components.digits.stories.reader import read
from components.digits.stories.scenes import colours_of, relations
from components.digits.stories.writer import write_caption
from components.digits.worlds import STORIES
from components.evaluation.evaluate_model import score_everything, summarise_rows

HELDOUT = Path(__file__).resolve().parents[4] / "data" / "heldout-stories.json"


@pytest.fixture(scope="module")
def heldout() -> dict:
    return first_world.load_heldout(HELDOUT)


def test_the_committed_file_is_what_the_generator_writes(tmp_path):
    benchmark.write_heldout(tmp_path / "heldout.json")
    assert (tmp_path / "heldout.json").read_bytes() == HELDOUT.read_bytes()


def test_every_held_out_clip_shows_held_out_scans_of_its_digits(heldout):
    _, digits = world.heldout_scans()
    for item in heldout["captions"]:
        scene = item["scene"]
        assert [world.DIGITS[digits[scan]] for scan in item["scans"]] == [
            scene[f"digit:{colour}"] for colour in colours_of(scene)
        ]
        assert relations(scene) == {name: scene[name] for name in ("side", "passes") if name in scene}
    together = benchmark.render(heldout["captions"][:4])
    assert np.array_equal(together[2], benchmark.render(heldout["captions"][2:3])[0])


def test_prompts_are_of_the_grammar_and_state_as_much_as_they_should(heldout):
    prompts = {kind: [item["prompt"] for item in heldout[kind]] for kind in ("generations", "joint")}
    assert all(read(text).whole for texts in prompts.values() for text in texts if text)
    assert all(len(benchmark.asked(text)) >= benchmark.LEAST_STATED for text in prompts["generations"])
    assert prompts["joint"][:64].count("") == 4
    scene = heldout["captions"][0]["scene"]
    assert benchmark.left_open("", scene) == sorted(scene)


def test_an_evaluation_scores_true_texts_full_marks_and_counts_what_a_prompt_leaves_open(heldout):
    chosen = {kind: heldout[kind][:24] for kind in ("captions", "generations", "joint")}
    rng = np.random.default_rng(0)
    scenes = [item["scene"] for item in chosen["captions"]]
    captions = [write_caption(scene, rng) for scene in scenes]
    asked = [benchmark.asked(item["prompt"]) for item in chosen["generations"]]
    made = {
        "captions": {"texts": captions, "texts_in_1_steps": captions[1:] + captions[:1], "seen": scenes},
        "generation": {"seen": asked},
        "generation_base": {"seen": [{}] * 24},
        "joint": {"texts": captions, "seen": scenes},
    }
    metrics = summarise_rows(score_everything(benchmark, chosen, made), 0)
    assert metrics["captions"]["mean"]["value"] == metrics["generation"]["mean"]["value"] == 1
    assert metrics["joint"]["agreement"]["value"] == 1
    assert metrics["generation_base"]["mean"]["value"] == 0
    assert metrics["caption_steps"]["1"]["value"] < 0.5
    assert {"digit", "place", "first", "then", "background"} <= metrics["captions"].keys()


def test_the_bundled_prompts_are_what_the_generator_writes_and_none_is_the_evaluations():
    lines = (HELDOUT.parent / "prompts-stories" / "stories.jsonl").read_text(encoding="utf-8").splitlines()
    evaluated = heldout_prompts(HELDOUT)
    rows = write_prompts(300, 0, evaluated, STORIES)
    assert [json.dumps(row, ensure_ascii=False) for row in rows] == lines[:300]
    texts = {words(json.loads(line)["text"]) for line in lines}
    assert len(texts) == len(lines) == 4000
    assert not texts & set(map(words, evaluated))
