"""Batches of an evaluation that are kept until it ends, so that a killed one resumes."""

import numpy as np

from components.evaluation.samples import BASE_TASK, UNREAD, Sampler, load_batch, save_batch


def test_a_kept_batch_is_read_back_and_a_damaged_one_is_none(tmp_path):
    save_batch(tmp_path / "one", {"texts": ["a six", "a two"], "frames": [np.zeros((2, 4, 4, 3), np.uint8)] * 2})
    found = load_batch(tmp_path / "one")
    assert found["texts"] == ["a six", "a two"]
    assert np.stack(found["frames"]).shape == (2, 2, 4, 4, 3)
    with (tmp_path / "one/arrays.safetensors").open("ab") as file:
        file.write(b"\0")
    assert load_batch(tmp_path / "one") is None


def test_clips_that_were_read_go_also_if_the_run_ended_just_before_it_removed_them(tmp_path):
    sampler = object.__new__(Sampler)  # a kept batch needs no model
    sampler.kept = tmp_path
    save_batch(tmp_path / f"{UNREAD}0", {"frames": [np.zeros((2, 4, 4, 3), np.uint8)]})
    save_batch(tmp_path / f"{BASE_TASK}-0", {"seen": ["a six"]})
    assert sampler.batch(BASE_TASK, 0, [], 0) == {"seen": ["a six"]}
    assert [path.name for path in tmp_path.iterdir()] == [f"{BASE_TASK}-0"]
