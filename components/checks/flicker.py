"""Clips whose brightness jumps to and fro.

Brightness is averaged over the cells of a grid, so that what moves hardly counts; of each cell, what counts is how far
a frame lies from the mean of its two neighbours, so that neither a fade nor a pan counts, and a cut does so little.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.checks import Finding

DEFAULTS = {
    "max_flicker": 6.0,  # grey levels, as a mean over the grid and the clip
    "grid": 4,  # cells a side
}


def check(frames: np.ndarray, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Finding]:
    """One finding a clip of frames uint8 (B, F, H, W, 3): its `flicker`, and `flicker` as the reason above the most."""
    return [_examine(clip, settings["max_flicker"], settings["grid"]) for clip in frames]


def _examine(clip: np.ndarray, most: float, grid: int) -> Finding:
    if len(clip) < 3:
        return Finding({"flicker": 0.0})
    step = max(1, min(clip.shape[1:3]) // 240)  # of a large frame, every n-th pixel tells as much
    rows = np.array_split(clip[:, ::step, ::step].mean(axis=-1, dtype=np.float32), grid, axis=1)
    cells = np.stack([cell.mean(axis=(1, 2)) for row in rows for cell in np.array_split(row, grid, axis=2)], axis=1)
    flicker = float(np.abs(cells[1:-1] - (cells[:-2] + cells[2:]) / 2).mean())
    scores = {"flicker": round(flicker, 3)}
    if flicker > most:
        return Finding(scores, "flicker", f"brightness jumps by {flicker:.1f} grey levels from frame to frame")
    return Finding(scores)
