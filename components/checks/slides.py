"""Slide shows: clips that stand still, except for a few changes between pictures.

`frozen` finds clips without any change. A picture that a camera slowly zooms into is not found.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from components.checks import Finding

DEFAULTS = {
    "min_change": 2.0,  # grey levels: 99.5th percentile of the change of pixels; with less, two frames are the same
    "max_still": 0.75,  # share of the transitions between frames; animation drawn on every second frame has 0.5
}


def check(frames: np.ndarray, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Finding]:
    """The finding for each clip of frames uint8 (B, F, H, W, 3): its `still_share`, `slides` if it is too large."""
    return [_examine(clip, settings["min_change"], settings["max_still"]) for clip in frames]


def _examine(clip: np.ndarray, least: float, most: float) -> Finding:
    step = max(1, min(clip.shape[1:3]) // 240)  # large frames are subsampled
    small = (frame.astype(np.float32) for frame in clip[:, ::step, ::step])
    still = [float(np.percentile(np.abs(after - before), 99.5)) < least for before, after in pairwise(small)]
    share = float(np.mean(still)) if still else 0.0
    scores = {"still_share": round(share, 4)}
    if share > most:
        return Finding(scores, "slides", f"at {share:.0%} of its transitions the picture stays the same")
    return Finding(scores)
