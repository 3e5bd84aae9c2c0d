"""The values of the pipeline's arguments, or else its defaults: steps, sizes, noise and seeds."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from . import inputs, wan
from .caching import check_spans
from .discrete import JumpSteps, random_ids
from .errors import BadInputError
from .inputs import Generators, Seeds
from .sampling import seeded_noise
from .schedules import EulerSteps, JointPath, Steps, video_steps
from .video import fit_frames


class PipelineArguments(DiffusionPipeline):
    """What `PipelineParts` makes of the arguments of a call."""

    transformer: Any
    vae: Any
    scheduler: Any

    @property
    def _text_shape(self) -> tuple[int, ...]:
        """(N, d) of a text's latents; (N,) of its token ids in a `discrete` model."""
        length, dim = self.transformer.config.text_length, self.transformer.config.text_latent_dim
        return (length,) if self._discrete else (length, dim)

    @property
    def _discrete(self) -> bool:
        """Whether texts are token ids, as in the authors' release (`univigu.discrete`)."""
        return self.transformer.config.prediction == "discrete"

    def _refuse_discrete(self) -> None:
        """Raise BadInputError where a text is beside a video, which a `discrete` model isn't run with here."""
        if self._discrete:
            raise BadInputError(
                "This model's texts are token ids, as in the authors' release, and here it captions videos, and makes"
                " them without a text beside: leave `text_stream` out, and use `caption` in place of `joint`."
            )

    def _is_text_side_trained(self) -> bool:
        """Whether the text head has left the zeros that it starts from (see `UniViGUTransformer3DModel.from_wan`).

        The head is asked by a call, because its weights may be offloaded.
        """
        model = self.transformer
        width = model.config.num_attention_heads * model.config.attention_head_dim
        hidden = torch.linspace(-1, 1, width, device=wan.runs_on(model.text_head)).to(model.dtype)
        return not self._discrete and bool(model.text_head(hidden[None, None], hidden[None]).any())

    def _begin(self, num_inference_steps: int | None, shift: float | None, guidance_scale: float | None) -> Steps:
        """The steps of one batch of videos, and the state that callbacks read."""
        count = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        steps = video_steps(self.scheduler, count, shift, self.config.shift, self._execution_device)
        self._guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        self._num_timesteps, self._interrupt = len(steps), False
        return steps

    def _text_steps(self, num_inference_steps: int | None, seeds: Sequence[int]) -> Steps:
        count = self.config.caption_steps if num_inference_steps is None else num_inference_steps
        if self._discrete:
            return JumpSteps(inputs.positive(count), seeds, self._execution_device)
        return EulerSteps(inputs.positive(count), device=self._execution_device)

    def _text_guidance(self, guidance_scale: float | None) -> float:
        return self.config.caption_guidance_scale if guidance_scale is None else guidance_scale

    def _temperature(self, temperature: float | None) -> float:
        return inputs.valid_temperature(self.config.caption_temperature if temperature is None else temperature)

    def _joint_path(self, count: int | None, *asked: float | None) -> tuple[int, JointPath]:
        """How many steps `joint` takes, and its path; ``asked`` are its fields, None for the model's own value."""
        self._refuse_discrete()
        names = [field.name for field in fields(JointPath)]
        given = {name: value for name, value in zip(names, asked, strict=True) if value is not None}
        path = JointPath(**{name: self.config[f"joint_{name}"] for name in names} | given)
        if path.in_step == 1 and "text_at" in given:
            raise BadInputError(
                "With in_step, text and video are denoised in lockstep: give either text_at or in_step, not both, or"
                " an in_step below 1."
            )
        for name in ("text_at", "in_step", "prompt_until"):
            inputs.valid_tau(getattr(path, name), name)
        inputs.valid_shift(path.text_shift)
        count = inputs.positive(self.config.num_inference_steps if count is None else count)
        if path.in_step < 1:
            check_spans(self.transformer)
        return (max(count, inputs.positive(self.config.caption_steps)) if path.in_step else count), path

    def _text_noise(self, seeds: list[int], text_latents: Tensor | None) -> Tensor:
        """The noise (B, N, d) of the texts."""
        device, shape = self._execution_device, (len(seeds), *self._text_shape)
        if text_latents is None and self._discrete:
            return random_ids(seeds, "text", shape[1], self.transformer.config.vocab_size, device)
        if text_latents is None:
            return seeded_noise(seeds, "text", self._text_shape, device)
        if tuple(text_latents.shape) != shape:
            raise BadInputError(f"text_latents are {tuple(text_latents.shape)}: give noise of the shape {shape}.")
        return text_latents.to(device, torch.long if self._discrete else torch.float32)

    def _latent_shape(
        self,
        num_frames: int | None,
        height: int | None,
        width: int | None,
        latents: Tensor | None = None,
        text_stream: bool = True,
    ) -> tuple[int, ...]:
        """(C, T, H', W') of the latents of a video, given or default, that this model can make."""
        if latents is not None:
            shape = tuple(latents.shape[1:])
            channels = wan.latent_channels(self.transformer.config)
            if len(shape) != 4 or shape[0] != channels:
                raise BadInputError(f"latents are {tuple(latents.shape)}: give noise (B, {channels}, T, H', W').")
        else:
            shape = self._default_shape(num_frames, height, width)
        if text_stream:
            # raises where video and text together are longer than the rotary tables
            self.transformer.rope.text(self.transformer.grid(shape[1:]), self._text_shape[0])
        return shape

    def _default_shape(self, num_frames: int | None, height: int | None, width: int | None) -> tuple[int, ...]:
        given, default = (num_frames, height, width), (self.config.num_frames, self.config.height, self.config.width)
        frames, height, width = (d if g is None else g for g, d in zip(given, default, strict=True))
        time = self.vae.config.scale_factor_temporal
        _, patch_h, patch_w = self.transformer.config.patch_size
        tall, wide = (self.vae.config.scale_factor_spatial * patch for patch in (patch_h, patch_w))
        if min(frames, height, width) < 1 or (frames - 1) % time or height % tall or width % wide:
            below = max(frames - 1, 0) // time * time + 1
            raise BadInputError(
                f"{frames} frames of {height}x{width} pixels don't fit this model: give {time}k + 1 frames (such as"
                f" {below} or {below + time}), a height that is a multiple of {tall} and a width that is a multiple of"
                f" {wide}."
            )
        return wan.latent_shape(self.vae, frames, height, width)

    def _caption_seeds(self, seed: Seeds, generator: Generators, count: int) -> list[int]:
        if generator is not None:
            return inputs.draw_seeds(generator, count, same=True)
        return inputs.list_seeds(seed, count, same=True)

    def _fit(self, video: Any) -> np.ndarray:
        """A video as the model takes it: (num_frames, height, width, 3)."""
        frames = inputs.as_frames(video)
        wanted = self.config.num_frames
        if len(frames) == 1 < wanted:
            raise BadInputError("The video is a single frame and this model describes motion: give two frames or more.")
        return fit_frames(frames, wanted, self.config.height, self.config.width)
