"""Clips and captions of the built-in toy dataset that contradict their prompt or leave out an attribute of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.checks import Finding
from components.digits import measure, world

# Measurements with a lower confidence are ignored. The confidence is the margin between the two nearest candidates, and
# for the digit the vote of its neighbours. Each threshold is the smallest of 0.5, 0.6 ... above which 98 % of the
# values were right on blurred, noisy clips of every fifth training scan, with templates of the other four fifths; a
# test chooses the thresholds again.
CONFIDENT = {**dict.fromkeys(world.ATTRIBUTES, 0.5), "digit": 0.9}


def check(frames: np.ndarray, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Finding]:
    """The finding for each clip of frames uint8 (B, F, H, W, 3), with `prompt` in its row: `wrong_<attribute>`."""
    return [compare(row["prompt"], seen) for row, seen in zip(rows, measure.measure(frames), strict=True)]


def compare(prompt: str, seen: Mapping[str, measure.Measurement]) -> Finding:
    """The finding for the attributes that were measured in a clip of `prompt`."""
    scores = {f"{name}_confidence": round(float(found.confidence), 3) for name, found in seen.items()}
    for name, asked in world.read_text(prompt).items():
        found = seen[name]
        if asked and found.value not in asked and found.confidence >= CONFIDENT[name]:
            detail = f"{name}: the prompt says {' or '.join(sorted(asked))}, the frames show {found.value}"
            return Finding(scores, f"wrong_{name}", detail)
    return Finding(scores)


def check_caption(prompt: str, caption: str) -> str | None:
    """The attribute of `prompt` that a caption leaves out, contradicts or gives twice, or None."""
    said = world.read_text(caption)
    for name, asked in world.read_text(prompt).items():
        if asked and not said[name] & asked:
            return f"it does not say that the {name} is {' or '.join(sorted(asked))}, as the prompt does"
        if len(said[name]) > 1:
            return f"it gives the {name} more than one value: {', '.join(sorted(said[name]))}"
    return None
