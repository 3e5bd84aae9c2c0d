"""How pleasing a clip looks to a CLIP-like model with a linear head, as the LAION aesthetic predictors are.

`model` is a folder below the work root: a model of transformers' that has image features (CLIP, SigLIP ...) with its
image processor, and `head.safetensors` with `weight` (1, D) and `bias` (1), which reads a score from the features of
length 1. Nothing is fetched from a hub.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from components.checks import Finding
from univigu.errors import BadInputError, MissingInputError
from univigu.local_models import LOCAL, WEIGHTS, require_safetensors

if TYPE_CHECKING:
    from torch import Tensor

DEFAULTS = {
    "model": "",  # the folder; part of the check's key by what it holds
    "min_score": 4.5,
    "frames": 4,  # evenly spread over a clip, scored one by one, and averaged
}


class Scorer(NamedTuple):
    model: Any
    processor: Any
    weight: "Tensor"  # (1, D)
    bias: "Tensor"  # (1,)


def check(frames: np.ndarray, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Finding]:
    """One finding a clip of frames uint8 (B, F, H, W, 3): its `aesthetic` score, and `unaesthetic` below the least."""
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
    """The score of each of frames uint8 (F, H, W, 3), fp32."""
    import torch

    pixels = scorer.processor(list(frames), return_tensors="pt")["pixel_values"].to(scorer.model.device)
    with torch.no_grad():
        features = scorer.model.get_image_features(pixel_values=pixels)
        features = torch.nn.functional.normalize(getattr(features, "pooler_output", features).float(), dim=-1)
        return (features @ scorer.weight.T.to(features) + scorer.bias.to(features))[:, 0].cpu()


@cache
def load_scorer(folder: Path) -> Scorer:
    """The model and head in `folder`, on the GPU if there is one, in fp32.

    Raises `MissingInputError` where there is none, and `BadInputError` where it is no such model, or head and model
    don't fit.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoImageProcessor, AutoModel

    head = folder / "head.safetensors"
    if not head.is_file():
        raise MissingInputError(
            f"There is no {head} for the check 'aesthetic'; put a CLIP-like model and its head there, or set the "
            "check's mode to off."
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
            f"{folder} holds no image model with a head that fits it ({str(error).splitlines()[0]}); "
            "mend it, or set the mode of the check 'aesthetic' to off."
        ) from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return scorer
