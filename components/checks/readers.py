"""Independent readers: how well a caption fits its clip, by a model that wrote none of the captions.

A reader is a function of a clip's frames, uint8 (F, H, W, 3), and its caption. On the built-in toy dataset it is the
recogniser: the score is the share of what the caption claims that it sees as well. Otherwise it is a CLIP-like model:
the score is the cosine similarity of frames and caption, of which CLIP reads the first 77 tokens.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from univigu.errors import ConfigError

Reader = Callable[[np.ndarray, str], float]


def load_reader(model: Path | None) -> Reader:
    """The reader with a model in a folder, or the recogniser; raises `MissingInputError` if it can't be loaded."""
    return read_attributes if model is None else _by_clip(model)


def read_attributes(frames: np.ndarray, caption: str) -> float:
    """The share of the attributes that a caption claims once and that the recogniser sees; 0 if it claims none.

    Raises `ConfigError` if the clip has not the size of the toy dataset's.
    """
    from components.digits import benchmark, world

    if frames.shape != (world.FRAMES, world.SIZE, world.SIZE, 3):
        raise ConfigError(
            "These clips aren't the toy dataset's, so its recogniser can't read them; name the folder of a CLIP-like "
            "model as 'validate_data.caption_quality.model'."
        )
    (seen,) = benchmark.recognise(frames[None])
    said = benchmark.read_text(caption)
    return sum(seen[name] == value for name, value in said.items()) / len(said) if said else 0.0


@cache
def _by_clip(folder: Path) -> Reader:
    from univigu.evaluation.clip import load

    scorer = load(folder)

    def similarity(frames: np.ndarray, caption: str) -> float:
        import torch

        (video,) = scorer.videos(frames[None])
        return float(torch.nn.functional.normalize(video, dim=-1) @ scorer.texts([caption])[0])

    return similarity
