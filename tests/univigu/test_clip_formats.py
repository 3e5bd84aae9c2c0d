"""Clips for people: mp4, webm and gif, equal bytes for equal frames, and small ones enlarged."""

import numpy as np
import pytest

from components.digits import world
from univigu.clip_formats import SUFFIXES, encode_clip, enlarge, enlargement
from univigu.errors import BadInputError
from univigu.video import fit_frames, read_video


@pytest.fixture(scope="module")
def digits():
    attributes = [world.sample_attributes(np.random.default_rng(0))]
    return world.render(attributes, world.draw_scans(attributes, world.train_scans(), 0), 0)[0]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_enlarged_clip_gives_the_model_the_frames_that_it_made(digits, suffix):
    content = encode_clip(enlarge(digits, 8), 8, suffix)
    read, fps = read_video(content)
    assert (read.shape, fps) == ((9, 256, 256, 3), pytest.approx(8, rel=0.05))  # a gif counts hundredths of a second
    fitted = fit_frames(read, 9, 32, 32)
    assert np.abs(fitted.astype(int) - digits).mean() < 1
    assert encode_clip(enlarge(digits, 8), 8, suffix.upper()) == content


def test_a_gif_keeps_odd_sides_and_up_to_256_colours_exactly():
    frames = np.random.default_rng(0).integers(0, 6, (3, 9, 7, 3), dtype=np.uint8) * 51
    read, _ = read_video(encode_clip(frames, 10, ".gif"))
    assert np.abs(read.astype(int) - frames).max() <= 1
    assert read_video(encode_clip(frames, 10, ".webm"))[0].shape == (3, 8, 6, 3)


def test_another_format_is_refused(digits):
    with pytest.raises(BadInputError, match=r"\.mp4, \.webm, \.gif, and not as '\.avi'"):
        encode_clip(digits, 8, ".avi")


@pytest.mark.parametrize(("size", "factor"), [((32, 32), 8), ((48, 64), 5), ((100, 200), 2), ((480, 832), 1)])
def test_a_clip_is_enlarged_to_at_most_256_pixels(size, factor):
    assert enlargement(*size) == factor
