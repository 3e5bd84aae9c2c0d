"""The bundled recogniser, on clips of scans that it was not trained on."""

from pathlib import Path

import numpy as np
import pytest

from components.digits import world
from components.digits.autoencoder import draw_clips
from components.digits.recogniser import BUNDLED, load_recogniser, recognise
from univigu.errors import BadInputError, MissingInputError


@pytest.mark.slow
def test_held_out_scans_are_recognised():
    frames, truth = draw_clips(512, 17, world.heldout_scans())
    seen = recognise(frames)
    right = {n: np.mean([s[n] == t[n] for s, t in zip(seen, truth, strict=True)]) for n in world.ATTRIBUTES}
    assert np.mean(list(right.values())) > 0.975, right
    assert right["digit"] > 0.93


def test_it_reads_the_frames_and_not_their_order_in_the_batch():
    frames, _ = draw_clips(8, 18, world.heldout_scans())
    assert recognise(frames[::-1].copy()) == recognise(frames)[::-1]
    backwards = recognise(frames[:, ::-1].copy())
    turned = {"left": "right", "right": "left", "up": "down", "down": "up"}
    assert [turned[row["direction"]] for row in backwards] == [row["direction"] for row in recognise(frames)]


def test_the_bundle_is_small():
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 2_000_000


def test_bad_input_is_named(tmp_path: Path):
    with pytest.raises(MissingInputError):
        load_recogniser(tmp_path)
    with pytest.raises(BadInputError):
        recognise(np.zeros((1, 5, 32, 32, 3), np.uint8))
