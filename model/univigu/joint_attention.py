"""Attention as the blocks compute it: the rotary embedding, keys that several rows share, and both streams at once.

Shapes: B samples, S tokens, ``heads`` and ``head_dim`` of a self-attention or cross-attention layer.
"""

from collections.abc import Sequence

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor

from .discrete import HalfSplit, from_pairs, to_pairs

# (1, S, 1, head_dim / 2, 2): cosine and sine of the rotation of each pair of channels, which are neighbours in Wan
Rotary = Tensor | HalfSplit


def rotate(x: Tensor, rotary: Rotary, out: Tensor | None = None) -> Tensor:
    """Wan's rotary embedding of x (B, S, heads, head_dim): each pair of channels is one complex number.

    This takes one pass over memory, and rounds as Wan does where head_dim is a multiple of 16 (it then fills the
    processor's vectors). What torch compiles has real numbers, which are fused with the operations around them.
    ``out``, if given, has the shape of x and is written and returned.
    """
    if isinstance(rotary, HalfSplit):
        return write(from_pairs(rotate(to_pairs(x), rotary.table)), out)
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (real, imaginary), (cos, sin) = pairs.unbind(-1), rotary.unbind(-1)
        turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    elif out is not None and out.dtype == pairs.dtype:
        turned = torch.view_as_complex(out.unflatten(-1, (-1, 2)))
        torch.mul(torch.view_as_complex(pairs), torch.view_as_complex(rotary), out=turned)
        return out
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotary))
    return write(turned.flatten(-2).type_as(x), out)


def write(x: Tensor, out: Tensor | None) -> Tensor:
    """x, or ``out`` with the numbers of x."""
    return x if out is None else out.copy_(x)


def repeat_rows(x: Tensor, rows: int) -> Tensor:
    """x (B, ...), repeated as a whole up to ``rows`` rows, a multiple of B; a single row is not copied."""
    return x if x.shape[0] == rows else x.expand(rows // x.shape[0], *x.shape).flatten(0, 1)


def attend(attention: WanAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Maskless attention (eq 12): (B, S, heads, head_dim) to the same; keys, values: see `repeat_rows`."""
    key, value = (repeat_rows(x, query.shape[0]) for x in (key, value))
    out = dispatch_attention_fn(query, key, value, backend=attention.processor._attention_backend)
    return out.type_as(query)


def is_plain(attention: WanAttention, x: Tensor) -> bool:
    """Whether x is on a CPU, and torch's own attention only has to be computed: without gradients, not compiled."""
    plain = attention.processor._attention_backend is None and x.device.type == "cpu"
    return plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def empty_by_heads(hidden: Tensor, heads: int, tokens: int) -> Tensor:
    """An empty (B, ``tokens``, heads, head_dim) for a stream's hidden states (B, S, width), in memory head by head.

    A CPU's attention takes one head after the other, and 4 % less time than where a token's heads are side by side.
    """
    rows, _, width = hidden.shape
    return hidden.new_empty(rows, heads, tokens, width // heads).transpose(1, 2)


def attend_jointly(
    attention: WanAttention, video: Sequence[Tensor], text: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """:func:`attend` of both streams to both; each is its K, V, Q, of which a text that isn't read lacks the last.

    Of fewer videos than texts, a CPU computes only once what the videos find in themselves, and weights it and what
    they find in each text by the sums of their exponentials, as flash attention does with blocks of keys.
    """
    (video_k, video_v, video_q), (text_k, text_v, *text_q) = video, text
    rows = len(text_k)
    keys, values = (torch.cat([repeat_rows(v, rows), t], dim=1) for v, t in ((video_k, text_k), (video_v, text_v)))
    if rows == len(video_q) or not is_plain(attention, video_q):
        queries = torch.cat([repeat_rows(video_q, rows), *text_q], dim=1)
        video_out, text_out = attend(attention, queries, keys, values).tensor_split([video_q.shape[1]], dim=1)
        return video_out, text_out if text_q else None
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the one attention of torch's that returns sums
    found, sums = flash(*(x.transpose(1, 2) for x in (video_q, video_k, video_v)))
    more, more_sums = flash(*(x.transpose(1, 2) for x in (repeat_rows(video_q, rows), text_k, text_v)))
    share = (more_sums - repeat_rows(sums, rows)).sigmoid_().unsqueeze(-1).type_as(more)
    video_out = torch.lerp(repeat_rows(found, rows), more, share).transpose(1, 2)
    return video_out, attend(attention, text_q[0], keys, values) if text_q else None


def project_out(attention: WanAttention, x: Tensor) -> Tensor:
    """The output projection O of an attention layer: (B, S, heads, head_dim) to (B, S, width)."""
    return attention.to_out[1](attention.to_out[0](x.flatten(2, 3)))
