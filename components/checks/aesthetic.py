"""The aesthetic score of clips, by a CLIP-like model with a linear head, like the LAION aesthetic predictors.

`model` is a folder under the work root: a model of transformers with image features (CLIP, SigLIP ...) and its image
processor, and `head.safetensors` with `weight` (1, D) and `bias` (1), applied to the normalised features. Nothing is
downloaded.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from components.checks import Finding
from univigu.errors import BadInputError, MissingInputError, first_line
from univigu.local_models import LOCAL, WEIGHTS, require_safetensors

if TYPE_CHECKING:
    from torch import Tensor

DEFAULTS = {
    "model": "",  # the folder; its content is part of the recipe
    "min_score": 4.5,
    "frames": 4,  # spread evenly over a clip; their scores are averaged
}


class Scorer(NamedTuple):
    model: Any
    processor: Any
    weight: "Tensor"  # (1, D)
    bias: "Tensor"  # (1,)


def check(frames: np.ndarray, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Finding]:
    """The finding for each clip of frames uint8 (B, F, H, W, 3): its `aesthetic` score, `unaesthetic` if too low."""
    scorer = load_scorer(Path(settings["model"]))
    return [_examine(scorer, clip, settings["frames"], settings["min_score"]) for clip in frames]


def _examine(scorer: Scorer, clip: np.ndarray, count: int, least: float) -> Finding:
    some = np.linspace(0, len(clip) - 1, min(count, len(clip))).round().astype(int)
    found = float(score(scorer, clip[some]).mean())
    scores = {"aesthetic": round(found, 3)}
    if found < least:
        return Finding(scores, "unaesthetic", f"its frames score {found:.2f} on average")
    return Finding(scores)


def score(scorer: Scorer, frames: np.ndarray) -> "Tensor":
    """The score of each frame of uint8 (F, H, W, 3), (F,) in fp32."""
    import torch

    pixels = scorer.processor(list(frames), return_tensors="pt")["pixel_values"].to(scorer.model.device)
    with torch.no_grad():
        features = scorer.model.get_image_features(pixel_values=pixels)
        features = torch.nn.functional.normalize(getattr(features, "pooler_output", features).float(), dim=-1)
        return (features @ scorer.weight.T.to(features) + scorer.bias.to(features))[:, 0].cpu()


@cache
def load_scorer(folder: Path) -> Scorer:
    """The model and head in `folder`, on the GPU if there is one, in fp32.

    Raises `MissingInputError` if there is no head, and `BadInputError` if the model can't be loaded or doesn't fit the
    head.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoImageProcessor, AutoModel

    head = folder / "head.safetensors"
    if not head.is_file():
        raise MissingInputError(
            f"There is no {head} for the check 'aesthetic'; put a CLIP-like model and its head into this folder, or "
            "set the check's mode to off."
        )
    require_safetensors(folder)
    try:
        tensors = load_file(head)
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, **WEIGHTS)
        processor = AutoImageProcessor.from_pretrained(folder, **LOCAL)
        scorer = Scorer(model.eval(), processor, tensors["weight"], tensors["bias"])
        score(scorer, np.zeros((1, 64, 64, 3), np.uint8))
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError) as error:
        raise BadInputError(
            f"{folder} has no image model with a matching head ({first_line(error)}); fix the folder, or set "
            "the mode of the check 'aesthetic' to off."
        ) from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return scorer
