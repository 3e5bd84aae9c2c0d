"""Clips that show only noise."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.checks import Finding

DEFAULTS = {
    "min_smoothness": 0.3,  # correlation of neighbouring pixels: about 0 for noise, over 0.7 for a picture
}
FRAMES = 16  # spread evenly; a noisy clip is noisy in all frames


def check(frames: np.ndarray, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Finding]:
    """The finding for each clip of frames uint8 (B, F, H, W, 3): its `smoothness`, `broken` if it is noise."""
    return [_examine(clip, settings["min_smoothness"]) for clip in frames]


def _examine(clip: np.ndarray, least: float) -> Finding:
    some = np.linspace(0, len(clip) - 1, min(FRAMES, len(clip))).round().astype(int)
    smoothness = float(np.median([_neighbour_correlation(clip[index].astype(np.float32)) for index in some]))
    scores = {"smoothness": round(smoothness, 3)}
    if smoothness < least:
        return Finding(scores, "broken", f"neighbouring pixels correlate by {smoothness:.2f} only, as in noise")
    return Finding(scores)


def _neighbour_correlation(frame: np.ndarray) -> float:
    """Correlation of horizontally and vertically adjacent pixels of a frame (H, W, 3); 1 for a uniform frame."""
    centred = frame - frame.mean(axis=(0, 1))
    variance = float((centred**2).mean())
    if variance < 1e-6:
        return 1.0
    across = float((centred[:, 1:] * centred[:, :-1]).mean())
    down = float((centred[1:] * centred[:-1]).mean())
    return (across + down) / (2 * variance)
