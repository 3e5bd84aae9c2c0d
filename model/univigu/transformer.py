"""Wan's video transformer with a text stream beside the video (eq 10, 14, 15).

What is unusual here:
- Two streams, one attention. Video and text tokens share each block's Q, K, V, O, its norms and its cross-attention.
  Each has its own feed-forward network (eq 15), time embedding and scale/shift table. The streams stay two tensors and
  meet in attention alone: with one joined tensor, two times would need a modulation per token, which is 1.2 GB in
  float32 at 33K tokens.
- Wan's weights keep Wan's names: a Wan checkpoint loads unchanged, and without text the output equals Wan's bit for
  bit.
- Two attention policies. ``joint``: all tokens attend to all tokens (eq 14). ``prefix``: video does not attend to text,
  so the keys and values of a fixed video are computed once (:meth:`prefill_video`), and each text step costs only the
  text tokens (:meth:`denoise_text`). No mask is ever built. A model whose ``caption_attention`` is ``joint`` computes
  the video again for each text step, under the same calls: what ``prefix`` is compared with.
- Text uses Wan's own rotary tables, on the diagonal after the video: token i is at (p, p, p), p = max(T, H, W) + i.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanTimeTextImageEmbedding, WanTransformer3DModel
from torch import Tensor

from . import wan
from .caching import StepCacheMixin
from .discrete import predict_tokens, text_rotary
from .errors import ConfigError
from .from_wan import build_from_wan
from .joint_attention import Rotary, repeat_rows
from .layers import (
    Condition,
    Context,
    KVCache,
    RotaryTables,
    Stream,
    UniViGUBlock,
    UniViGUOutput,
    VideoCache,
    modulate,
)
from .sequence_parallel import SequenceGroup, require_divisible
from .text_space import TextOutput, TextPrediction, TextSpace, read_out, row_norm_for
from .text_stream import check_choices, text_ends

_EARLIER = {"video_only": "joint", "text_only": "prefix"}  # the policy of the blocks before the last
ATTENTION = ("joint", "prefix", "video_only", "text_only", "kv_only")


class UniViGUTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, StepCacheMixin, AttentionMixin):
    """Uni-ViGU's transformer. The first arguments are WanTransformer3DModel's; the text side's are:

    ``text_latent_dim`` d, ``vocab_size`` V (rows of E), ``tokenizer_length`` (ids from there on are never predicted),
    ``row_norm`` r (None: from V), ``text_length`` N, ``prediction`` (categorical | x1 | velocity, or discrete for token
    ids as in `univigu.discrete`, which has no ``text_latent_dim`` and ``row_norm``), ``ffn_init`` (new |
    copy | shared, with the video's), ``pad_token_id``, ``eos_token_id``, ``text_output_dim`` w (numbers per token for a
    `TextOutput`; 0: none), ``caption_attention`` (prefix | joint: a video's, while a text about it is written).
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ("patch_embedding", "condition_embedder", "norm", "text_space", "text_output")
    _no_split_modules = ("UniViGUBlock",)
    _keep_in_fp32_modules = ["rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3", "text_space"]  # noqa: RUF012
    _repeated_blocks = ("UniViGUBlock",)
    _group_offload_block_modules = ("text_space", "text_head")  # called on their own, so they get hooks of their own

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        rope_max_seq_len: int = 1024,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        text_latent_dim: int = 64,
        vocab_size: int = 256384,
        tokenizer_length: int = 256300,
        row_norm: float | None = None,
        text_length: int = 256,
        prediction: str = "categorical",
        ffn_init: str = "new",
        pad_token_id: int = 0,
        eos_token_id: int = 1,
        text_output_dim: int = 0,
        caption_attention: str = "prefix",
    ):
        super().__init__()
        check_choices(prediction, ffn_init, caption_attention, text_output_dim)
        if row_norm is None:
            row_norm = row_norm_for(tokenizer_length)
            self.register_to_config(row_norm=row_norm)
        dim, discrete = num_attention_heads * attention_head_dim, prediction == "discrete"
        kind = ffn_init == "shared", added_kv_proj_dim, discrete
        # Wan's parts, under Wan's names, so that its checkpoints load without a mapping of keys
        self.rope = RotaryTables(attention_head_dim, patch_size, rope_max_seq_len)
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.condition_embedder = WanTimeTextImageEmbedding(dim, freq_dim, dim * 6, text_dim, image_dim)
        self.blocks = nn.ModuleList(
            UniViGUBlock(dim, ffn_dim, num_attention_heads, qk_norm, cross_attn_norm, eps, *kind)
            for _ in range(num_layers)
        )
        self.norm_out = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, out_channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        # the text side
        self.text_space: Any = None if discrete else TextSpace(vocab_size, text_latent_dim, row_norm)
        latents = None if discrete else text_latent_dim
        self.text_embedder, self.text_head = text_ends(dim, freq_dim, eps, vocab_size, latents, text_output_dim)
        self.text_output = TextOutput(vocab_size, text_output_dim) if text_output_dim else None
        for name, parameter in self.named_parameters():
            if wan.is_image_side(name):  # training gives no image, so nothing would reach these weights
                parameter.requires_grad_(False)
        self.gradient_checkpointing = False
        self.recomputed_blocks: set[nn.Module] | None = None  # with gradient checkpointing; None: all
        self.sequence: SequenceGroup | None = None

    def forward(
        self,
        hidden_states: Tensor | VideoCache,
        tau: Tensor | None = None,
        encoder_hidden_states: Tensor | Condition | None = None,
        text: Tensor | None = None,
        text_tau: Tensor | None = None,
        guess: Tensor | None = None,
        attention: str = "joint",
        image_states: Tensor | None = None,
    ) -> UniViGUOutput:
        """[u_v, h_t] = f(z_v, z_t, tau_v, tau_t, c) (eq 10); :meth:`read_text` turns h_t into u_t.

        Shapes: z_v ``hidden_states`` (B, C, T, H, W), ``tau`` (B,), or (B, T) where each latent frame has its own time,
        c ``encoder_hidden_states`` (B or 1, L, text_dim); optional z_t ``text`` (B, N, d) with its ``text_tau`` (B,)
        and ``guess`` (B, N, d), the previous estimate of z_t1 (self-conditioning). ``attention`` is ``joint`` or
        ``prefix``; raises ConfigError for anything else. ``video_only`` is ``joint`` without what only the text's h
        needs, and ``text_only`` is ``prefix`` without what only the video's velocity needs. There may be a multiple of
        B texts, or of texts and conditions: row i of them sees video i modulo B.

        A :class:`Condition` in the place of c keeps its keys and values for the next pass.

        A base that is conditioned on images takes their channels after z_v's in ``hidden_states``, where there are
        none zeros, and an image encoder's ``image_states`` (B or 1, L', image_dim).

        Hooks that offload weights act on this call alone, so it leads to :meth:`prefill_video` (``kv_only`` returns the
        ``cache``) and to :meth:`denoise_text` (a cache in the place of the video gives the ``text`` beside it) too.
        """
        if attention not in ATTENTION:
            raise ConfigError(f"Unknown attention {attention!r}: use one of {', '.join(ATTENTION)}.")
        if self.is_cache_enabled and attention != "video_only":
            with self.without_cache():
                given = hidden_states, tau, encoder_hidden_states, text, text_tau, guess, attention, image_states
                return self.forward(*given)
        if isinstance(hidden_states, VideoCache):
            # pyrefly: ignore[bad-argument-type]
            return UniViGUOutput(None, self.denoise_text(text, text_tau, hidden_states, guess))
        if attention == "kv_only":
            # pyrefly: ignore[bad-argument-type]
            return UniViGUOutput(None, None, self.prefill_video(hidden_states, tau, encoder_hidden_states))
        if attention == "text_only" and self.config.caption_attention == "joint":
            # pyrefly: ignore[bad-argument-type]
            seen = self.prefill_video(hidden_states, tau, encoder_hidden_states)
            return self.forward(seen, text=text, text_tau=text_tau, guess=guess)
        # pyrefly: ignore[bad-argument-type]
        return self._denoise(hidden_states, tau, encoder_hidden_states, text, text_tau, guess, attention, image_states)

    def _denoise(
        self,
        hidden_states: Tensor,
        tau: Tensor,
        encoder_hidden_states: Tensor | Condition,
        text: Tensor | None,
        text_tau: Tensor | None,
        guess: Tensor | None,
        attention: str,
        image_states: Tensor | None,
    ) -> UniViGUOutput:
        """A pass over all blocks; the arguments are those of :meth:`forward`."""
        condition = encoder_hidden_states if isinstance(encoder_hidden_states, Condition) else None
        if condition is not None and not condition.blocks:
            condition.blocks = [[] for _ in self.blocks]
        embedded = self._embed_video(hidden_states, tau, encoder_hidden_states, image_states)
        (video, time, rotary), temb, context, grid = embedded
        text_hidden = text_stream = None
        if text is not None:
            text_hidden, text_temb, text_time = self.text_embedder(text, text_tau, guess)
            text_rotary = self._text_rotary(grid, text)
        for i, block in enumerate(self.blocks):
            if text is not None:
                text_stream = text_hidden, text_time, text_rotary
            # of the last block's other stream, the one that is asked for needs the keys and values alone
            policy = _EARLIER.get(attention, attention) if i + 1 < len(self.blocks) else attention
            known = None if condition is None else condition.blocks[i]
            video, text_hidden, *_ = self._run(block, (video, time, rotary), text_stream, context, known, policy)
            # the first block sees a video that several rows share once
            time, temb = (repeat_rows(x, len(x) if video is None else len(video)) for x in (time, temb))
        # pyrefly: ignore[bad-argument-type]
        velocity = None if attention == "text_only" else self._video_head(video, temb, grid)
        read = text is not None and attention != "video_only"
        # pyrefly: ignore[bad-argument-type]
        return UniViGUOutput(velocity, self._text_out(text_hidden, text_temb) if read else None)

    def share_sequence(self, group: SequenceGroup | None) -> None:
        """Share each video's tokens with the other processes of a group (`sequence_parallel`), or, with None, stop.

        All of them must then call the model with the same inputs. Raises ConfigError where the heads can't be divided.
        """
        if group is not None:
            require_divisible(group.size, self.config.num_attention_heads, group.size)
        self.sequence = group
        for block in self.blocks:
            # pyrefly: ignore[bad-argument-type]
            block.sequence = group

    def prefill_video(self, hidden_states: Tensor, tau: Tensor, encoder_hidden_states: Tensor) -> VideoCache:
        """Compute once what text under ``prefix`` attention needs from a video. Shapes as in :meth:`forward`."""
        if self.config.caption_attention == "joint":
            return VideoCache([], self.grid(hidden_states.shape[2:]), video=(hidden_states, tau, encoder_hidden_states))
        (video, time, rotary), _, context, grid = self._embed_video(hidden_states, tau, encoder_hidden_states)
        kept: list[KVCache | Stream] = []
        for i, block in enumerate(self.blocks):
            stream = video, time, rotary
            # Text attends to the last block's keys and values, but nothing reads the video that it would return.
            attention = "prefix" if i + 1 < len(self.blocks) else "kv_only"
            recomputed = self._recomputes(block)
            if not (recomputed and attention == "kv_only"):
                video, _, kv_cache = self._run(block, stream, None, context, None, attention)
            # pyrefly: ignore[bad-argument-type]
            kept.append(stream if recomputed else kv_cache)
        return VideoCache(kept, grid, context)

    def denoise_text(self, text: Tensor, text_tau: Tensor, cache: VideoCache, guess: Tensor | None = None) -> Tensor:
        """h (B, N, d) of text beside a cached video: forward's under ``prefix``, at the cost of the text alone.

        Of M videos in the cache, text row i sees video i modulo M: B is a multiple of M.
        """
        if cache.video is not None:
            video, tau, condition = (repeat_rows(x, len(text)) for x in cache.video)
            # pyrefly: ignore[bad-return]
            return self.forward(video, tau, condition, text, text_tau, guess).text
        hidden, temb, time = self.text_embedder(text, text_tau, guess)
        rotary = self._text_rotary(cache.grid, text)
        for block, kept in zip(self.blocks, cache.blocks, strict=True):
            stream = hidden, time, rotary
            if len(kept) == 3:
                _, hidden, _ = self._run(block, kept, stream, cache.context, None, "text_only")
            else:
                _, hidden, _ = self._run(block, None, stream, None, kept, "prefix")
        # pyrefly: ignore[bad-argument-type]
        return self._text_out(hidden, temb)

    def _text_rotary(self, grid: tuple[int, int, int], text: Tensor) -> Rotary:
        """The rotary table of a text (B, N, ...) beside a video of ``grid`` patches."""
        if self.config.prediction == "discrete":
            return text_rotary(text.shape[1], self.config.attention_head_dim, text.device)
        return self.rope.text(grid, text.shape[1])

    def _text_out(self, hidden: Tensor, temb: Tensor) -> Tensor:
        """The head's h (B, N, d), or [h, g] (B, N, d + w) with a `TextOutput`."""
        out = self.text_head(hidden, temb)
        if self.text_output is not None and torch.is_grad_enabled():
            # A step without a loss of text must use the output table too: see `objective.training_loss`.
            out = out + 0 * self.text_output(out[:, :1, self.config.text_latent_dim :]).sum()
        return out

    def read_text(
        self, hidden: Tensor, z: Tensor, tau: Tensor, table: Tensor, floor: float = 0.0, temperature: float = 1.0
    ) -> TextPrediction:
        """h (B, N, d) at (z_tau, tau) as logits, z_1 and velocity, by this model's ``prediction`` (see `read_out`).

        ``table`` (V, d) is ``text_space()``: the caller computes it once per step or per sampling run.
        """
        config = self.config
        if config.prediction == "discrete":
            return predict_tokens(hidden, temperature)
        settings = config.tokenizer_length, config.prediction, floor, temperature
        if self.text_output is None:
            return read_out(hidden, z, tau, table, *settings)
        flow, more = hidden.split([config.text_latent_dim, config.text_output_dim], dim=-1)
        return read_out(flow, z, tau, table, *settings, self.text_output(more))

    def grid(self, size: Sequence[int]) -> tuple[int, int, int]:
        """The number of patches along each axis of latents of size (T, H, W)."""
        return tuple(length // patch for length, patch in zip(size, self.config.patch_size, strict=True))

    def _recomputes(self, block: UniViGUBlock) -> bool:
        """Whether a block's activations of this forward pass are recomputed in the backward pass."""
        chosen = self.recomputed_blocks is None or block in self.recomputed_blocks
        return torch.is_grad_enabled() and self.gradient_checkpointing and chosen

    def _run(self, block: UniViGUBlock, *args: Any) -> tuple[Tensor | None, Tensor | None, KVCache]:
        if self._recomputes(block):
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def _embed_video(
        self, latents: Tensor, tau: Tensor, c: Tensor | Condition, image_states: Tensor | None = None
    ) -> tuple[Stream, Tensor, Context, tuple[int, int, int]]:
        """Stream and time embedding of the video, the projected condition, and the grid of patches."""
        if isinstance(c, Condition):
            # of a condition whose keys and values are known, no token is projected
            c, image_states = (c.states[:, :0], None) if all(c.blocks) else (c.states, image_states)
        grid = self.grid(latents.shape[2:])
        dtype = self.patch_embedding.weight.dtype
        rotary = self.rope.video(latents)
        if missing := self.config.in_channels - latents.shape[1]:
            latents = F.pad(latents, (0, 0, 0, 0, 0, 0, 0, missing))
        hidden = self.patch_embedding(latents.to(dtype)).flatten(2).transpose(1, 2).contiguous()
        if image_states is not None:
            image_states = image_states.to(dtype)
        frames = tau.shape[1] if tau.ndim == 2 else None
        timestep = wan.wan_timestep(tau.flatten())
        temb, time, context, image = self.condition_embedder(
            timestep, c.to(dtype), image_states, timestep_seq_len=frames
        )
        time = time.unflatten(-1, (6, -1))
        if self.sequence is not None:
            hidden = self.sequence.own_tokens(hidden)
            if frames is not None:  # a process's tokens are not whole frames
                time, temb = (self.sequence.own_tokens(x.repeat_interleave(grid[1] * grid[2], 1)) for x in (time, temb))
        return (hidden, time, rotary), temb, context if image is None else (context, image), grid

    def _video_head(self, hidden: Tensor, temb: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Hidden states (B, S, width) to the velocity (B, C, T, H, W), in the paper's sign."""
        shift, scale = (self.scale_shift_table + temb.unsqueeze(-2)).chunk(2, dim=-2)
        hidden = modulate(self.norm_out(hidden.float()), scale, shift).type_as(hidden)
        patches = self.proj_out(hidden)
        if self.sequence is not None:
            patches = self.sequence.all_tokens(patches, math.prod(grid))
        patches = patches.unflatten(2, (*self.config.patch_size, -1)).unflatten(1, grid)
        patches = patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return wan.wan_output_to_velocity(patches)

    @torch.no_grad()
    def init_text_side(self) -> None:
        """Initialise the text's time embedding and tables (with ``copy`` also its feed-forward) from the video's.

        The text then starts with Wan's meaning of time instead of having to learn one.
        """
        self.text_embedder.time_embedder.load_state_dict(self.condition_embedder.time_embedder.state_dict())
        self.text_embedder.time_proj.load_state_dict(self.condition_embedder.time_proj.state_dict())
        self.text_head.scale_shift_table.copy_(self.scale_shift_table)
        for block in self.blocks:
            if block.text_scale_shift_table is not None:
                # pyrefly: ignore[bad-argument-type, not-callable]
                block.text_scale_shift_table.copy_(block.scale_shift_table)
            if self.config.ffn_init == "copy":
                # pyrefly: ignore[missing-attribute]
                block.ffn_text.load_state_dict(block.ffn.state_dict())

    @classmethod
    def from_wan(cls, source: str | Path | WanTransformer3DModel, **text_config: Any) -> "UniViGUTransformer3DModel":
        """A Wan checkpoint with a new text side.

        ``source`` is a diffusers folder (whole, or its transformer alone), a hub id, or a loaded model; ``text_config``
        holds the text side's arguments. Where a ``text_encoder`` folder is beside it, V is its vocabulary and E starts
        from its rows. The caller gives ``tokenizer_length``, ``pad_token_id`` and ``eos_token_id`` (see
        ``UniViGUPipeline.from_wan``); the defaults are V and umT5's 0 and 1. Raises MissingInputError, BadInputError
        or CorruptDataError where ``source`` is not a readable Wan transformer of a kind in `univigu.bases`.
        """
        return build_from_wan(cls, source, text_config)

    def estimate_flops(self, video_tokens: int, text_tokens: int, context_tokens: int, attention: str = "joint") -> int:
        """Floating-point operations of one sample's forward pass; a training step costs about three times as many.

        A multiply-add counts as two operations. Counted are matrix products and attention, not norms and activations.
        """
        dim = self.config.num_attention_heads * self.config.attention_head_dim
        tokens = video_tokens + text_tokens
        pairs = tokens**2 - (video_tokens * text_tokens if attention == "prefix" else 0)
        per_token = 6 * dim * dim + 2 * dim * self.config.ffn_dim + 2 * dim * context_tokens
        per_block = tokens * per_token + 2 * dim * pairs + 2 * dim * dim * context_tokens
        patch = math.prod(self.config.patch_size) * (self.config.in_channels + self.config.out_channels)
        text = 2 * self.config.text_latent_dim + self.config.text_output_dim  # into the stream, and out of it
        text = self.config.vocab_size if self.text_space is None else text
        ends = video_tokens * dim * patch + text_tokens * dim * text
        return 2 * (self.config.num_layers * per_block + ends)

    def estimate_caption_flops(self, video_tokens: int, text_tokens: int, context_tokens: int) -> tuple[int, int]:
        """Operations of reading a video, once, and of each pass of a text beside it; counted as `estimate_flops`."""
        if self.config.caption_attention == "joint":
            return 0, self.estimate_flops(video_tokens, text_tokens, context_tokens)
        video, both = (self.estimate_flops(video_tokens, n, context_tokens, "prefix") for n in (0, text_tokens))
        return video, both - video
