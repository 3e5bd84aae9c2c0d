"""The captioner's eyes, on clips of scans that they have no template of."""

import numpy as np
import pytest

from components.digits import world
from components.digits.measure import measure
from univigu.errors import BadInputError


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(4)
    attributes = [world.sample_attributes(rng) for _ in range(256)]
    scans = world.draw_scans(attributes, world.heldout_scans(), 4)
    return world.render(attributes, scans, 4), attributes


def test_attributes_of_held_out_scans_are_measured(clips):
    frames, truth = clips
    seen = measure(frames)
    right = {n: np.mean([s[n].value == t[n] for s, t in zip(seen, truth, strict=True)]) for n in world.ATTRIBUTES}
    assert right.pop("digit") > 0.95
    assert min(right.values()) > 0.99, right


def test_confidence_is_higher_where_the_digit_is_right(clips):
    frames, truth = clips
    noisy = np.clip(frames + np.random.default_rng(0).normal(0, 45, frames.shape), 0, 255).astype(np.uint8)
    seen = measure(noisy)
    right = np.array([s["digit"].value == t["digit"] for s, t in zip(seen, truth, strict=True)])
    sure = np.array([s["digit"].confidence for s in seen])
    assert 0 < right.mean() < 1
    assert sure[right].mean() > sure[~right].mean()
    assert ((sure >= 0) & (sure <= 1)).all()


def test_an_empty_clip_has_a_background_and_nothing_else():
    (seen,) = measure(np.full((1, world.FRAMES, world.SIZE, world.SIZE, 3), 246, np.uint8))
    assert seen["background"].value == "white"
    assert seen["background"].confidence > 0.9
    assert all(m.confidence == 0 for name, m in seen.items() if name != "background")


def test_measuring_does_not_depend_on_the_batch(clips):
    frames, _ = clips
    together = measure(frames[:3])
    alone = [measure(frames[i : i + 1])[0] for i in range(3)]
    for a, b in zip(together, alone, strict=True):
        assert {n: m.value for n, m in a.items()} == {n: m.value for n, m in b.items()}


def test_other_shapes_are_refused():
    with pytest.raises(BadInputError):
        measure(np.zeros((1, 9, 32, 32, 3), np.float32))
