"""Sequence parallelism: the N processes of a group share the tokens of a video (DeepSpeed-Ulysses, arXiv 2309.14509).

Each process holds a part of the video's tokens, and all of the text's, which are few. Layers that treat tokens alone
run on what a process holds. Before self-attention an all-to-all trades tokens for heads: each process attends with its
share of the heads over all tokens. A second one trades them back. Parts may differ by a token, heads must divide
evenly.

Every process ends with the whole velocity and text, and so with the whole loss. Through the exchanges, the sum of the
processes' gradients is that of the sum of their N equal losses; the mean over all processes, which data parallelism
takes anyway, is the gradient of one.

This is a plain all-to-all, and not diffusers' context parallelism, which splits the inputs of layers and has no place
for a second stream that stays whole, and not DeepSpeed's, whose attention takes one stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigError


class _AllToAll(torch.autograd.Function):
    """``dist.all_to_all_single`` of a flat tensor; its gradient goes the way back. Without a group nothing is sent."""

    @staticmethod
    # pyrefly: ignore[bad-override]
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        out = x.new_empty(sum(received))
        if group is not None:
            dist.all_to_all_single(out, x.contiguous(), received, sent, group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyrefly: ignore[bad-override]
        sent, received = ctx.sizes
        return _AllToAll.apply(grad, received, sent, ctx.group), None, None, None


@dataclass(frozen=True)
class SequenceGroup:
    """The processes that share the tokens of a video: their process group, its size N, and this one's rank in it.

    Without a ``group``, tensors have the shapes that they would have in one, and no values: memory can be counted.
    """

    group: Any
    rank: int
    size: int

    def parts(self, length: int) -> list[int]:
        """The number of tokens of each process, of ``length`` tokens."""
        return [length // self.size + (rank < length % self.size) for rank in range(self.size)]

    def own_tokens(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's tokens, from all of them."""
        return x.split(self.parts(x.shape[dim]), dim)[self.rank]

    def all_tokens(self, own: Tensor, length: int) -> Tensor:
        """All ``length`` tokens (B, S, width), from this process's (B, s, width)."""
        batch, _, width = own.shape
        found = self._exchange([own] * self.size, [batch * part * width for part in self.parts(length)])
        return torch.cat([x.view(batch, -1, width) for x in found], dim=1)

    def own_heads(self, x: Tensor) -> Tensor:
        """This process's heads (B, S, H / N, head_dim), from all of them (B, S, H, head_dim)."""
        return x.chunk(self.size, dim=2)[self.rank]

    def all_heads(self, own: Tensor) -> Tensor:
        """All heads (B, S, H, head_dim), from this process's (B, S, H / N, head_dim)."""
        found = self._exchange([own] * self.size, [own.numel()] * self.size)
        return torch.cat([x.view(own.shape) for x in found], dim=2)

    def to_heads(self, own: Tensor, length: int) -> Tensor:
        """This process's heads of all tokens (B, S, H / N, head_dim), from all heads of its own (B, s, H, head_dim)."""
        batch, _, heads, width = own.shape
        share = heads // self.size
        sizes = [batch * part * share * width for part in self.parts(length)]
        found = self._exchange(own.chunk(self.size, dim=2), sizes)
        return torch.cat([x.view(batch, -1, share, width) for x in found], dim=1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """All heads of its own tokens (B, s, H, head_dim), from its heads of all tokens (B, S, H / N, head_dim)."""
        batch, length, share, width = x.shape
        parts = self.parts(length)
        mine = batch * parts[self.rank] * share * width
        found = self._exchange(x.split(parts, dim=1), [mine] * self.size)
        return torch.cat([x.view(batch, -1, share, width) for x in found], dim=2)

    def _exchange(self, sent: Sequence[Tensor], received: list[int]) -> Sequence[Tensor]:
        """Send the i-th tensor to process i, and receive a flat one of ``received[i]`` numbers from it."""
        flat = torch.cat([x.flatten() for x in sent])
        return _AllToAll.apply(flat, [x.numel() for x in sent], received, self.group).split(received)


def make_groups(size: int, heads: int) -> SequenceGroup | None:
    """Divide all processes into groups of ``size`` neighbours; this process's group, or None for a size of 1.

    All processes must call this. Raises ConfigError where the processes or the model's heads can't be divided.
    """
    if size == 1:
        return None
    require_divisible(size, heads, dist.get_world_size())
    own = None
    for first in range(0, dist.get_world_size(), size):
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            own = SequenceGroup(group, dist.get_rank() - first, size)
    return own


def require_divisible(size: int, heads: int, processes: int) -> None:
    """Raise ConfigError where groups of ``size`` don't divide the processes, or the model's heads."""
    if heads % size:
        fitting = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        raise ConfigError(f"The model's {heads} heads can't be shared by {size}; set `sequence_parallel` to {fitting}.")
    if processes % size:
        raise ConfigError(
            f"{processes} processes don't form groups of {size}; set `sequence_parallel` to a divisor of their number."
        )
