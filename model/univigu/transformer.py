"""Wan's video transformer with a text stream beside the video (eq 10, 14, 15).

What is unusual here:
- Two streams, one attention. Video and text tokens share each block's Q, K, V, O, its norms and its cross-attention,
  while each has its own feed-forward (eq 15), time embedding and scale/shift table. The streams stay two tensors and
  meet in attention alone, so neither time is ever carried per token.
- Wan's weights keep Wan's names: a Wan checkpoint loads as it is, and without text the output is Wan's bit for bit.
- Two attention policies. ``joint``: all tokens see all tokens (eq 14). ``prefix``: video doesn't see text, so with a
  given video its keys and values are computed once (:meth:`prefill_video`), and each text step costs only the text
  tokens (:meth:`denoise_text`). No mask is ever built.
- Text sits on Wan's own rotary tables, diagonal after the video: token i at (p, p, p), p = max(T, H, W) + i.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanRotaryPosEmbed,
    WanTimeTextImageEmbedding,
    WanTransformer3DModel,
    WanTransformerBlock,
)
from diffusers.utils import BaseOutput
from torch import Tensor

from . import wan
from .errors import BadInputError, ConfigError
from .text_space import PREDICTIONS, TextPrediction, TextSpace, read_out, row_norm_for

ATTENTION = ("joint", "prefix")
Rotary = Tensor  # complex64 (1, S, 1, head_dim / 2): what each pair of channels is turned by
Stream = tuple[Tensor, Tensor, Rotary]  # hidden states (B, S, width), time (B, 6, width), rotary table
KVCache = tuple[Tensor, Tensor, Tensor, Tensor]  # a block's video K, V and condition K, V, (B, S, heads, head_dim) each


class RotaryTables(WanRotaryPosEmbed):
    """Wan's rotary tables, which stay float32 when the model is cast, plus the diagonal places of text."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        cos, sin = self.freqs_cos, self.freqs_sin
        super()._apply(fn, recurse)
        if self.freqs_cos.dtype != cos.dtype:
            self.freqs_cos, self.freqs_sin = cos.to(self.freqs_cos.device), sin.to(self.freqs_sin.device)
        return self

    def video(self, latents: Tensor) -> Rotary:
        """The table of the patches of latents (B, C, T, H, W), as Wan has it."""
        # pyrefly: ignore[not-callable]
        return self._turns(*self(latents))

    def text(self, grid: tuple[int, int, int], length: int) -> Rotary:
        """The table of text tokens at (p, p, p), p = max(grid) + i; the three axes lie side by side in Wan's rows."""
        start, end = max(grid), max(grid) + length
        if end > self.max_seq_len:
            raise BadInputError(
                f"{length} text tokens after a video of {grid} patches need {end} places and the model has"
                f" {self.max_seq_len}: use a smaller video or a shorter text_length."
            )
        return self._turns(self.freqs_cos[None, start:end, None], self.freqs_sin[None, start:end, None])

    @staticmethod
    def _turns(cos: Tensor, sin: Tensor) -> Rotary:
        return torch.complex(cos[..., 0::2].contiguous(), sin[..., 1::2].contiguous())


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Wan's rotary embedding of x (B, S, heads, head_dim): each pair of channels is one complex number.

    In one pass, and with Wan's own rounding where head_dim is a multiple of 16, which fills a processor's vectors.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary).flatten(-2).type_as(x)


def attend(attention: WanAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Maskless attention: (B, S, heads, head_dim) to (B, S, width); keys and values may have a batch of 1."""
    if key.shape[0] != query.shape[0]:
        key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
    out = dispatch_attention_fn(query, key, value, backend=attention.processor._attention_backend)
    return out.flatten(2, 3).type_as(query)


def project_out(attention: WanAttention, x: Tensor) -> Tensor:
    return attention.to_out[1](attention.to_out[0](x))


class UniViGUBlock(WanTransformerBlock):
    """Wan's block with a second feed-forward and scale/shift table for text."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, qk_norm: str | None, cross_attn_norm: bool, eps: float):
        super().__init__(dim, ffn_dim, num_heads, qk_norm, cross_attn_norm, eps)
        self.ffn_text = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.text_scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        video: Stream | None,
        text: Stream | None,
        context: Tensor | None,
        memory: KVCache | None,
        attention: str,
    ) -> tuple[Tensor | None, Tensor | None, KVCache]:
        """One block over the streams that are given; without a video stream, text attends to ``memory``.

        ``attention`` is ``joint``, ``prefix``, or ``keys``: then only the memory is computed, for a last block whose
        video output nobody reads. ``context`` (B or 1, L, width) is the condition, not needed beside a memory.
        """
        video_out = text_out = None
        if video is not None:
            video_mod = (self.scale_shift_table + video[1].float()).chunk(6, dim=1)
            video_q, video_k, video_v = self._project(video, video_mod)
            # pyrefly: ignore[bad-argument-type]
            memory = (video_k, video_v, *self._project_context(context))
            if attention == "keys":
                return None, None, memory
        # pyrefly: ignore[not-iterable]
        video_k, video_v, *context_kv = memory
        if text is not None:
            text_mod = (self.text_scale_shift_table + text[1].float()).chunk(6, dim=1)
            text_q, text_k, text_v = self._project(text, text_mod)
            if video_k.shape[0] != text_k.shape[0]:
                video_k, video_v = (x.expand(text_k.shape[0], -1, -1, -1) for x in (video_k, video_v))
            keys, values = torch.cat([video_k, text_k], dim=1), torch.cat([video_v, text_v], dim=1)
        if video is not None and text is not None and attention == "joint":
            both = attend(self.attn1, torch.cat([video_q, text_q], dim=1), keys, values)
            video_out, text_out = both.split([video_q.shape[1], text_q.shape[1]], dim=1)
        else:
            if video is not None:
                video_out = attend(self.attn1, video_q, video_k, video_v)
            if text is not None:
                text_out = attend(self.attn1, text_q, keys, values)
        if video is not None:
            # pyrefly: ignore[bad-argument-type]
            video_out = self._finish(video[0], video_out, video_mod, context_kv, self.ffn)
        if text is not None:
            # pyrefly: ignore[bad-argument-type]
            text_out = self._finish(text[0], text_out, text_mod, context_kv, self.ffn_text)
        # pyrefly: ignore[bad-return]
        return video_out, text_out, memory

    def _project(self, stream: Stream, modulation: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        hidden, _, rotary = stream
        shift, scale, *_ = modulation
        normed = (self.norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        attn = self.attn1
        query, key, value = attn.norm_q(attn.to_q(normed)), attn.norm_k(attn.to_k(normed)), attn.to_v(normed)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        return rotate(query, rotary), rotate(key, rotary), value

    def _project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.attn2.norm_k(self.attn2.to_k(context)), self.attn2.to_v(context)
        return key.unflatten(2, (self.attn2.heads, -1)), value.unflatten(2, (self.attn2.heads, -1))

    def _finish(
        self,
        hidden: Tensor,
        attended: Tensor,
        modulation: tuple[Tensor, ...],
        context_kv: Sequence[Tensor],
        ffn: nn.Module,
    ) -> Tensor:
        _, _, gate, ffn_shift, ffn_scale, ffn_gate = modulation
        hidden = (hidden.float() + project_out(self.attn1, attended) * gate).type_as(hidden)
        query = self.attn2.norm_q(self.attn2.to_q(self.norm2(hidden.float()).type_as(hidden)))
        attended = attend(self.attn2, query.unflatten(2, (self.attn2.heads, -1)), *context_kv)
        hidden = hidden + project_out(self.attn2, attended)
        normed = (self.norm3(hidden.float()) * (1 + ffn_scale) + ffn_shift).type_as(hidden)
        return (hidden.float() + ffn(normed).float() * ffn_gate).type_as(hidden)


class TextEmbedder(nn.Module):
    """Into the text stream: z_tau and the previous guess of z_1 to tokens, tau_t to its modulation."""

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
        """z (B, N, d), tau (B,), guess (B, N, d) to hidden (B, N, width), time (B, width) and (B, 6, width)."""
        dtype = self.proj_in.weight.dtype
        hidden = self.proj_in(z.to(dtype))
        if guess is not None:
            hidden = hidden + self.proj_guess(guess.to(dtype))
        frequencies = self.timesteps_proj(wan.wan_timestep(tau)).to(self.time_embedder.linear_1.weight.dtype)
        temb = self.time_embedder(frequencies).type_as(hidden)
        return hidden, temb, self.time_proj(self.act_fn(temb)).unflatten(1, (6, -1))


class TextHead(nn.Module):
    """Out of the text stream: adaLN, then a zero-initialised projection to d, scaled by a learned positive number."""

    def __init__(self, dim: int, latent_dim: int, eps: float):
        super().__init__()
        self.norm = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, latent_dim)
        self.log_scale = nn.Parameter(torch.zeros(1))  # DeepSpeed broadcasts no zero-dimensional parameter
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        """(B, N, width) and time (B, width) to h (B, N, d), float32."""
        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        hidden = (self.norm(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        return self.log_scale.float().exp() * self.proj_out(hidden).float()


@dataclass
class UniViGUOutput(BaseOutput):
    """``video``: velocity (B, C, T, H, W), the paper's sign; ``text``: the head's h (B, N, d), or None without text."""

    video: Tensor
    text: Tensor | None = None


@dataclass
class VideoCache:
    """What text needs of a video: each block's keys and values, and where text begins on the rotary tables."""

    memories: list[KVCache]
    grid: tuple[int, int, int]


class UniViGUTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):
    """Uni-ViGU's transformer. The first arguments are WanTransformer3DModel's; the text side's are:

    ``text_latent_dim`` d, ``vocab_size`` V (rows of E), ``tokenizer_length`` (ids from there on are never said),
    ``row_norm`` r (None: from V), ``text_length`` N, ``prediction`` (categorical | x1 | velocity), ``ffn_init`` (new |
    copy), ``pad_token_id``, ``eos_token_id``.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ("patch_embedding", "condition_embedder", "norm", "text_space")
    _no_split_modules = ("UniViGUBlock",)
    _keep_in_fp32_modules = ["rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3", "text_space"]  # noqa: RUF012
    _repeated_blocks = ("UniViGUBlock",)

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
        text_latent_dim: int = 64,
        vocab_size: int = 256384,
        tokenizer_length: int = 256300,
        row_norm: float | None = None,
        text_length: int = 256,
        prediction: str = "categorical",
        ffn_init: str = "new",
        pad_token_id: int = 0,
        eos_token_id: int = 1,
    ):
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ConfigError(f"Unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)}.")
        if ffn_init not in ("new", "copy"):
            raise ConfigError(f"Unknown ffn_init {ffn_init!r}: use new or copy.")
        if row_norm is None:
            row_norm = row_norm_for(tokenizer_length)
            self.register_to_config(row_norm=row_norm)
        dim = num_attention_heads * attention_head_dim
        # Wan's parts, under Wan's names
        self.rope = RotaryTables(attention_head_dim, patch_size, rope_max_seq_len)
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.condition_embedder = WanTimeTextImageEmbedding(dim, freq_dim, dim * 6, text_dim)
        self.blocks = nn.ModuleList(
            UniViGUBlock(dim, ffn_dim, num_attention_heads, qk_norm, cross_attn_norm, eps) for _ in range(num_layers)
        )
        self.norm_out = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, out_channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        # the text side
        self.text_space = TextSpace(vocab_size, text_latent_dim, row_norm)
        self.text_embedder = TextEmbedder(text_latent_dim, dim, freq_dim)
        self.text_head = TextHead(dim, text_latent_dim, eps)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        tau: Tensor,
        encoder_hidden_states: Tensor,
        text: Tensor | None = None,
        text_tau: Tensor | None = None,
        guess: Tensor | None = None,
        attention: str = "joint",
    ) -> UniViGUOutput:
        """[u_v, h_t] = f(z_v, z_t, tau_v, tau_t, c) (eq 10).

        Shapes: z_v ``hidden_states`` (B, C, T, H, W), ``tau`` (B,), c ``encoder_hidden_states`` (B or 1, L, text_dim);
        optional z_t ``text`` (B, N, d) with its ``text_tau`` (B,) and the previous ``guess`` of z_1 (B, N, d).
        """
        if attention not in ATTENTION:
            raise ConfigError(f"Unknown attention {attention!r}: use one of {', '.join(ATTENTION)}.")
        (video, time, rotary), temb, context, grid = self._embed_video(hidden_states, tau, encoder_hidden_states)
        text_hidden = None
        if text is not None:
            text_hidden, text_temb, text_time = self.text_embedder(text, text_tau, guess)
            text_rotary = self.rope.text(grid, text.shape[1])
        for block in self.blocks:
            text_stream = None if text is None else (text_hidden, text_time, text_rotary)
            video, text_hidden, _ = self._run(block, (video, time, rotary), text_stream, context, None, attention)
        # pyrefly: ignore[bad-argument-type]
        velocity = self._video_head(video, temb, grid)
        return UniViGUOutput(velocity, None if text is None else self.text_head(text_hidden, text_temb))

    def prefill_video(self, hidden_states: Tensor, tau: Tensor, encoder_hidden_states: Tensor) -> VideoCache:
        """Everything that text under ``prefix`` attention needs of a video, computed once. Shapes as in forward."""
        (video, time, rotary), _, context, grid = self._embed_video(hidden_states, tau, encoder_hidden_states)
        memories = []
        for i, block in enumerate(self.blocks):
            attention = "prefix" if i + 1 < len(self.blocks) else "keys"
            video, _, memory = self._run(block, (video, time, rotary), None, context, None, attention)
            memories.append(memory)
        return VideoCache(memories, grid)

    def denoise_text(self, text: Tensor, text_tau: Tensor, cache: VideoCache, guess: Tensor | None = None) -> Tensor:
        """h (B, N, d) of text beside a cached video: what forward gives under ``prefix``, at the cost of the text."""
        hidden, temb, time = self.text_embedder(text, text_tau, guess)
        rotary = self.rope.text(cache.grid, text.shape[1])
        for block, memory in zip(self.blocks, cache.memories, strict=True):
            _, hidden, _ = self._run(block, None, (hidden, time, rotary), None, memory, "prefix")
        return self.text_head(hidden, temb)

    def read_text(
        self, hidden: Tensor, z: Tensor, tau: Tensor, table: Tensor, floor: float = 0.0, temperature: float = 1.0
    ) -> TextPrediction:
        """What h says at (z_tau, tau), read with this model's prediction; ``table`` is ``text_space()``."""
        config = self.config
        return read_out(hidden, z, tau, table, config.tokenizer_length, config.prediction, floor, temperature)

    def grid(self, size: Sequence[int]) -> tuple[int, int, int]:
        """How many patches lie along each axis of latents of size (T, H, W)."""
        return tuple(length // patch for length, patch in zip(size, self.config.patch_size, strict=True))

    def _run(self, block: UniViGUBlock, *args: Any) -> tuple[Tensor | None, Tensor | None, KVCache]:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def _embed_video(self, latents: Tensor, tau: Tensor, encoder_hidden_states: Tensor):
        grid = self.grid(latents.shape[2:])
        dtype = self.patch_embedding.weight.dtype
        rotary = self.rope.video(latents)
        hidden = self.patch_embedding(latents.to(dtype)).flatten(2).transpose(1, 2).contiguous()
        temb, time, context, _ = self.condition_embedder(wan.wan_timestep(tau), encoder_hidden_states.to(dtype))
        return (hidden, time.unflatten(1, (6, -1)), rotary), temb, context, grid

    def _video_head(self, hidden: Tensor, temb: Tensor, grid: tuple[int, int, int]) -> Tensor:
        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        hidden = (self.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        patches = self.proj_out(hidden).unflatten(2, (*self.config.patch_size, -1)).unflatten(1, grid)
        patches = patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return wan.wan_output_to_velocity(patches)

    @torch.no_grad()
    def init_text_side(self) -> None:
        """Start the text's time embedding and tables (with ``copy`` also its feed-forward) as copies of the video's."""
        self.text_embedder.time_embedder.load_state_dict(self.condition_embedder.time_embedder.state_dict())
        self.text_embedder.time_proj.load_state_dict(self.condition_embedder.time_proj.state_dict())
        self.text_head.scale_shift_table.copy_(self.scale_shift_table)
        for block in self.blocks:
            # pyrefly: ignore[bad-argument-type, not-callable]
            block.text_scale_shift_table.copy_(block.scale_shift_table)
            if self.config.ffn_init == "copy":
                # pyrefly: ignore[missing-attribute]
                block.ffn_text.load_state_dict(block.ffn.state_dict())

    @classmethod
    def from_wan(cls, source: str | Path | WanTransformer3DModel, **text_config: Any) -> "UniViGUTransformer3DModel":
        """A Wan text-to-video checkpoint with a new text side.

        ``source`` is a diffusers folder (whole, or its transformer alone), a hub id, or a loaded model; ``text_config``
        holds the text side's arguments. Beside a ``text_encoder`` folder, V is its vocabulary and E starts from its
        rows; ``tokenizer_length``, ``pad_token_id`` and ``eos_token_id`` are the caller's to give (see
        ``UniViGUPipeline.from_wan``), by default V and umT5's 0 and 1.
        """
        rows = None
        if isinstance(source, WanTransformer3DModel):
            base = source
        else:
            folder = wan.transformer_folder(source)
            with wan.reading(source):
                base, found = WanTransformer3DModel.from_pretrained(
                    folder, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True
                )
            wan.check_keys(found["missing_keys"], found["unexpected_keys"])
            rows = wan.token_rows(folder.parent)
        if rows is not None:
            text_config = {"vocab_size": len(rows), "tokenizer_length": len(rows)} | text_config
        expected = cls._get_init_keys(cls)
        model = cls(**{k: v for k, v in base.config.items() if k in expected} | text_config)
        # assign: the base's tensors are taken over, not copied
        wan.check_keys(*model.load_state_dict(base.state_dict(), strict=False, assign=True))
        model.init_text_side()
        if rows is not None:
            model.text_space.init_from(rows)
        return model.eval()

    def estimate_flops(self, video_tokens: int, text_tokens: int, context_tokens: int, attention: str = "joint") -> int:
        """Floating-point operations of one sample's forward pass; a training step costs about three times that."""
        dim = self.config.num_attention_heads * self.config.attention_head_dim
        tokens = video_tokens + text_tokens
        pairs = tokens**2 - (video_tokens * text_tokens if attention == "prefix" else 0)
        per_token = 6 * dim * dim + 2 * dim * self.config.ffn_dim + 2 * dim * context_tokens
        per_block = tokens * per_token + 2 * dim * pairs + 2 * dim * dim * context_tokens
        patch = math.prod(self.config.patch_size) * (self.config.in_channels + self.config.out_channels)
        ends = video_tokens * dim * patch + 2 * text_tokens * dim * self.config.text_latent_dim
        return 2 * (self.config.num_layers * per_block + ends)
