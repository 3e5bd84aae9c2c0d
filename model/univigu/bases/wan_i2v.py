"""Wan2.1 I2V: image-to-video by further channels and by the states of an image encoder.

The transformer takes 36 channels: 16 of the video, a mask of 4 (one for each frame of a latent frame, 1 where a frame
is given), and 16 of the latents of a clip whose first frame is the image and whose others are grey, 0 in -1..1
(diffusers 0.42, WanImageToVideoPipeline.prepare_latents). CLIP's last states but one, through an embedder of their own,
are the keys and values of a second softmax in each block's cross-attention, ``add_k_proj`` and ``add_v_proj``, whose
result is added (WanAttnProcessor). Both branches of guidance see the image.

A video that is captioned, or is generated without an image, has zeros in the 20 channels and no second softmax. A zero
mask says that no frame is given, which is what the mask of all frames but the first says; zeros in the place of latents
are the channels' means. The base has never seen a clip without any given frame, so this is a meaning that it learns in
training. Weights that only an image uses are not trained.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from .. import wan
from .base import Base, image_pixels


@dataclass
class ImageChannels:
    """The channels beside the video's, (B or 1, 4 + C, T, H', W'), and the image encoder's states, if there is one."""

    channels: Tensor
    states: Tensor | None

    def show(self, z: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([z, self.channels.expand(len(z), -1, -1, -1, -1)], dim=1), tau

    def finish(self, z: Tensor) -> Tensor:
        return z


@torch.no_grad()
def show(pipeline: Any, images: Sequence[Image], shape: Sequence[int]) -> ImageChannels:
    """The images as the first frames of latents (C, T, H', W')."""
    vae, device = pipeline.vae, pipeline._execution_device
    space, time = vae.config.scale_factor_spatial, vae.config.scale_factor_temporal
    _, frames, height, width = shape
    pixels = image_pixels(images, height * space, width * space)[:, :, None]
    grey = pixels.new_zeros(1, 1, 1, 1, 1).expand(*pixels.shape[:2], (frames - 1) * time, *pixels.shape[3:])
    latents = wan.encode_pixels(vae, torch.cat([pixels, grey], dim=2)).to(device)
    mask = latents.new_zeros(len(latents), time, *latents.shape[2:])
    mask[:, :, 0] = 1
    return ImageChannels(torch.cat([mask, latents], dim=1), _encode(pipeline, images))


def _encode(pipeline: Any, images: Sequence[Image]) -> Tensor | None:
    if pipeline.image_encoder is None:
        return None
    inputs = pipeline.image_processor(images=list(images), return_tensors="pt")
    inputs = inputs.to(wan.runs_on(pipeline.image_encoder), pipeline.image_encoder.dtype)
    states = pipeline.image_encoder(**inputs, output_hidden_states=True).hidden_states[-2]
    return states.to(pipeline._execution_device)


def load_parts(folder: Path, precision: Callable[[str], Any]) -> dict[str, Any]:
    """CLIP and its preprocessing; neither for a transformer that doesn't take its states."""
    if not wan.read_json(folder / "transformer" / "config.json").get("image_dim"):
        return {}
    from transformers import CLIPImageProcessorPil, CLIPVisionModel  # the other kind needs torchvision

    chosen = precision("image_encoder")
    dtype: dict[str, Any] = {} if chosen is None else {"dtype": chosen}
    return {
        "image_encoder": CLIPVisionModel.from_pretrained(folder / "image_encoder", use_safetensors=True, **dtype),
        "image_processor": CLIPImageProcessorPil.from_pretrained(folder / "image_processor"),
    }


def _fits(transformer: Mapping[str, Any], index: Mapping[str, Any]) -> bool:
    return transformer.get("in_channels", 16) > wan.latent_channels(transformer)


BASE = Base(
    name="Wan2.1 I2V",
    fits=_fits,
    clip={"num_frames": 81, "height": 480, "width": 832},
    parts=load_parts,
    show=show,
)
