"""Clips that nearly equal an earlier one: copies that were encoded again, scaled, or changed in brightness.

A frame's hash is 64 signs of the low frequencies of its brightness (pHash), and a clip has those of some frames. Which
clip is earlier is known only when all have a hash, so `check` gives a clip its hash, and `univigu data import` compares
them (`compare`). A copy that is mirrored, cropped a lot, or cut at another time is not found.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from components.checks import Finding

DEFAULTS = {
    "max_distance": 0.1,  # share of the bits in which a copy differs
    "frames": 4,  # spread evenly over a clip
}
HASH = "picture_hash"  # among the scores until the clips are compared; hexadecimal
SIDE, LOW = 32, 8  # pixels per side of a frame, and frequencies per side


class Nearest(NamedTuple):
    """The most similar earlier clip of another video."""

    index: int
    distance: float  # share of the bits in which both differ


def check(frames: np.ndarray, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Finding]:
    """The finding for each clip of frames uint8 (B, F, H, W, 3): its hash; no reason, since others aren't known."""
    # pyrefly: ignore[bad-assignment]
    return [Finding({HASH: hash_clip(clip, settings["frames"])}) for clip in frames]


def hash_clip(clip: np.ndarray, count: int) -> str:
    """The hash of a clip, uint8 (F, H, W, 3): 16 hexadecimal digits for each of `count` frames."""
    chosen = clip[np.linspace(0, len(clip) - 1, count).round().astype(int)]
    return "".join(f"{_hash_frame(frame):016x}" for frame in chosen)


def _hash_frame(frame: np.ndarray) -> int:
    from PIL import Image
    from scipy.fft import dctn

    small = Image.fromarray(frame).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    low = dctn(np.asarray(small, np.float64))[:LOW, :LOW].ravel()
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def compare(hashes: Sequence[str], videos: Sequence[str], most: float | None) -> Iterator[Nearest | None]:
    """For each clip, the most similar earlier one of another video; clips are compared only with those that stay.

    most: clips at this distance or less don't stay; None: all do. The first of several copies always stays.
    """
    codes = np.array([[int(code[at : at + 16], 16) for at in range(0, len(code), 16)] for code in hashes], np.uint64)
    _, numbers = np.unique(np.array(videos, object), return_inverse=True)
    stays = np.zeros(len(codes), bool)
    for index, code in enumerate(codes):
        earlier = np.flatnonzero(stays[:index] & (numbers[:index] != numbers[index]))
        nearest = None
        if len(earlier):
            distances = np.bitwise_count(codes[earlier] ^ code).mean(axis=1) / 64
            best = int(distances.argmin())
            nearest = Nearest(int(earlier[best]), float(distances[best]))
        stays[index] = most is None or nearest is None or nearest.distance > most
        yield nearest
