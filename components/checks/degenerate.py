"""Clips that show nothing: blank, frozen, or broken into noise."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.checks import Finding

MIN_CONTRAST = 6.0  # grey levels between the 1st and the 99th percentile of a frame, in its liveliest channel
MIN_MOTION = 4.0  # grey levels by which the 99.5th percentile of the pixels changes, at the liveliest transition
MIN_SMOOTHNESS = 0.3  # correlation of neighbouring pixels: about 0 for noise, over 0.7 for a picture


def check(frames: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """One finding a clip of frames uint8 (B, F, H, W, 3): `blank`, `frozen`, `broken`, or none of them."""
    return [_examine(clip.astype(np.float32)) for clip in frames]


def _examine(clip: np.ndarray) -> Finding:
    low, high = np.percentile(clip, (1, 99), axis=(1, 2))
    contrast = float((high - low).max())
    changes = np.abs(np.diff(clip, axis=0))
    motion = float(np.percentile(changes, 99.5, axis=(1, 2, 3)).max()) if len(changes) else 0.0
    smoothness = float(np.median([_neighbour_correlation(frame) for frame in clip]))
    scores = {"contrast": round(contrast, 2), "motion": round(motion, 2), "smoothness": round(smoothness, 3)}
    if contrast < MIN_CONTRAST:
        return Finding(scores, "blank", f"no frame has more than {contrast:.1f} grey levels of contrast")
    if smoothness < MIN_SMOOTHNESS:
        return Finding(scores, "broken", f"neighbouring pixels correlate by {smoothness:.2f} only, as in noise")
    if len(clip) > 1 and motion < MIN_MOTION:
        return Finding(scores, "frozen", f"no pixel changes by more than {motion:.1f} grey levels between two frames")
    return Finding(scores)


def _neighbour_correlation(frame: np.ndarray) -> float:
    """Correlation between horizontally and vertically adjacent pixels of one frame (H, W, 3); 1 for a flat one."""
    centred = frame - frame.mean(axis=(0, 1))
    variance = float((centred**2).mean())
    if variance < 1e-6:
        return 1.0
    across = float((centred[:, 1:] * centred[:, :-1]).mean())
    down = float((centred[1:] * centred[:-1]).mean())
    return (across + down) / (2 * variance)
