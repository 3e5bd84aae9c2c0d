"""The parts of the transformer: its rotary tables and two-stream block. `text_stream` has the ends of text.

Shapes: B samples, S tokens of a stream, N text tokens, L condition tokens, ``width`` = heads * head_dim, ``d`` the
dimension of the text space.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from diffusers.utils import BaseOutput
from torch import Tensor

from .errors import BadInputError
from .joint_attention import (
    Rotary,
    attend,
    attend_jointly,
    empty_by_heads,
    is_plain,
    project_out,
    repeat_rows,
    rotate,
    write,
)
from .sequence_parallel import SequenceGroup

# hidden states (B, S, width), time (B, 6, width), or (B, F, 6, width) for F equal parts of S, rotary table of all S
Stream = tuple[Tensor, Tensor, Rotary]
# a block's video K, V and condition K, V, (B, S, heads, head_dim) each, and K, V of an image, where one is given
KVCache = tuple[Tensor, ...]
Context = Tensor | tuple[Tensor, Tensor]  # the projected condition (B or 1, L, width), and that of an image beside it
# Tokens that a CPU computes at once, of those that don't attend to each other: what they need in between fits its
# caches, and is not fetched from the system again, page by page, for each of the large tensors.
CPU_TOKENS = 2048


class RotaryTables(WanRotaryPosEmbed):
    """Wan's rotary tables, which stay float32 when the model is cast, plus the diagonal positions of text."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # bf16 has too few digits for a cosine to tell neighbouring positions apart.
        cos, sin = self.freqs_cos, self.freqs_sin
        super()._apply(fn, recurse)
        if self.freqs_cos.dtype != cos.dtype:
            self.freqs_cos, self.freqs_sin = cos.to(self.freqs_cos.device), sin.to(self.freqs_sin.device)
        return self

    def video(self, latents: Tensor) -> Rotary:
        """The table for the patches of latents (B, C, T, H, W), equal to Wan's."""
        # pyrefly: ignore[not-callable]
        return self._in_pairs(*self(latents))

    def text(self, grid: tuple[int, int, int], length: int) -> Rotary:
        """The table for text tokens at positions (p, p, p), p = max(grid) + i, ``grid`` in patches.

        Each row of Wan's tables holds the angles of all three axes side by side, so row p is position (p, p, p).
        Raises BadInputError where the last position is beyond the end of the tables.
        """
        start, end = max(grid), max(grid) + length
        if end > self.max_seq_len:
            raise BadInputError(
                f"{length} text tokens after a video of {grid} patches need {end} positions and the model has"
                f" {self.max_seq_len}: use a smaller video or a shorter text_length."
            )
        # pyrefly: ignore[not-callable]
        return self._in_pairs(*self(None, slice(start, end)))

    def forward(self, hidden_states: Tensor | None, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines for the patches of latents, or those of ``rows``.

        All reads of the tables come through here, because hooks that offload them to another device act on a call.
        """
        if rows is not None:
            return self.freqs_cos[None, rows, None], self.freqs_sin[None, rows, None]
        return super().forward(hidden_states)

    @staticmethod
    def _in_pairs(cos: Tensor, sin: Tensor) -> Rotary:
        # Wan stores each angle twice, once per channel of a pair.
        return torch.stack([cos[..., 0::2], sin[..., 1::2]], dim=-1)


@dataclass
class VideoCache:
    """What text needs from a video: each block's keys and values, and the grid after which text positions start.

    A block whose activations are recomputed has the video stream at its input in their place, from which it computes
    them again: that is kept for the backward pass anyway, and has half the size. A model whose ``caption_attention`` is
    ``joint`` keeps the video itself, and no blocks.
    """

    blocks: list[KVCache | Stream]
    grid: tuple[int, int, int]  # patches along T, H, W
    context: Context | None = None  # for the streams
    video: tuple[Tensor, Tensor, Tensor] | None = None  # z_v, tau and c, as `forward` takes them


@dataclass
class Condition:
    """The condition c of many forward passes, whose keys and values in each block are computed by the first alone.

    It stays right as long as the weights do, and is for passes without gradients.
    """

    states: Tensor  # (B or 1, L, text_dim)
    blocks: list[list[Tensor]]  # K, V of each block that has been computed, and those of an image, where one is given


@dataclass
class UniViGUOutput(BaseOutput):
    """``video``: velocity u_v (B, C, T, H, W), data - noise; ``text``: the head's h (B, N, d), or None without text.

    With ``kv_only``, ``cache`` is all there is; beside a cache, ``text`` is.
    """

    video: Tensor
    text: Tensor | None = None
    cache: VideoCache | None = None


def modulate(normed: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """adaLN: normed (B, S, width) with scale and shift (B, 1, width), or (B, F, 1, width) for F equal parts of S."""
    # the sum is in place: one large tensor less, and autograd needs the product for nothing
    if scale.ndim == 3:
        return (normed * (1 + scale)).add_(shift)
    return (normed.unflatten(1, (scale.shape[1], -1)) * (1 + scale)).add_(shift).flatten(1, 2)


def add_gated(hidden: Tensor, out: Tensor, gate: Tensor) -> Tensor:
    """hidden (B, S, width) plus a branch's output times its gate, which has the shapes of :func:`modulate`'s scale."""
    branch = out * gate if gate.ndim == 3 else (out.unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)
    return branch.add_(hidden).type_as(hidden)


class UniViGUBlock(WanTransformerBlock):
    """Wan's block with a second feed-forward network and scale/shift table for text (eq 14, 15).

    With ``shared_ffn`` text goes through the video's network: what the paper's design is compared with. With
    ``shared_table`` it has the video's scale/shift table, as in the authors' release.
    ``added_kv_proj_dim`` gives the cross-attention Wan's second keys and values, for an image.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        qk_norm: str | None,
        cross_attn_norm: bool,
        eps: float,
        shared_ffn: bool = False,
        added_kv_proj_dim: int | None = None,
        shared_table: bool = False,
    ):
        super().__init__(dim, ffn_dim, num_heads, qk_norm, cross_attn_norm, eps, added_kv_proj_dim)
        own = None if shared_ffn else FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.ffn_text = own
        self.text_scale_shift_table = None if shared_table else nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.sequence: SequenceGroup | None = None  # the processes that share a video's tokens

    def forward(
        self,
        video: Stream | None,
        text: Stream | None,
        context: Context | None,
        kv_cache: KVCache | list[Tensor] | None,
        attention: str,
    ) -> tuple[Any, ...]:
        """One block over the given streams; without a video stream, text attends to ``kv_cache``.

        ``attention`` is ``joint``, ``prefix``, ``video_only``, which is ``joint`` but computes of the text no more than
        its keys and values, ``text_only``, which computes of the video no more than those, or ``kv_only``, which
        computes nothing else. ``context`` is the condition; a cache replaces it, which beside a video is a list of the
        condition's keys and values alone, filled where it is empty. Of B videos and a multiple of B texts or
        conditions, row i sees video i modulo B, and the video that is returned has a row for each.

        Returns the hidden states (B, S, width) of video and of text, and, where the video does not attend to the text,
        the cache. What is not computed is None, but with ``video_only`` the text as it came, and without one an empty
        one, because diffusers' caches add and subtract what a block returns.
        """
        video_mod = text_mod = None
        if video is not None:
            video_mod = (self.scale_shift_table + video[1].float()).chunk(6, dim=-2)
            known = [] if kv_cache is None else kv_cache
            if not known:
                # pyrefly: ignore[bad-argument-type, missing-attribute]
                known.extend(self._project_context(context))
            kv_cache = tuple(known)
        if text is not None:
            table = self.scale_shift_table if self.text_scale_shift_table is None else self.text_scale_shift_table
            text_mod = (table + text[1].float()).chunk(6, dim=1)
        # pyrefly: ignore[bad-argument-type]
        video_out, text_out, kv_cache = self._attend((video, video_mod), (text, text_mod), kv_cache, attention)
        context_kv = kv_cache if attention in ("joint", "video_only") else kv_cache[2:]
        # text first: the backward pass then begins with the video, and holds no gradient of text for shared weights
        if text_out is not None:
            ffn = self.ffn if self.ffn_text is None else self.ffn_text
            # pyrefly: ignore[bad-argument-type, unsupported-operation]
            text_out = self._finish(text[0], self._all_heads(text_out), text_mod, context_kv, ffn)
        if video_out is not None:
            # pyrefly: ignore[bad-argument-type, unsupported-operation]
            video_out = self._finish(video[0], self._to_tokens(video_out), video_mod, context_kv, self.ffn)
        if attention not in ("joint", "video_only"):
            return video_out, text_out, kv_cache
        if text_out is None:
            # pyrefly: ignore[unsupported-operation]
            text_out = video_out[:, :0] if text is None else text[0]
        return video_out, text_out

    def _attend(
        self, video: tuple[Any, Any], text: tuple[Any, Any], kv_cache: KVCache, attention: str
    ) -> tuple[Tensor | None, Tensor | None, KVCache]:
        """Self-attention (eq 14) of both streams, each with its modulation: (B, S, heads, head_dim), and the cache.

        What only attention needs is freed on return, before the feed-forward network needs its memory.
        """
        (video_stream, video_mod), (text_stream, text_mod) = video, text
        if video_stream is not None and attention in ("joint", "video_only") and self._writes_in_place(video, text):
            return *self._attend_in_place(video, text, attention == "joint"), kv_cache
        video_q = text_q = None
        if video_stream is not None:
            length, seen = video_stream[2].shape[1], attention not in ("kv_only", "text_only")
            projected = self._project_video(video_stream, video_mod, seen)
            video_k, video_v, *queries = (self._to_heads(x, length) for x in projected)
            kv_cache = (video_k, video_v, *kv_cache)
            video_q = queries[0] if seen else None
        keys, values = video_k, video_v = kv_cache[:2]
        if text_stream is not None and attention != "kv_only":
            normed = self._normed(text_stream[0], text_mod)
            projected = self._project(normed, text_stream[2], attention != "video_only")
            text_k, text_v, *queries = (self._own_heads(x) for x in projected)
            text_q = queries[0] if queries else None
            if video_q is not None and attention in ("joint", "video_only"):
                texts = (text_k, text_v) if text_q is None else (text_k, text_v, text_q)
                return *attend_jointly(self.attn1, (video_k, video_v, video_q), texts), kv_cache[2:]
            keys = torch.cat([repeat_rows(video_k, len(text_k)), text_k], dim=1)
            values = torch.cat([repeat_rows(video_v, len(text_v)), text_v], dim=1)
        if attention in ("joint", "video_only"):
            kv_cache = kv_cache[2:]
        # Two maskless calls instead of one with a mask: at 33K video tokens the mask alone takes a gigabyte.
        video_out = None if video_q is None else attend(self.attn1, video_q, video_k, video_v)
        text_out = None if text_q is None else attend(self.attn1, text_q, keys, values)
        return video_out, text_out, kv_cache

    def _writes_in_place(self, video: tuple[Any, Any], text: tuple[Any, Any]) -> bool:
        (hidden, *_), of_text = video[0], text[0]
        alike = of_text is None or len(of_text[0]) == len(hidden)
        return alike and self.sequence is None and is_plain(self.attn1, hidden)

    def _attend_in_place(
        self, video: tuple[Any, Any], text: tuple[Any, Any], text_reads: bool
    ) -> tuple[Tensor, Tensor | None]:
        """:meth:`_attend` of both streams, whose K, V and Q are written behind each other and never copied."""
        (stream, video_mod), (text_stream, text_mod) = video, text
        length, more = stream[0].shape[1], 0 if text_stream is None else text_stream[0].shape[1]
        both = [empty_by_heads(stream[0], self.attn1.heads, length + n) for n in (more, more, more * text_reads)]
        self._project_video(stream, video_mod, True, [x[:, :length] for x in both])
        if more:
            normed = self._normed(text_stream[0], text_mod)
            self._project(normed, text_stream[2], text_reads, [x[:, length:] for x in both])
        key, value, query = both
        video_out, text_out = attend(self.attn1, query, key, value).tensor_split([length], dim=1)
        return video_out, text_out if more and text_reads else None

    # What processes that share a video's tokens exchange (see `sequence_parallel`); alone, a tensor stays as it is.

    def _own_tokens(self, x: Tensor) -> Tensor:
        return x if self.sequence is None else self.sequence.own_tokens(x)

    def _to_heads(self, x: Tensor, length: int) -> Tensor:
        return x if self.sequence is None else self.sequence.to_heads(x, length)

    def _to_tokens(self, x: Tensor) -> Tensor:
        return x if self.sequence is None else self.sequence.to_tokens(x)

    def _own_heads(self, x: Tensor) -> Tensor:
        return x if self.sequence is None else self.sequence.own_heads(x)

    def _all_heads(self, x: Tensor) -> Tensor:
        return x if self.sequence is None else self.sequence.all_heads(x)

    # Both streams share the weights of self-attention: Q, K and V have (B, S, heads, head_dim).

    def _normed(self, hidden: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """The hidden states (B, S, width) of a stream as self-attention reads them."""
        shift, scale, *_ = modulation
        return modulate(self.norm1(hidden.float()), scale, shift).type_as(hidden)

    def _project_video(
        self, video: Stream, modulation: tuple[Tensor, ...], queries: bool, out: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """K, V and, where they are asked for, Q of the video, written to ``out`` where that is given."""
        hidden, _, rotary = video
        # pyrefly: ignore[bad-argument-type]
        rotary = self._own_tokens(rotary)
        tokens = self._tokens_at_once(hidden, modulation[0])
        parts = []
        for start, turns in zip(range(0, hidden.shape[1], tokens), rotary.split(tokens, dim=1), strict=True):
            here = slice(start, start + tokens)
            normed = self._normed(hidden[:, here], modulation)
            parts.append(self._project(normed, turns, queries, [x[:, here] for x in out]))
        if out:
            return [*out]
        return parts[0] if len(parts) == 1 else [torch.cat(each, dim=1) for each in zip(*parts, strict=True)]

    def _project(self, normed: Tensor, rotary: Rotary, queries: bool, out: Sequence[Tensor] = ()) -> list[Tensor]:
        """K, V and, where they are asked for, Q of what self-attention reads, written to ``out`` where given."""
        attn = self.attn1
        to_key, to_value, to_query = out or (None, None, None)
        key, value = attn.norm_k(attn.to_k(normed)), attn.to_v(normed)
        key, value = (x.unflatten(2, (attn.heads, -1)) for x in (key, value))
        found = [rotate(key, rotary, to_key), write(value, to_value)]
        if queries:
            query = attn.norm_q(attn.to_q(normed)).unflatten(2, (attn.heads, -1))
            found.append(rotate(query, rotary, to_query))
        return found

    def _project_context(self, context: Context) -> tuple[Tensor, ...]:
        """K and V of the condition for cross-attention, and those of an image: (B or 1, L, heads, head_dim) each."""
        attn = self.attn2
        text, image = context if isinstance(context, tuple) else (context, None)
        found = [attn.norm_k(attn.to_k(text)), attn.to_v(text)]
        if image is not None:
            found += [attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image)]
        return tuple(x.unflatten(2, (attn.heads, -1)) for x in found)

    def _finish(
        self,
        hidden: Tensor,
        attended: Tensor,
        modulation: tuple[Tensor, ...],
        context_kv: Sequence[Tensor],
        ffn: nn.Module,
    ) -> Tensor:
        """What follows self-attention: its residual, cross-attention, and the stream's own feed-forward (eq 15)."""
        rows = max(attended.shape[0], context_kv[0].shape[0])
        hidden, attended = (repeat_rows(x, rows) for x in (hidden, attended))
        modulation = tuple(repeat_rows(x, rows) for x in modulation)
        tokens = self._tokens_at_once(hidden, modulation[0])
        if hidden.shape[1] <= tokens:
            return self._finish_tokens(hidden, attended, modulation, context_kv, ffn)
        parts = zip(hidden.split(tokens, dim=1), attended.split(tokens, dim=1), strict=True)
        return torch.cat([self._finish_tokens(*part, modulation, context_kv, ffn) for part in parts], dim=1)

    def _tokens_at_once(self, hidden: Tensor, modulation: Tensor) -> int:
        """How many tokens of hidden states (B, S, width) are computed at once, where each is computed by itself."""
        whole = hidden.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling()
        # hooks of diffusers may load a layer's weights for each call, or count its calls
        hooked = any(hasattr(module, "_diffusers_hook") for module in (self.ffn, self.attn1.to_q))
        if whole or hooked or modulation.ndim != 3:
            return hidden.shape[1]
        return max(CPU_TOKENS // hidden.shape[0], 1)

    def _finish_tokens(
        self,
        hidden: Tensor,
        attended: Tensor,
        modulation: Sequence[Tensor],
        context_kv: Sequence[Tensor],
        ffn: nn.Module,
    ) -> Tensor:
        """:meth:`_finish` of some of the tokens, or of all."""
        _, _, gate, ffn_shift, ffn_scale, ffn_gate = modulation
        hidden = add_gated(hidden, project_out(self.attn1, attended), gate)
        query = self.attn2.norm_q(self.attn2.to_q(self.norm2(hidden.float()).type_as(hidden)))
        query = query.unflatten(2, (self.attn2.heads, -1))
        attended = attend(self.attn2, query, *context_kv[:2])
        if len(context_kv) > 2:  # an image is attended to by itself, with a softmax of its own
            attended = attended + attend(self.attn2, query, *context_kv[2:])
        hidden = hidden + project_out(self.attn2, attended)
        normed = modulate(self.norm3(hidden.float()), ffn_scale, ffn_shift).type_as(hidden)
        return add_gated(hidden, ffn(normed), ffn_gate)
