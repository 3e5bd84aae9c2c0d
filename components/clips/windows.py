"""Which parts of a video become clips: windows of a bucket's length at the video's own speed, or all of it squeezed.

Times are in seconds from the video's first frame. A clip's frames are 1 / fps apart, whatever the video's own frame
rate is, so motion keeps its speed. The profile's `import_videos.take` says which windows of a longer video are used.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from components.clips.buckets import Bucket, Misfit, choose_bucket, choose_native_bucket
from components.settings.sections import ImportVideos, Video

SLACK = 0.1  # frames by which time stamps are not exact


class Window(NamedTuple):
    """A part of a video that becomes a clip."""

    start: float
    end: float
    bucket: Bucket
    times: tuple[float, ...]  # of the clip's frames
    speed: float  # 2.0 is twice as fast as the video
    whole: bool  # whether the clip is of the whole video


class Scene(NamedTuple):
    """A part of a video without a cut."""

    start: float
    end: float


def list_windows(
    scenes: Sequence[Scene], height: int, width: int, video: Video, settings: ImportVideos
) -> list[Window] | Misfit:
    """The windows of a video of this upright size; if there are none, why its longest scene doesn't fit."""
    fps = video.fps
    counts = [int((scene.end - scene.start) * fps + SLACK) for scene in scenes]
    choose = choose_bucket if settings.take == "squeeze" else choose_native_bucket
    buckets = [choose(max(count, 1), height, width, video) for count in counts]
    found = [
        window
        for scene, count, bucket in zip(scenes, counts, buckets, strict=True)
        if isinstance(bucket, Bucket)
        for window in _cut(scene, count, bucket, fps, settings)
    ]
    if found:
        return [window._replace(whole=len(scenes) == 1 and _covers(window, scenes[0], fps)) for window in found]
    misfits = [(count, bucket) for count, bucket in zip(counts, buckets, strict=True) if isinstance(bucket, Misfit)]
    _, misfit = max(misfits, key=lambda pair: pair[0])
    if len(scenes) > 1 and misfit.reason == "too_short":
        return Misfit("too_short", f"of its {len(scenes)} scenes, even the longest: {misfit.detail}")
    return misfit


def _covers(window: Window, scene: Scene, fps: float) -> bool:
    return window.start <= scene.start and scene.end - window.end < 1 / fps


def _cut(scene: Scene, count: int, bucket: Bucket, fps: float, settings: ImportVideos) -> list[Window]:
    """The windows of a scene of `count` frames; a scene that is no longer than the bucket is one window."""
    frames = bucket.frames
    if settings.take == "squeeze" or count <= frames:
        numbers = np.linspace(0, count - 1, frames).round()
        return [_window(scene.start, count, numbers, bucket, fps)]
    starts = choose_starts(count, frames, settings)
    return [_window(scene.start + start / fps, frames, np.arange(frames), bucket, fps) for start in starts]


def choose_starts(count: int, frames: int, settings: ImportVideos) -> list[int]:
    """The first frames of the windows of `frames` frames in a scene of `count` frames, at least as many."""
    stride = max(1, round(frames * (1 - settings.overlap)))
    fitting = (count - frames) // stride + 1
    if settings.take == "head":
        return [0]
    if settings.take == "windows":
        return [number * stride for number in range(fitting)]
    number = min(settings.most, fitting)
    spread = [(count - frames) / 2] if number == 1 else np.linspace(0, count - frames, number)
    return [round(float(start)) for start in spread]


def _window(start: float, count: int, numbers: np.ndarray, bucket: Bucket, fps: float) -> Window:
    """A window of `count` frames, of which a clip has those with these numbers."""
    # In the middle of each frame's interval, because timestamps are not exact.
    times = tuple((start + (numbers + 0.5) / fps).tolist())
    return Window(start, start + count / fps, bucket, times, round(count / bucket.frames, 3), False)
