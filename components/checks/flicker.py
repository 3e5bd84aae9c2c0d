"""Clips with flickering brightness.

Brightness is averaged over the cells of a grid, so that motion has little effect. The measure is the distance of each
cell from the mean of the frames before and after, so that fades and pans have no effect, and cuts have little.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.checks import Finding

DEFAULTS = {
    "max_flicker": 6.0,  # grey levels, averaged over the grid and the clip
    "grid": 4,  # cells per side
}


def check(frames: np.ndarray, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Finding]:
    """The finding for each clip of frames uint8 (B, F, H, W, 3): its `flicker`, also the reason if it is too high."""
    return [_examine(clip, settings["max_flicker"], settings["grid"]) for clip in frames]


def _examine(clip: np.ndarray, most: float, grid: int) -> Finding:
    if len(clip) < 3:
        return Finding({"flicker": 0.0})
    step = max(1, min(clip.shape[1:3]) // 240)  # large frames are subsampled
    rows = np.array_split(clip[:, ::step, ::step].mean(axis=-1, dtype=np.float32), grid, axis=1)
    cells = np.stack([cell.mean(axis=(1, 2)) for row in rows for cell in np.array_split(row, grid, axis=2)], axis=1)
    flicker = float(np.abs(cells[1:-1] - (cells[:-2] + cells[2:]) / 2).mean())
    scores = {"flicker": round(flicker, 3)}
    if flicker > most:
        return Finding(scores, "flicker", f"brightness jumps by {flicker:.1f} grey levels from frame to frame")
    return Finding(scores)
