"""Clips and captions of the embedded world that measurably contradict their prompt, or leave out what it says."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.checks import Finding
from components.digits import measure, world

# A measurement below this decides nothing: margins between the two nearest candidates, and for the digit a vote of its
# neighbours. Of the tenths from a half up, each is the least above which 98 % of the values were right on blurred,
# noisy clips of every fifth training scan, measured with templates of the other four; a test chooses them again.
CONFIDENT = {**dict.fromkeys(world.ATTRIBUTES, 0.5), "digit": 0.9}


def check(frames: np.ndarray, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Finding]:
    """One finding a clip of frames uint8 (B, F, H, W, 3), with `prompt` in its row: `wrong_<attribute>`, or nothing."""
    return [compare(row["prompt"], seen) for row, seen in zip(rows, measure.measure(frames), strict=True)]


def compare(prompt: str, seen: Mapping[str, measure.Measurement]) -> Finding:
    scores = {f"{name}_confidence": round(float(found.confidence), 3) for name, found in seen.items()}
    for name, asked in world.read_text(prompt).items():
        found = seen[name]
        if asked and found.value not in asked and found.confidence >= CONFIDENT[name]:
            detail = f"{name}: the prompt says {' or '.join(sorted(asked))}, the frames show {found.value}"
            return Finding(scores, f"wrong_{name}", detail)
    return Finding(scores)


def check_caption(prompt: str, caption: str) -> str | None:
    """What a caption of `prompt` leaves out, contradicts or says in two ways, or None."""
    said = world.read_text(caption)
    for name, asked in world.read_text(prompt).items():
        if asked and not said[name] & asked:
            return f"it does not say that the {name} is {' or '.join(sorted(asked))}, as the prompt does"
        if len(said[name]) > 1:
            return f"it gives the {name} more than one value: {', '.join(sorted(said[name]))}"
    return None
