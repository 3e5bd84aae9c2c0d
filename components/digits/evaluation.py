"""The digits dataset for `univigu evaluate`: its held-out items, with references, and what texts and videos show."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from components.digits import benchmark, world

SHAPE = (world.FRAMES, world.SIZE, world.SIZE)  # of a clip: frames, height, width
REFERENCES = 3  # captions of each clip, in different wordings
ATTRIBUTES = benchmark.ATTRIBUTES

asked = benchmark.asked
claims = world.read_text  # every value that a text states, by attribute
left_open = benchmark.left_open
read_text = benchmark.read_text
recognise = benchmark.recognise
render = benchmark.render
truth = benchmark.truth


def open_items(path: Path) -> dict[str, Any]:
    """The whole held-out set: ``captions``, ``generations``, ``joint``, each a list of items, and its ``sha256``."""
    return benchmark.load_heldout(path)


def references(item: Mapping[str, Any]) -> Sequence[str]:
    """True captions of a held-out clip: the plain wording, and others that its seed draws."""
    rng = np.random.default_rng((item["seed"], 1))
    attributes = benchmark.truth(item)
    varied = [world.write_caption(attributes, rng) for _ in range(REFERENCES - 1)]
    return [world.write_plain_caption(attributes), *varied]
