"""Clips without any change between frames."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from components.checks import Finding

DEFAULTS = {
    "min_motion": 4.0,  # grey levels: 99.5th percentile of the change of pixels, at the transition with most
}


def check(frames: np.ndarray, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Finding]:
    """The finding for each clip of frames uint8 (B, F, H, W, 3): its `motion`, `frozen` if no two frames differ."""
    return [_examine(clip, settings["min_motion"]) for clip in frames]


def _examine(clip: np.ndarray, least: float) -> Finding:
    step = max(1, min(clip.shape[1:3]) // 240)  # large frames are subsampled
    small = (frame.astype(np.float32) for frame in clip[:, ::step, ::step])
    motion = max((float(np.percentile(np.abs(after - before), 99.5)) for before, after in pairwise(small)), default=0.0)
    scores = {"motion": round(motion, 2)}
    if len(clip) > 1 and motion < least:
        return Finding(scores, "frozen", f"no pixel changes by more than {motion:.1f} grey levels between two frames")
    return Finding(scores)
