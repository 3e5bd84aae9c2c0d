"""The scenes of a video: its parts between cuts, as `components.checks.cuts` finds them.

The frames come from our own decoder, so that limits, hidden frames and the times of frames are those of the clips;
PySceneDetect opens no file.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from components.checks import cuts
from components.clips.windows import Scene


def find_scenes(source: bytes | Path, end: float, threshold: float) -> list[Scene]:
    """The scenes of a video of `end` seconds; the whole video is decoded.

    threshold: how many times the mean change around it a cut's change is, at least. Raises as `read_video` does.
    """
    starts = [0.0, *find_cuts(source, threshold)]
    return [Scene(start, stop) for start, stop in zip(starts, [*starts[1:], end], strict=True) if stop > start]


def find_cuts(source: bytes | Path, threshold: float) -> list[float]:
    """The times of the first frames after cuts, in seconds from the first frame; raises as `read_video` does."""
    from univigu.video import small_frames

    times: list[float] = []  # exact where rates vary, unlike numbers of frames

    def frames() -> Iterator[np.ndarray]:
        for time, frame in small_frames(source, cuts.SIDE):
            times.append(time)
            yield frame

    return [times[number] for number in cuts.find_cuts(frames(), threshold)]
