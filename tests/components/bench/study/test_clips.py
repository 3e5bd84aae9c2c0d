"""A probe's clips are those of its scenes, in other lengths and sizes; a block is kept out by its words."""

import json

import numpy as np
import pytest

from components.bench.study.arms import Probe
from components.bench.study.blocks import exclude
from components.bench.study.clips import draw_items, redraw, render_clips, resample
from components.bench.study.gallery import choose
from components.digits import benchmark, world
from components.pipeline.edits import read_edits
from components.pipeline.tables import write_table
from univigu.errors import BadInputError, ConfigError

HELDOUT = [
    {"id": f"h{n}", "scan": n, "seed": n, "attributes": world.sample_attributes(np.random.default_rng(n), digit="two")}
    for n in range(3)
]


def probe(**changes):
    return Probe(name="one", family="generalisation", question="Why?", **changes)


def test_fewer_frames_are_taken_evenly_and_of_more_the_last_one_stays():
    clips = np.arange(9, dtype=np.uint8)[None, :, None, None, None] * np.ones((2, 1, 4, 4, 3), np.uint8)
    assert resample(clips, 5, None)[1, :, 0, 0, 0].tolist() == [0, 2, 4, 6, 8]
    assert resample(clips, 1, None)[0, :, 0, 0, 0].tolist() == [4]
    assert resample(clips, 11, None)[0, :, 0, 0, 0].tolist() == [*range(9), 8, 8]
    assert resample(clips, None, None) is clips


def test_a_clip_in_another_size_shows_the_same():
    clips = benchmark.render(HELDOUT)
    for size in (16, 48):
        other = resample(clips, None, size)
        assert other.shape == (3, 9, size, size, 3)
        assert other.dtype == np.uint8
        assert np.abs(resample(other, None, 32).astype(int) - clips).mean() < 6


def test_handwriting_that_was_seen_shows_the_same_scene_in_other_pixels():
    items = draw_items(probe(clips="seen"), HELDOUT)
    seen, heldout = (render_clips(one, items, benchmark, None) for one in (probe(clips="seen"), probe()))
    assert [benchmark.truth(item) for item in items] == [benchmark.truth(item) for item in HELDOUT]
    assert seen.shape == heldout.shape
    assert (seen[:, 0, 0, 0] == heldout[:, 0, 0, 0]).all()  # the background
    assert (seen != heldout).any(axis=(1, 2, 3, 4)).all()


def test_redrawn_scenes_repeat_are_not_the_held_out_ones_and_stay_within_a_block():
    only = {"digit": ["two", "five"], "direction": ["up"]}
    items = redraw(only, 40)
    assert items == redraw(only, 40)
    assert {item["attributes"]["digit"] for item in items} == {"two", "five"}
    assert {item["attributes"]["direction"] for item in items} == {"up"}
    digits = world.heldout_scans()[1]
    assert [world.DIGITS[digits[item["scan"]]] for item in items] == [item["attributes"]["digit"] for item in items]
    known = {json.dumps(item["attributes"]) for item in benchmark.build_heldout()["captions"]}
    assert any(json.dumps(item["attributes"]) not in known for item in redraw({}, 40))


def test_other_clips_of_a_dataset_that_is_not_the_toy_one_are_refused():
    with pytest.raises(ConfigError, match="needs the benchmark digits"):
        draw_items(probe(clips="seen"), [{"id": "a", "clip": {}, "seed": 0}])


def test_clips_whose_prompt_or_caption_states_the_block_are_excluded_as_people_exclude_them(tmp_path):
    texts = {  # prompt and caption
        "both": ("a red two", "the digit two in red"),
        "prompt": ("draw a red two", "the digit three in red"),
        "caption": ("a digit two", "the digit two in red"),
        "other": ("a blue two", "the digit two in blue"),
        "three": ("a red three", "the digit three in red"),
    }
    size = {"stage": 1, "seed": 0, "frames": 9, "height": 32, "width": 32, "fps": 8.0, "scores": "{}"}
    made = {"generator": "g", "generator_digest": "0", "shard": "s", "member": "m"}
    rows = [
        {"id": i, "prompt_id": i, "prompt": p, "sha256": f"{n:064x}", **size, **made}
        for n, (i, (p, _)) in enumerate(texts.items())
    ]
    said = [{"clip_id": i, "text": c, "status": "success"} for i, (_, c) in texts.items()]
    for home, table, content in (("data/clips", "clips", rows), ("data/captions", "captions", said)):
        (tmp_path / home).mkdir(parents=True)
        write_table(tmp_path / home, table, content)
    assert exclude(tmp_path, {"digit": ["two"], "colour": ["red", "green"]}) == 3
    edits = read_edits(tmp_path)
    assert {(edit.id, edit.action) for edit in edits} == {(name, "exclude") for name in ("both", "prompt", "caption")}
    assert all(edit.of == next(row["sha256"] for row in rows if row["id"] == edit.id) for edit in edits)
    with pytest.raises(BadInputError, match="choose a larger block"):
        exclude(tmp_path, {"digit": ["nine"]})


def test_the_gallery_has_the_best_and_the_worst_and_no_sample_twice():
    rights = [3, 0, 2, 1, 3, 0, 1, 3, 2]
    rows = [
        {"task": "joint", "clip_id": str(n), "correct": json.dumps({name: at < right for at, name in enumerate("abc")})}
        for n, right in enumerate(rights)
    ]
    chosen = choose([*rows, {"task": "joint", "clip_id": "unscored", "correct": "{}"}])["joint"]
    assert [row["clip_id"] for rank, row in chosen if rank == "worst"] == ["1", "5", "3", "6"]
    assert [row["clip_id"] for rank, row in chosen if rank == "best"] == ["0", "4", "7", "2"]
    assert [rank for rank, _ in choose(rows[:1])["joint"]] == ["worst"]
