"""A probe that only a model that sees several pictures at once can answer correctly: which colours they have."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# A text-only model would guess other colours than these two.
_SHOWN = {"orange": (255, 140, 0), "purple": (120, 30, 160)}
_CHOICES = ("black", "blue", "green", "orange", "purple", "red", "white", "yellow")
QUESTION = (
    f"Choose from {', '.join(_CHOICES)}. Which of these colours do the pictures have? Answer with their names alone."
)
WORDS = "Answer with the word: ready."  # for a text-only model


def colours(count: int) -> list[str]:
    """The colours of `count` pictures, by name."""
    return sorted({*_order(count)})


def pictures(count: int) -> "Iterator[np.ndarray]":
    """`count` single-coloured pictures, uint8 (64, 64, 3)."""
    import numpy as np

    for colour in _order(count):
        yield np.full((64, 64, 3), _SHOWN[colour], np.uint8)


def is_right(answer: str, count: int) -> bool:
    """Whether an answer names the colours of `count` pictures, and at most one more, as in "red-orange and purple"."""
    shown, named = {*_order(count)}, {*re.findall(r"\w+", answer.lower())} & {*_CHOICES}
    return shown <= named and len(named) <= len(shown) + 1


def _order(count: int) -> list[str]:
    return ["orange", *["purple"] * (count - 1)]
