"""Wan2.2 TI2V-5B: one transformer for text-to-video and image-to-video, over latents of 48 channels.

Its ``model_index.json`` says ``expand_timesteps``. In image-to-video the first latent frame is the clean image's, and
has its own time: Wan's t is 0 there, tau 1, and that of the step everywhere else (diffusers 0.42,
WanImageToVideoPipeline.prepare_latents and the lines of its loop under ``expand_timesteps``). In text-to-video all
tokens have the same time (WanPipeline), which is then Wan2.1's computation.

Its autoencoder (`AutoencoderKLWan` with ``is_residual`` and ``patch_size`` 2) compresses 16x16 pixels and 4 frames; its
factors, channels and statistics are read from its config, as those of any Wan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from .. import wan
from .base import Base, image_pixels


@dataclass
class FirstFrame:
    """The first latent frame (B or 1, C, 1, H', W'), clean while all others are denoised."""

    latents: Tensor
    states: Tensor | None = None  # there is no image encoder

    def show(self, z: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        times = torch.cat([torch.ones_like(tau)[:, None], tau[:, None].expand(-1, z.shape[2] - 1)], dim=1)
        return self.finish(z), times

    def finish(self, z: Tensor) -> Tensor:
        return torch.cat([self.latents.expand(len(z), -1, -1, -1, -1), z[:, :, 1:]], dim=2)


def show(pipeline: Any, images: Sequence[Image], shape: Sequence[int]) -> FirstFrame:
    """The images' latents, each as the first frame of latents (C, T, H', W')."""
    scale = pipeline.vae.config.scale_factor_spatial
    pixels = image_pixels(images, shape[2] * scale, shape[3] * scale)
    return FirstFrame(wan.encode_pixels(pipeline.vae, pixels[:, :, None]).to(pipeline._execution_device))


BASE = Base(
    name="Wan2.2 TI2V",
    fits=lambda transformer, index: bool(index.get("expand_timesteps")),
    clip={"num_frames": 121, "height": 704, "width": 1280, "fps": 24.0},
    show=show,
)
