"""Which frames of a video the tokens of a text attend to, in the last step in which the text is written (eq 14, 16).

In each block the text's queries attend to the keys of the video and of the text, without a mask. A token's attention to
a latent frame is the sum of its weights over the keys of that frame's patches, averaged over all heads of all blocks.
Divided by the token's attention to the whole video, these are its `weights`: they add up to 1 over the frames. What is
left of the attention goes to the text itself.

The weights are computed from the Q and K of the blocks' own layers, and from the inputs that the blocks get in this
step, so they are those of the pass itself, up to rounding. Attention says where the model reads, not why.
"""

import math
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .layers import UniViGUBlock

READS_TEXT = ("joint", "prefix", "text_only")  # attention policies under which the text attends to the video


class FrameAttention(NamedTuple):
    """Of N tokens and T latent frames: ``weights`` (N, T), and the share ``on_video`` (N,) of the attention."""

    weights: Tensor
    on_video: Tensor


class FrameWatch:
    """A callback of the pipeline that watches the last of ``text_steps`` steps of a text; use it with ``with``.

    ``frames`` is the number of latent frames of the video (in patches). With guidance, the pass with the video is
    watched, and of several samples the first. The other steps cost nothing more.

        with FrameWatch(pipeline.transformer, 3, steps) as watch:
            pipeline.caption(video, steps, callback_on_step_end=watch)
        watch.attention()
    """

    def __init__(self, transformer: Any, frames: int, text_steps: int) -> None:
        self._blocks = list(transformer.blocks)
        self._frames, self._left = frames, text_steps
        self._seen: set[int] = set()  # blocks that the text has passed in this step
        self._found: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for number, block in enumerate(self._blocks):
            self._hooks.append(block.register_forward_pre_hook(partial(self._look, number)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        self._left -= bool(self._seen)
        self._seen.clear()
        return {}

    @property
    def done(self) -> bool:
        """Whether the text's last step is over."""
        return self._left == 0

    def attention(self) -> FrameAttention | None:
        """What was seen, float32 on the CPU; None before the last step."""
        if len(self._found) < len(self._blocks):
            return None
        masses = torch.stack(list(self._found.values())).mean(0)
        on_video = masses.sum(-1)
        return FrameAttention(masses / on_video[:, None], on_video)

    def _look(self, number: int, _block: Any, inputs: tuple[Any, ...]) -> None:
        video, text, _, kv_cache, policy = inputs
        if text is None or policy not in READS_TEXT or number in self._seen:
            return
        self._seen.add(number)
        if self._left == 1:
            self._found[number] = self._masses(self._blocks[number], video, text, kv_cache)

    @torch.no_grad()
    def _masses(self, block: UniViGUBlock, video: Any, text: Any, kv_cache: Any) -> Tensor:
        """The attention (N, T) of each token to each latent frame, averaged over the heads."""
        query, video_keys, text_keys = read_keys(block, video, text, kv_cache)
        heads = []
        for head in range(query.shape[1]):  # one at a time: of a real video, all heads need a gigabyte
            weights = attention_weights(query[:, head], torch.cat([video_keys[:, head], text_keys[:, head]]))
            heads.append(weights[:, : len(video_keys)].unflatten(1, (self._frames, -1)).sum(-1))
        return torch.stack(heads).mean(0).cpu()


def read_keys(block: UniViGUBlock, video: Any, text: Any, kv_cache: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The text's queries (N, heads, head_dim), the video's keys (S, heads, head_dim), and those of the text.

    The arguments are a block's own, of which the first sample is taken.
    """
    if video is None:
        video_keys = kv_cache[0]
    else:
        modulation = (block.scale_shift_table + video[1].float()).chunk(6, dim=-2)
        video_keys = block._project_video(video, modulation, False)[0]
    table = block.scale_shift_table if block.text_scale_shift_table is None else block.text_scale_shift_table
    normed = block._normed(text[0], (table + text[1].float()).chunk(6, dim=1))
    text_keys, _, queries = block._project(normed, text[2], True)
    return queries[0], video_keys[0], text_keys[0]


def attention_weights(query: Tensor, keys: Tensor) -> Tensor:
    """The softmax (N, S), float32, of one head's queries (N, head_dim) and keys (S, head_dim)."""
    return (query.float() @ keys.float().T / math.sqrt(query.shape[-1])).softmax(-1)
