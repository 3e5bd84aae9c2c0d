"""Text as token ids on a mixture path: the text side of the authors' released model, beside the paper's equations.

The paper's equations carry a text as continuous latents (`univigu.text_space`). The authors' code (inference code,
``model/transformer.py`` and ``inference_unified_wan.py`` of github.com/Fr0zenCrane/Uni-ViGU) does not: at tau, each
token is the text's own with probability tau, and a token drawn uniformly from the vocabulary otherwise (discrete flow
matching with a linear schedule). The model predicts the text's own tokens, and a sampler jumps to them. So that both
methods can be compared, a transformer whose ``prediction`` is ``discrete`` has their text side:

- the token table has the model's width, and the head is a table of its own, untied, behind a LayerNorm with weights;
- a text has its own time embedder and its own table of the last modulation, but shares the blocks' tables;
- rotary positions are 0 .. N - 1 over all channels of a head, base 10,000, and a channel is paired with the one half a
  head further on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor

from . import flow, wan
from .text_space import TextPrediction

ROTARY_BASE = 10_000.0
EPS = 1e-5  # of the head's norm


class TokenEmbedder(nn.Module):
    """Into the text stream: token ids become hidden states, tau_t, in Wan's whole timesteps, their modulation."""

    def __init__(self, vocab_size: int, dim: int, freq_dim: int):
        super().__init__()
        self.table = nn.Embedding(vocab_size, dim)
        self.timesteps_proj = Timesteps(num_channels=freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(in_channels=freq_dim, time_embed_dim=dim)
        self.act_fn = nn.SiLU()
        self.time_proj = nn.Linear(dim, 6 * dim)

    def forward(self, ids: Tensor, tau: Tensor, guess: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """ids (B, N), tau (B,) to hidden states (B, N, width), time (B, width) and (B, 6, width); no ``guess``."""
        hidden = self.table(ids)
        frequencies = self.timesteps_proj(wan.wan_timestep(tau).round()).to(self.time_embedder.linear_1.weight.dtype)
        temb = self.time_embedder(frequencies).type_as(hidden)
        return hidden, temb, self.time_proj(self.act_fn(temb)).unflatten(1, (6, -1))


class TokenHead(nn.Module):
    """Out of the text stream: adaLN on a LayerNorm with weights, then a zero-initialised projection to the tokens."""

    def __init__(self, dim: int, vocab_size: int):
        super().__init__()
        self.norm_weight = nn.Parameter(torch.ones(dim))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, vocab_size)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        """Hidden states (B, N, width) and time (B, width) to logits (B, N, V), float32."""
        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        normed = F.layer_norm(hidden.float(), hidden.shape[-1:], eps=EPS) * self.norm_weight
        return self.proj_out((normed * (1 + scale) + shift).type_as(hidden)).float()


class HalfSplit(NamedTuple):
    """A rotary table (1, N, 1, head_dim / 2, 2) that turns each channel with the one half a head further on."""

    table: Tensor


def text_rotary(length: int, head_dim: int, device: torch.device) -> HalfSplit:
    """The rotary table of text at positions 0 .. N - 1: cosine and sine for each channel of the first half."""
    frequencies = ROTARY_BASE ** -(torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.arange(length, device=device).float()[:, None] * frequencies
    return HalfSplit(torch.stack([angles.cos(), angles.sin()], dim=-1)[None, :, None])


def to_pairs(x: Tensor) -> Tensor:
    """Channels (..., D) so that each is beside the one half a head further on, as `layers.rotate` turns them."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def from_pairs(x: Tensor) -> Tensor:
    """The inverse of :func:`to_pairs`."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def predict_tokens(logits: Tensor, temperature: float) -> TextPrediction:
    """The head's logits (B, N, V), what is likeliest (B, N), and the logits at a temperature, for `JumpSteps`.

    A temperature of 0 leaves the likeliest token alone.
    """
    likeliest = logits.argmax(-1)
    if temperature:
        return TextPrediction(logits, likeliest, logits / temperature)
    alone = torch.full_like(logits, -torch.inf).scatter(-1, likeliest[..., None], 0.0)
    return TextPrediction(logits, likeliest, alone)


# --- the path ---------------------------------------------------------------------------------------------------------


def random_ids(seeds: Sequence[int], name: str, length: int, vocabulary: int, device: torch.device) -> Tensor:
    """Token ids (B, N) drawn uniformly, each row from its own seed: the path's start."""
    rows = [torch.randint(vocabulary, (length,), generator=flow.keyed_generator(seed, name)) for seed in seeds]
    return torch.stack(rows).to(device)


def mix(source: Tensor, ids: Tensor, tau: Tensor, uniform: Tensor) -> Tensor:
    """The path at tau (B,): a token of ``ids`` (B, N) with probability tau, the one of ``source`` otherwise.

    ``uniform`` (B, N) are the draws from (0, 1).
    """
    return torch.where(uniform < tau[:, None], ids, source)


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """The loss of logits (B, N, V) at any tau: -log p of each of the text's own tokens, (B, N)."""
    return F.cross_entropy(logits.transpose(1, 2).float(), ids, reduction="none")


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """A token id for each place (B, N) of logits (B, N, V), by draws (B, N) from (0, 1)."""
    # float64: in float32, sums over 256,300 tokens round the probability of a rare one away
    sums = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(sums, (uniform.double() * sums[..., -1])[..., None], right=True)[..., 0].clamp_max(
        logits.shape[-1] - 1
    )


class JumpSteps:
    """The steps of a text on the mixture path: each token jumps to one that the model predicts, or stays.

    From tau to tau' the probability of a jump is 1 - exp(-(tau' - tau) / (1 - tau)), the Euler step of the path's rate
    1 / (1 - tau); in the last step all tokens jump. The draws of a sample come from its own seed.
    """

    def __init__(self, steps: int, seeds: Sequence[int], device: torch.device | None = None):
        self.taus, self._seeds = flow.tau_grid(steps, device=device), seeds

    def __len__(self) -> int:
        return len(self.taus) - 1

    def step(self, i: int, z: Tensor, velocity: Tensor) -> Tensor:
        """Token ids (B, N) at the next time, from ids ``z`` (B, N) and the logits (B, N, V) in ``velocity``."""
        keys = [(seed, "jump", i) for seed in self._seeds]
        uniform = torch.stack([torch.rand(2, z.shape[1], generator=flow.keyed_generator(*key)) for key in keys])
        which, whether = uniform.to(z.device).unbind(1)
        drawn = draw(velocity, which)
        if i + 1 == len(self):
            return drawn
        stays = torch.exp(-(self.taus[i + 1] - self.taus[i]) / (1 - self.taus[i]))
        return torch.where(whether < stays, z, drawn)
