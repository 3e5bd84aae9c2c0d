"""The way into the text stream of the transformer, and out of it.

Shapes: B samples, N text tokens, ``width`` of the transformer, ``d`` the dimension of the text space.
"""

from typing import Any

import torch
import torch.nn as nn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor

from . import wan
from .discrete import TokenEmbedder, TokenHead
from .errors import ConfigError
from .text_space import PREDICTIONS


class TextEmbedder(nn.Module):
    """Into the text stream: z_tau and the previous estimate of z_1 become tokens, tau_t becomes their modulation."""

    def __init__(self, latent_dim: int, dim: int, freq_dim: int):
        super().__init__()
        self.proj_in = nn.Linear(latent_dim, dim)
        self.proj_guess = nn.Linear(latent_dim, dim, bias=False)
        self.timesteps_proj = Timesteps(num_channels=freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(in_channels=freq_dim, time_embed_dim=dim)
        self.act_fn = nn.SiLU()
        self.time_proj = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.proj_guess.weight)

    def forward(self, z: Tensor, tau: Tensor, guess: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """z (B, N, d), tau (B,), guess (B, N, d) to hidden states (B, N, width), time (B, width) and (B, 6, width)."""
        dtype = self.proj_in.weight.dtype
        hidden = self.proj_in(z.to(dtype))
        if guess is not None:
            hidden = hidden + self.proj_guess(guess.to(dtype))
        frequencies = self.timesteps_proj(wan.wan_timestep(tau)).to(self.time_embedder.linear_1.weight.dtype)
        temb = self.time_embedder(frequencies).type_as(hidden)
        return hidden, temb, self.time_proj(self.act_fn(temb)).unflatten(1, (6, -1))


class TextHead(nn.Module):
    """Out of the text stream: adaLN, then a zero-initialised projection to d, scaled by a learned positive number.

    With an ``output_dim`` w, w more numbers for a `TextOutput` follow, from a zero-initialised projection of their own.
    """

    def __init__(self, dim: int, latent_dim: int, eps: float, output_dim: int = 0):
        super().__init__()
        self.norm = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, latent_dim)
        self.log_scale = nn.Parameter(torch.zeros(1))  # DeepSpeed does not broadcast zero-dimensional parameters
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        self.proj_output = nn.Linear(dim, output_dim, bias=False) if output_dim else None
        if self.proj_output is not None:
            nn.init.zeros_(self.proj_output.weight)

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        """Hidden states (B, N, width) and time (B, width) to h (B, N, d) or [h, g] (B, N, d + w), float32."""
        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        hidden = (self.norm(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        out = self.log_scale.float().exp() * self.proj_out(hidden).float()
        return out if self.proj_output is None else torch.cat([out, self.proj_output(hidden).float()], dim=-1)


def text_ends(
    dim: int, freq_dim: int, eps: float, vocab_size: int, latent_dim: int | None, output_dim: int
) -> tuple[Any, Any]:
    """The way into and out of the text stream; without a ``latent_dim`` a text is token ids (`univigu.discrete`)."""
    if latent_dim is None:
        return TokenEmbedder(vocab_size, dim, freq_dim), TokenHead(dim, vocab_size)
    return TextEmbedder(latent_dim, dim, freq_dim), TextHead(dim, latent_dim, eps, output_dim)


def check_choices(prediction: str, ffn_init: str, caption_attention: str, text_output_dim: int) -> None:
    """Raise ConfigError for choices of the text side that there are not, or that exclude each other."""
    if prediction not in (*PREDICTIONS, "discrete"):
        raise ConfigError(f"Unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)} or discrete.")
    if ffn_init not in ("new", "copy", "shared"):
        raise ConfigError(f"Unknown ffn_init {ffn_init!r}: use new, copy or shared.")
    if caption_attention not in ("prefix", "joint"):
        raise ConfigError(f"Unknown caption_attention {caption_attention!r}: use prefix or joint.")
    if text_output_dim and prediction != "categorical":
        raise ConfigError(f"A prediction of {prediction} has no logits: set text_output_dim to 0, or categorical.")
