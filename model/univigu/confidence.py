"""How far a clip is within a model's world, in two measures that are compared with those of held-out clips.

- ``confidence``: the mean probability of the caption's tokens, as the model predicts them beside the video (the
  geometric mean; between 0 and 1). It is low where the model guesses.
- ``fidelity``: how well the model's latents reproduce the clip, as a peak signal-to-noise ratio in decibels. It is low
  for pictures of another kind than those that the autoencoder was trained on.

A model may carry the measures of held-out clips in ``confidence.json``, which its evaluation or `univigu model
calibrate` writes. A clip that is below all but `RARE` of them in either measure is unusual.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import text_space, wan
from .confidence_reference import DECIMALS, MEASURES, Reference
from .sampling import batch_tau, seeded_noise, token_table
from .video import fit_frames

if TYPE_CHECKING:
    from .pipeline import UniViGUPipeline


@dataclass(frozen=True)
class Assessment:
    """The measures of a clip and its caption; ``confidence`` is None for a model without categorical predictions.

    ``fidelity`` is measured only if the model has a reference. ``unusual`` is None without one; ``warning`` then is
    empty, and otherwise says in one clause how an unusual clip differs from held-out ones.
    """

    confidence: float | None
    fidelity: float | None = None
    unusual: bool | None = None
    warning: str = ""


def assess(
    pipeline: "UniViGUPipeline", frames: np.ndarray, caption: str, reference: Reference | None = None, seed: int = 0
) -> Assessment:
    """Assess one clip, uint8 (F, H, W, 3) of any size, with the caption that the model gave it.

    ``seed`` is that of the caption: the text's noise comes from it.
    """
    wanted = () if reference is None else tuple(reference.least)
    (found,) = measure(pipeline, [frames], [caption], [seed], "fidelity" in wanted)
    if reference is None:
        return Assessment(found["confidence"])
    warning = _explain(found, reference)
    return Assessment(found["confidence"], found["fidelity"], bool(warning), warning)


@torch.no_grad()
def measure(
    pipeline: "UniViGUPipeline",
    clips: Sequence[np.ndarray],
    captions: Sequence[str],
    seeds: Sequence[int],
    with_fidelity: bool = True,
) -> list[dict[str, float | None]]:
    """The measures of each clip, uint8 (F, H, W, 3), with its caption and the seed that the caption was made with.

    They are None for what the model or the arguments leave out.
    """
    config = pipeline.config
    fitted = torch.stack(
        [torch.from_numpy(fit_frames(clip, config.num_frames, config.height, config.width)) for clip in clips]
    )
    latents = wan.encode_frames(pipeline.vae, fitted)
    confidences = _confidences(pipeline, latents, captions, seeds)
    none = [None] * len(clips)
    fidelities = map(_fidelity, fitted, wan.decode_latents(pipeline.vae, latents)) if with_fidelity else none
    return [
        {name: None if value is None else round(value, DECIMALS) for name, value in zip(MEASURES, pair, strict=True)}
        for pair in zip(confidences, fidelities, strict=True)
    ]


def _confidences(
    pipeline: "UniViGUPipeline", latents: Tensor, captions: Sequence[str], seeds: Sequence[int]
) -> Sequence[float | None]:
    """The geometric mean of the probabilities of a caption's tokens, EOS included, beside clean latents (eq 16)."""
    model: Any = pipeline.transformer
    shape = model.config.text_length, model.config.text_latent_dim
    latents = latents.to(pipeline._execution_device)
    ids = text_space.tokenize(pipeline.tokenizer, captions, shape[0]).to(latents.device)
    empty = wan.encode_prompts(pipeline.tokenizer, pipeline.text_encoder, [""], pipeline.config.max_sequence_length)
    empty = empty.to(latents.device).expand(len(latents), -1, -1)
    # hooks that offload weights act on calls alone
    seen = model(latents, batch_tau(1.0, latents), empty, attention="kv_only").cache
    z = seeded_noise(seeds, "text", shape, latents.device)
    tau = batch_tau(0.0, z)
    hidden = model(seen, text=z, text_tau=tau).text
    logits = model.read_text(hidden, z, tau, token_table(model, z.device)).logits
    if logits is None:
        return [None] * len(captions)
    likelihood = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    stated = ids != pipeline.tokenizer.pad_token_id
    return ((likelihood * stated).sum(-1) / stated.sum(-1)).exp().tolist()


def _fidelity(frames: Tensor, reproduced: Tensor) -> float:
    """The peak signal-to-noise ratio of uint8 frames in decibels; at most 99."""
    error = (frames.float() - reproduced.float()).square().mean().item()
    return min(99.0, 10 * math.log10(255**2 / max(error, 1e-9)))


def _explain(found: Mapping[str, float | None], reference: Reference) -> str:
    """How a clip differs from held-out ones, as a clause; empty where it doesn't."""
    says = {
        "fidelity": "its latents reproduce it with {:.1f} dB (held-out clips: {:.1f}, and 99 % at least {:.1f})",
        "confidence": "the model is {:.0%} sure of its words (held-out clips: {:.1%}, and 99 % at least {:.1%})",
    }
    return " and ".join(
        text.format(value, reference.median[name], reference.least[name])
        for name, text in says.items()
        if name in reference.least and (value := found[name]) is not None and value < reference.least[name]
    )
