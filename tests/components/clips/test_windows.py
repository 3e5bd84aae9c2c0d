"""A video is cut into windows at its own speed."""

import numpy as np
import pytest

from components.clips.buckets import Bucket, Misfit, choose_native_bucket
from components.clips.windows import Scene, choose_starts, list_windows
from components.settings.sections import Fit, ImportVideos, Video


def cut(scenes, sizes, chosen):
    found = list_windows(scenes, 32, 32, sizes, chosen)
    assert isinstance(found, list)
    return found


def settings(take="windows", overlap=0.0, most=4):
    return ImportVideos.model_construct(take=take, overlap=overlap, most=most)


def video(*buckets):
    fit = Fit(upscale=1.5, cut=0.5, speed=(0.75, 4.0), hdr="tone_map")
    return Video(frames=9, height=32, width=32, fps=8, buckets=list(buckets), fit=fit)


@pytest.mark.parametrize(
    ("chosen", "starts"),
    [
        (settings("head"), [0]),
        (settings("windows"), [0, 10, 20]),
        (settings("windows", overlap=0.5), [0, 5, 10, 15, 20, 25]),
        (settings("windows", overlap=0.9), [*range(26)]),
        (settings("uniform", most=1), [12]),
        (settings("uniform", most=2), [0, 25]),
        (settings("uniform", most=9), [0, 12, 25]),
    ],
)
def test_windows_stay_within_a_scene_and_overlap_no_more_than_allowed(chosen, starts):
    assert choose_starts(35, 10, chosen) == starts


def test_frames_are_as_far_apart_as_the_profile_says_and_before_the_next_cut():
    scenes = [Scene(0.0, 1.0), Scene(1.0, 3.3), Scene(3.3, 3.6)]
    windows = cut(scenes, video(), settings())
    assert [(window.start, window.end, window.speed) for window in windows] == [(1.0, 2.125, 1.0), (2.125, 3.25, 1.0)]
    for window in windows:
        np.testing.assert_allclose(np.diff(window.times), 1 / 8)
        assert scenes[1].start < window.times[0] < window.times[-1] < scenes[1].end
    assert not any(window.whole for window in windows)


def test_a_scene_that_lacks_a_twentieth_of_a_clip_is_stretched_and_a_shorter_one_is_refused():
    (window,) = cut([Scene(0.0, 39 / 8)], video((41, 32, 32)), settings())
    assert (window.speed, len(window.times), window.whole) == (0.951, 41, True)
    misfit = list_windows([Scene(0.0, 38 / 8)], 32, 32, video((41, 32, 32)), settings())
    assert isinstance(misfit, Misfit)
    assert misfit.reason == "too_short"


def test_squeezing_takes_a_whole_scene_within_the_limits_of_speed():
    (window,) = cut([Scene(0.0, 27 / 8)], video(), settings("squeeze"))
    assert (window.speed, window.whole, window.times[-1]) == (3.0, True, 26.5 / 8)
    assert list_windows([Scene(0.0, 60 / 8)], 32, 32, video(), settings("squeeze")).reason == "too_long"


@pytest.mark.parametrize(
    ("frames", "height", "width", "bucket"),
    [
        (1000, 32, 64, (9, 32, 64)),  # the nearest aspect, whatever the duration
        (1000, 32, 32, (17, 32, 32)),  # of these the longest
        (10, 32, 32, (9, 32, 32)),  # that the video fills
    ],
)
def test_the_bucket_of_clips_at_their_own_speed_is_nearest_in_aspect(frames, height, width, bucket):
    found = choose_native_bucket(frames, height, width, video((9, 32, 32), (17, 32, 32), (9, 32, 64)))
    assert found == Bucket(*bucket)
