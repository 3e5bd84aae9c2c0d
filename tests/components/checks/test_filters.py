"""The filters of one's own videos find what they look for in real pictures, and let the same clip without it pass."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter

from components.checks import (
    cuts,
    load_caption_checks,
    near_duplicate,
    on_screen_text,
    require_packages,
    slides,
    unsafe,
)
from univigu.errors import ConfigError
from univigu.video import decode_mp4, encode_mp4, fit_frames

HEIGHT, WIDTH, FRAMES = 240, 416, 17


def scene(seed, frames=FRAMES, speed=4):
    """A camera that moves over a smooth picture; each seed gives another."""
    noise = np.random.default_rng(seed).normal(size=(HEIGHT, WIDTH + speed * frames, 3))
    picture = gaussian_filter(noise, (9, 9, 0))
    picture = (255 * (picture - picture.min()) / np.ptp(picture)).astype(np.uint8)
    return np.stack([picture[:, speed * number : speed * number + WIDTH] for number in range(frames)])


def write_on(clip, text, size, opacity=255):
    """The clip with a text burnt into its frames."""
    layer = Image.new("RGBA", (WIDTH, HEIGHT))
    font = ImageFont.load_default(size=size)
    ImageDraw.Draw(layer).text((WIDTH * 0.1, HEIGHT * 0.8), text, fill=(255, 255, 255, opacity), font=font)
    frames = (Image.alpha_composite(Image.fromarray(frame).convert("RGBA"), layer).convert("RGB") for frame in clip)
    return np.stack([np.asarray(frame) for frame in frames])


def examine(module, *clips, **settings):
    return module.check(np.stack(clips), [{}] * len(clips), {**module.DEFAULTS, **settings})


@pytest.mark.slow
def test_subtitles_and_watermarks_are_found_and_the_same_clip_without_them_is_not():
    clip = scene(0)
    subtitled, marked = write_on(clip, "Subscribe to my channel", 24), write_on(clip, "stock footage", 14, opacity=128)
    plain, first, second = examine(on_screen_text, clip, subtitled, marked)
    assert (plain.reason, plain.scores) == (None, {"text": 0.0})
    assert (first.reason, second.reason) == ("on_screen_text", "on_screen_text")
    assert "Subscribe to my channel" in first.detail
    assert first.scores["text"] > second.scores["text"] > 0.002


def test_harmless_pictures_are_not_unsafe_and_the_score_is_a_probability_of_the_packages_weights():
    """No unsafe picture is kept here: what is tested is that the network decides, and that its figure decides."""
    clips = scene(0), write_on(scene(1), "A title", 40), np.full((FRAMES, HEIGHT, WIDTH, 3), 128, np.uint8)
    found = examine(unsafe, *clips)
    assert [finding.reason for finding in found] == [None] * 3
    figures = [finding.scores["unsafe"] for finding in found]
    assert len(set(figures)) == 3
    assert all(0 < figure < 0.5 for figure in figures)
    prediction = unsafe.classifier().classify(Image.fromarray(clips[2][0]))
    assert prediction.sfw + prediction.nsfw == pytest.approx(1, abs=1e-5)
    assert figures[2] == round(prediction.nsfw, 4)
    (refused,) = examine(unsafe, clips[2], max_unsafe=figures[2] / 2)
    assert refused.reason == "unsafe"


def test_a_cut_inside_a_clip_is_found_at_its_frame_and_a_fast_camera_is_none():
    cut = np.concatenate([scene(0)[:8], scene(1)[8:]])
    found = examine(cuts, cut, scene(0), scene(0, speed=12))
    assert [finding.reason for finding in found] == ["cuts", None, None]
    assert found[0].detail == "another scene begins at frame 8"


def test_a_slide_show_is_found_and_a_moving_camera_and_animation_on_twos_are_not():
    show = np.concatenate([scene(seed, 1).repeat(6, axis=0) for seed in range(3)])[:FRAMES]
    twos = scene(0).repeat(2, axis=0)[:FRAMES]
    found = examine(slides, show, scene(0), twos)
    assert [finding.reason for finding in found] == ["slides", None, None]
    assert [finding.scores["still_share"] for finding in found] == [0.875, 0.0, 0.5]


def encode_again(clip):
    """A copy at two thirds of the size, brighter, with the losses of a second encoding."""
    small = fit_frames(clip, len(clip), HEIGHT * 2 // 3, WIDTH * 2 // 3 + 1)[:, :, :276]
    brighter = (small.astype(int) + 12).clip(0, 255).astype(np.uint8)
    return decode_mp4(encode_mp4(brighter, 16, "yuv420p"))[0]


def test_a_copy_that_was_encoded_again_and_scaled_is_near_and_another_clip_is_far():
    clips = [scene(0), encode_again(scene(0)), scene(1)]
    hashes = [near_duplicate.hash_clip(clip, 4) for clip in clips]
    first, copy, other = near_duplicate.compare(hashes, ["a", "b", "c"], None)
    assert first is None
    assert copy.index == 0
    assert copy.distance < near_duplicate.DEFAULTS["max_distance"] / 2
    assert other.distance > 3 * near_duplicate.DEFAULTS["max_distance"]


def test_of_several_copies_the_first_stays_and_one_video_has_no_copies_in_itself():
    code, near, far = "0" * 16, "0" * 15 + "1", "f" * 16
    found = list(near_duplicate.compare([code, near, code, far, near], ["a", "a", "b", "c", "d"], 0.1))
    assert [nearest and (nearest.index, round(nearest.distance * 64)) for nearest in found] == [
        None,
        None,
        (0, 0),
        (1, 63),
        (1, 0),
    ]


@pytest.mark.parametrize("module", [on_screen_text, unsafe])
def test_a_missing_package_is_named_with_the_command_that_installs_it(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module.REQUIRES[-1], None)
    with pytest.raises(
        ConfigError, match=r"is missing; install the extra `filters`: `pip install 'uni-vigu\[filters\]'`"
    ):
        require_packages([module])


def test_a_caption_that_speaks_of_the_camera_is_found_unless_its_prompt_does():
    (check,) = load_caption_checks(["camera_words"])
    assert check.reason == "camera_words"
    plain = "A man with a camera films a paper clip; the image on his screen is blurred, and a dog follows him."
    assert check.find("a man", plain) is None
    said = "The camera slowly pans over a beach."
    assert "camera slowly" in check.find("a beach", said)
    assert check.find("the camera pans over a beach", said) is None
    for caption in (
        "In this video a dog runs.",
        "A close-up of a dog.",
        "The clip ends with a dog.",
        "We zoom in on a dog.",
    ):
        assert check.find("a dog", caption) is not None
    (lenient,) = load_caption_checks([{"camera_words": {"kinds": ["movement"], "most": 1}}])
    assert lenient.find("a beach", said + " In this video, a dog runs.") is None
    with pytest.raises(ConfigError, match="no kind 'sound'"):
        load_caption_checks([{"camera_words": {"kinds": ["sound"]}}])[0].find("", "")
