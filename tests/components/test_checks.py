"""Checks find what they are for, and let good clips pass."""

import numpy as np
import pytest
from scipy.ndimage import uniform_filter

from components.captioners.measured import decide
from components.checks import degenerate, digits, texts
from components.digits import measure, world
from components.digits.measure import Measurement


@pytest.fixture(scope="module")
def clips():
    """40 rendered clips, uint8 (40, F, H, W, 3), and their attributes."""
    rng = np.random.default_rng(3)
    attributes = [world.sample_attributes(rng) for _ in range(40)]
    return world.render(attributes, world.draw_scans(attributes, world.heldout_scans(), 3), 3), attributes


def reasons(frames):
    return [finding.reason for finding in degenerate.check(frames, [{}] * len(frames))]


def test_clips_that_show_something_pass(clips):
    assert reasons(clips[0]) == [None] * 40


def test_blank_frozen_and_broken_clips_are_found(clips):
    rng = np.random.default_rng(0)
    blank = np.full((9, 32, 32, 3), 112) + rng.integers(-1, 2, (9, 32, 32, 3))
    frozen = np.repeat(clips[0][0][:1], 9, axis=0).astype(int) + rng.integers(-1, 2, (9, 32, 32, 3))
    noise = rng.integers(0, 256, (9, 32, 32, 3))
    saturated = 255 * rng.integers(0, 2, (9, 32, 32, 3))
    found = np.stack([blank, frozen, noise, saturated]).clip(0, 255).astype(np.uint8)
    assert reasons(found) == ["blank", "frozen", "broken", "broken"]


def test_one_frame_is_not_called_frozen(clips):
    assert reasons(clips[0][:2, :1]) == [None, None]


def test_a_true_prompt_passes_and_a_false_one_is_named(clips):
    frames, attributes = clips
    rng = np.random.default_rng(1)
    prompts = [world.write_prompt(one, rng) for one in attributes]
    kept = [f.reason is None for f in digits.check(frames, [{"prompt": prompt} for prompt in prompts])]
    assert np.mean(kept) > 0.95
    others = [next(value for value in world.COLOURS if value != one["colour"]) for one in attributes]
    found = digits.check(frames, [{"prompt": f"something {colour}"} for colour in others])
    assert [finding.reason for finding in found] == ["wrong_colour"] * 40
    assert "the frames show" in found[0].detail


def test_an_unclear_clip_is_given_the_benefit_of_the_doubt():
    unclear = {name: Measurement(values[0], 0.1) for name, values in world.ATTRIBUTES.items()}
    assert digits.compare("a green two on white moving left", unclear).reason is None


@pytest.fixture
def left_out(monkeypatch):
    """Every fifth training scan, of which `measure` has no template meanwhile."""
    scans, labels = world.train_scans()
    out = np.arange(len(labels)) % 5 == 0
    monkeypatch.setattr(world, "train_scans", lambda: (scans[~out], labels[~out]))
    measure._templates.cache_clear()
    yield scans[out], labels[out]
    measure._templates.cache_clear()


def test_the_confidence_asked_for_is_what_training_scans_call_for(left_out):
    rng = np.random.default_rng(0)
    attributes = [world.sample_attributes(rng) for _ in range(1536)]
    frames = world.render(attributes, world.draw_scans(attributes, left_out, 0), 0)
    blurred = uniform_filter(frames.astype(np.float32), (0, 0, 3, 3, 0))
    noisy = np.clip(blurred + rng.normal(0, 16, frames.shape), 0, 255).astype(np.uint8)
    seen = measure.measure(noisy)
    for name, least in digits.CONFIDENT.items():
        sure = np.array([one[name].confidence for one in seen])
        right = np.array([one[name].value == true[name] for one, true in zip(seen, attributes, strict=True)])
        tenths = [tenth / 10 for tenth in range(5, 10)]
        assert least == next(tenth for tenth in tenths if right[sure >= tenth].mean() >= 0.98), name


def test_a_caption_must_say_what_its_prompt_says_and_say_it_once():
    prompt = "a green two moving left"
    assert digits.check_caption(prompt, "The green digit two moves left from the top-right.") is None
    assert "green" in digits.check_caption(prompt, "The digit two moves left.")
    assert "direction" in digits.check_caption(prompt, "The green digit two moves right.")
    assert "more than one" in digits.check_caption(prompt, "The green digit two, or a red two, moves left.")


def test_a_prompt_in_another_dress_is_no_caption():
    assert texts.repeats_prompt("a red-ish two, moving left", "A red ish two moving left!")
    assert not texts.repeats_prompt("a red two", "a red two moving left")


def test_the_captioner_believes_clear_frames_then_the_prompt_then_unclear_frames():
    truth = {"digit": "two", "colour": "red", "background": "black"}
    truth |= {"direction": "left", "speed": "fast", "start": "top-right", "end": "top-left"}
    silent = {name: set() for name in truth}
    clear = {name: Measurement(value, 0.95) for name, value in truth.items()}
    assert decide(clear, silent) == truth
    assert decide(clear, {**silent, "colour": {"blue"}}) == truth
    unclear = {**clear, "colour": Measurement("red", 0.2)}
    assert decide(unclear, silent)["colour"] == "red"
    assert decide(unclear, {**silent, "colour": {"blue"}})["colour"] == "blue"


def test_the_course_that_the_captioner_states_is_possible():
    rng = np.random.default_rng(0)
    for _ in range(50):
        seen = {name: Measurement(str(rng.choice(values)), rng.random()) for name, values in world.ATTRIBUTES.items()}
        said = decide(seen, {name: set() for name in seen})
        assert world.end_place(said["start"], said["direction"], said["speed"]) == said["end"]
