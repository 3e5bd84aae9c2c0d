"""The world: motions stay on the grid, pictures are repeatable, and texts say what they were written to say."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from components.digits import world
from components.digits.tokenizer import build_tokenizer, corpus
from univigu.errors import BadInputError


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(corpus(1000, 0), 64)


def test_every_motion_ends_on_the_grid_where_its_direction_and_speed_lead():
    for motion in world.motions():
        start, end = (np.array(world.place_centre(motion[name])) for name in ("start", "end"))
        step = np.array(world.STEPS[motion["direction"]]) * world.CELLS[motion["speed"]] * world.CELL
        assert np.allclose(end - start, step)
    assert len(world.motions()) == 4 * (6 + 3)


def test_sampling_keeps_what_is_fixed_and_is_uniform_over_digits():
    rng = np.random.default_rng(0)
    drawn = [world.sample_attributes(rng, start="centre", colour="cyan") for _ in range(2000)]
    assert all(a["start"] == "centre" and a["colour"] == "cyan" and a["speed"] == "slow" for a in drawn)
    counts = [sum(a["digit"] == d for a in drawn) for d in world.DIGITS]
    assert min(counts) > 140


@pytest.mark.parametrize("fixed", [{"colour": "mauve"}, {"start": "centre", "speed": "fast"}, {"shape": "round"}])
def test_sampling_refuses_what_the_world_does_not_have(fixed):
    with pytest.raises(BadInputError):
        world.sample_attributes(np.random.default_rng(0), **fixed)


def test_held_out_scans_are_every_fifth_and_in_no_training_set():
    train, _ = world.train_scans()
    held_out, digits = world.heldout_scans()
    assert len(held_out) == 360
    assert len(train) == 1437
    assert set(digits) == set(range(10))


def test_rendering_is_repeatable_and_a_part_of_the_frames_is_part_of_the_clip():
    rng = np.random.default_rng(1)
    attributes = [world.sample_attributes(rng) for _ in range(6)]
    scans = world.draw_scans(attributes, world.train_scans(), 1)
    clips = world.render(attributes, scans, 5)
    assert clips.shape == (6, world.FRAMES, world.SIZE, world.SIZE, 3)
    assert clips.dtype == np.uint8
    assert (clips == world.render(attributes, scans, 5)).all()
    assert (clips[:, 2:4] == world.render(attributes, scans, 5, slice(2, 4))).all()
    assert (clips != world.render(attributes, scans, 6)).any()


def test_captions_say_all_seven_attributes_and_fit_their_range_of_tokens(tokenizer):
    rng = np.random.default_rng(2)
    for _ in range(500):
        attributes = world.sample_attributes(rng)
        caption = world.write_caption(attributes, rng)
        assert world.read_text(caption) == {name: {value} for name, value in attributes.items()}, caption
        assert 32 <= len(tokenizer(caption).input_ids) <= 64, caption


def test_every_fact_of_a_plain_caption_keeps_its_place_among_the_tokens(tokenizer):
    rng = np.random.default_rng(2)
    tokens = []
    for _ in range(100):
        attributes = world.sample_attributes(rng)
        caption = world.write_plain_caption(attributes)
        assert world.read_text(caption) == {name: {value} for name, value in attributes.items()}, caption
        tokens.append(tokenizer(caption).input_ids)
    tokens = np.array(tokens)
    assert tokens.shape == (100, 38)
    assert ((tokens != tokens[0]).any(0)).sum() == len(world.ATTRIBUTES)


def test_prompts_never_contradict_and_are_shorter_than_any_caption(tokenizer):
    rng = np.random.default_rng(3)
    texts = set()
    for _ in range(500):
        attributes = world.sample_attributes(rng)
        prompt = world.write_prompt(attributes, rng)
        said = world.read_text(prompt)
        assert all(values <= {attributes[name]} for name, values in said.items()), prompt
        assert said["digit"] or said["colour"]
        assert len(tokenizer(prompt).input_ids) <= world.MAX_PROMPT_TOKENS
        texts.add(prompt)
    assert len(texts) > 450


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A magenta 7 on gray", {"digit": {"seven"}, "colour": {"pink"}, "background": {"grey"}}),
        ("red or blue five", {"digit": {"five"}, "colour": {"red", "blue"}}),
        ("it moves from left to right, quickly", {"direction": {"right"}, "speed": {"fast"}}),
        ("from the top left to the center", {"start": {"top-left"}, "end": {"centre"}}),
        ("a three at the bottom", {"digit": {"three"}}),
        ("starts bottom-right. Ends at the top right, going upwards", {"start": {"bottom-right"}}),
        ("", {}),
        ("a dog in a park", {}),
    ],
)
def test_free_text_is_read(text, expected):
    said = world.read_text(text)
    assert set(said) == set(world.ATTRIBUTES)
    for name, values in expected.items():
        assert said[name] == values
    if "Ends" not in text:
        assert {name for name, values in said.items() if values} == set(expected)


def test_tokenizer_takes_any_text_and_gives_ascii_back(tokenizer):
    for text in ("A red seven moves.", "Hello wOrld 42% (x)", "a  b   c", "back\\slash\ttab", ""):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer("caf\u00e9 \u65e5").input_ids[-2:] == [2, 1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert all(len(tokenizer(word).input_ids) == 2 for values in world.ATTRIBUTES.values() for word in values)


def test_the_scans_are_those_of_scikit_learn():
    bunch = load_digits()
    every = np.arange(len(bunch.target)) % world.HOLDOUT_EVERY
    for held_out, (scans, digits) in ((False, world.train_scans()), (True, world.heldout_scans())):
        chosen = (every == 0) == held_out
        assert (scans == bunch.images[chosen]).all()
        assert (digits == bunch.target[chosen]).all()
