"""Scenes stay what their facts say: paths meet nothing, relations follow from them, and pictures are repeatable."""

import numpy as np
import pytest

from components.digits import world
from components.digits.stories import scenes


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    return [scenes.sample_scene(rng) for _ in range(1500)]


def test_two_digits_of_different_colours_never_touch_and_something_moves(drawn):
    for scene in drawn:
        one, other = scenes.colours_of(scene)
        assert one != other
        paths = np.array([scenes.path_of(scene, colour) for colour in (one, other)], np.float32)
        frames = scenes.positions(paths)
        seen = (np.abs(frames).max(-1) < 2).all(0)  # both
        assert np.abs(frames[0] - frames[1]).max(-1)[seen].min(initial=9) >= scenes.LEAST_GAP
        assert (paths[:, 0] != paths[:, 2]).any() or (paths[:, 0] != paths[:, 1]).any()


def test_relations_are_those_that_the_frames_show(drawn):
    passed = 0
    for scene in drawn:
        assert scenes.relations(scene) == {name: scene[name] for name in ("side", "passes") if name in scene}
        if "passes" in scene:
            passed += 1
            one, word, *_, other = scene["passes"].split()
            paths = np.array([scenes.path_of(scene, colour) for colour in (one, other)], np.float32)
            half = scenes.passing_half(scene)
            gap = (scenes.positions(paths)[0] - scenes.positions(paths)[1])[4 * half : 4 * half + 5]
            along = 0 if word == "above" else 1
            assert np.sign(gap[0, along]) == -np.sign(gap[-1, along]) != 0
            assert (gap[:, 1 - along] < 0).all()
    assert passed > 500
    assert scenes.relation("red", "below", "blue") == scenes.relation("blue", "above", "red") == "blue above red"


def test_every_kind_of_movement_and_every_look_occurs(drawn):
    values = {value for scene in drawn for name, value in scene.items() if not name.startswith(("passes", "side"))}
    actions = {action for kind in scenes.tracks().values() for track in kind for action in track[1:3] if action}
    assert values == {*actions, *world.DIGITS, *world.PLACES, *world.BACKGROUNDS}


def test_rendering_is_repeatable_and_shows_each_digit_in_its_colour_while_it_is_in_the_frame(drawn):
    scans = scenes.draw_scans(drawn[:64], world.train_scans(), 1)
    clips = scenes.render(drawn[:64], scans, 5)
    assert clips.shape == (64, world.FRAMES, world.SIZE, world.SIZE, 3)
    assert clips.dtype == np.uint8
    assert (clips == scenes.render(drawn[:64], scans, 5)).all()
    assert (clips[:, 2:4] == scenes.render(drawn[:64], scans, 5, slice(2, 4))).all()
    for scene, clip in zip(drawn[:64], clips.astype(int), strict=True):
        for colour in scenes.colours_of(scene):
            where = scenes.positions(np.array(scenes.path_of(scene, colour), np.float32))
            away = np.abs(clip - world.COLOURS[colour]).max(-1)
            for frame, at in zip(away, where, strict=True):
                shown = (frame < 30).sum()
                assert shown > 3 if np.abs(at).max() <= 1 else np.abs(at).max() < 2.19 or shown == 0
