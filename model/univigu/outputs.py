"""What the pipeline returns: generated videos in the forms that diffusers' users expect, and their captions."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from . import wan
from .errors import BadInputError

OUTPUT_TYPES = ("np", "pil", "pt", "latent", "uint8")


@dataclass
class UniViGUPipelineOutput(BaseOutput):
    """Videos, and with `joint` their captions.

    ``frames`` by ``output_type``: ``np`` float32 (B, F, H, W, 3) in 0..1, ``pt`` the same as a tensor
    (B, F, 3, H, W), ``pil`` a list of lists of images, ``uint8`` an array (B, F, H, W, 3) in 0..255, ``latent``
    normalised latents (B, C, T, H', W'). ``captions`` has one text per video, or is None without text.
    """

    frames: Any
    captions: list[str] | None = None


def check_output_type(output_type: str) -> str:
    """Raise BadInputError for an output type that there isn't."""
    if output_type not in OUTPUT_TYPES:
        raise BadInputError(f"There is no output_type {output_type!r}: use one of {', '.join(OUTPUT_TYPES)}.")
    return output_type


def to_frames(vae: Any, latents: Tensor, output_type: str) -> Any:
    """Normalised latents (B, C, T, H', W') as videos of the output type.

    The list for ``pil``, otherwise an array or a tensor on the CPU; latents stay as they are.
    """
    if output_type == "latent":
        return latents
    if output_type == "uint8":
        return wan.decode_latents(vae, latents).numpy()
    # pixels are in 0..1 already
    return VideoProcessor(do_normalize=False).postprocess_video(wan.decode_pixels(vae, latents).cpu(), output_type)


def join(parts: list[Any]) -> Any:
    """The videos of several batches as one."""
    if isinstance(parts[0], list):
        return [video for part in parts for video in part]
    return torch.cat(parts) if isinstance(parts[0], Tensor) else np.concatenate(parts)
