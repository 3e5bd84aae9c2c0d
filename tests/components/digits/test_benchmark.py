"""The held-out set is what its generator writes, holds only what training never saw, and can be scored exactly."""

import json
from pathlib import Path

import numpy as np
import pytest

from components.digits import benchmark, world
from univigu.errors import CorruptDataError, MissingInputError

HELDOUT = Path(__file__).resolve().parents[3] / "data" / "heldout.json"


@pytest.fixture(scope="module")
def heldout() -> dict:
    return benchmark.load_heldout(HELDOUT)


def test_the_committed_file_is_what_the_generator_writes(tmp_path):
    benchmark.write_heldout(tmp_path / "heldout.json")
    assert (tmp_path / "heldout.json").read_bytes() == HELDOUT.read_bytes()


def test_no_held_out_scan_is_among_the_training_scans(heldout):
    train = {scan.tobytes() for scan in world.train_scans()[0]}
    scans, digits = world.heldout_scans()
    used = [item["scan"] for item in heldout["captions"]]
    assert len(set(used)) == len(scans)
    assert not any(scans[index].tobytes() in train for index in used)
    assert all(world.DIGITS[digits[i["scan"]]] == i["attributes"]["digit"] for i in heldout["captions"])


def test_a_changed_or_missing_held_out_set_is_refused(tmp_path, heldout):
    changed = json.loads(json.dumps(heldout))
    changed["captions"][3]["attributes"]["colour"] = "pink"
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    with pytest.raises(CorruptDataError, match="SHA-256"):
        benchmark.load_heldout(tmp_path / "changed.json")
    with pytest.raises(MissingInputError):
        benchmark.load_heldout(tmp_path / "none.json")


def test_a_clip_does_not_depend_on_its_neighbours(heldout):
    together = benchmark.render(heldout["captions"][:8])
    alone = benchmark.render(heldout["captions"][5:6])
    assert together.dtype == np.uint8
    assert together.shape == (8, world.FRAMES, world.SIZE, world.SIZE, 3)
    assert np.array_equal(together[5], alone[0])


def test_full_prompts_state_everything_and_joint_prompts_leave_something_open(heldout):
    assert all(set(benchmark.asked(item["prompt"])) == set(world.ATTRIBUTES) for item in heldout["generations"])
    assert all(len(benchmark.left_open(item["prompt"])) >= 2 for item in heldout["joint"])
    assert sum(item["prompt"] == "" for item in heldout["joint"][:64]) == 4
    assert all(world.count_words(item["prompt"]) < world.MAX_PROMPT_TOKENS for item in heldout["joint"])


def test_what_a_prompt_settles_is_not_open():
    assert benchmark.left_open("") == list(world.ATTRIBUTES)
    settled = benchmark.left_open("a red seven moving right slowly, starting at the top-left")
    assert settled == ["background"]  # the end follows from the start, the direction and the speed


def test_a_text_that_names_two_values_says_neither():
    assert "colour" not in benchmark.read_text("a red and blue seven on a white background")
    assert benchmark.read_text("a red seven")["colour"] == "red"
