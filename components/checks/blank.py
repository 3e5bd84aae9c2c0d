"""Clips without visible content."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.checks import Finding

DEFAULTS = {
    "min_contrast": 6.0,  # grey levels between the 1st and the 99th percentile of a frame, in the channel with most
}


def check(frames: np.ndarray, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Finding]:
    """The finding for each clip of frames uint8 (B, F, H, W, 3): its `contrast`, `blank` if no frame has enough."""
    return [_examine(clip, settings["min_contrast"]) for clip in frames]


def _examine(clip: np.ndarray, least: float) -> Finding:
    step = max(1, min(clip.shape[1:3]) // 240)  # large frames are subsampled
    spread = (np.percentile(frame[::step, ::step].astype(np.float32), (1, 99), axis=(0, 1)) for frame in clip)
    contrast = float(max((high - low).max() for low, high in spread))
    scores = {"contrast": round(contrast, 2)}
    if contrast < least:
        return Finding(scores, "blank", f"no frame has more than {contrast:.1f} grey levels of contrast")
    return Finding(scores)
