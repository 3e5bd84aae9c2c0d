"""Caption a video, generate a video, or do both jointly (eq 16-18), as one diffusers pipeline.

Videos that go in are RGB frames (F, H, W, 3), uint8 or from 0 to 1. A video whose size or length is not the model's is
scaled and cropped around its centre, and its frames are taken evenly from its whole length. Input that can't be used
raises ``BadInputError``. All noise of a sample comes from its own seed or generator, so a result does not depend on the
rest of the batch, and one sample is made at a time unless ``batch_size`` says otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from . import flow, inputs, text_space, wan
from .conditions import Conditions
from .inputs import Generators, Seeds
from .outputs import UniViGUPipelineOutput, check_output_type, join, to_frames
from .parts import PipelineParts
from .sampling import Field, Guide, joint_field, seeded_noise, text_field, token_table, video_field, video_noise
from .schedules import EulerSteps, JointPath, Steps
from .stepping import Callback, Stepper


@dataclass
class Batch:
    """Samples that are denoised at once: their noise, what guides them, and the steps of their video."""

    video: Tensor  # (B, C, T, H', W')
    text: Tensor | None  # (B, N, d)
    seeds: list[int]
    guide: Guide
    steps: Steps
    stepper: Stepper


class UniViGUPipeline(PipelineParts):
    """Uni-ViGU's three tasks on its parts (see :class:`parts.PipelineParts`), whose config has the methods' defaults.

    Called, it generates videos as ``WanPipeline`` does, with the same arguments; :meth:`caption` and :meth:`joint` are
    the other two tasks.
    """

    # --- video from text ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        shift: float | None = None,
        text_stream: bool | None = None,
        seed: Seeds | None = None,
        batch_size: int = 1,
        image: Any = None,
    ) -> UniViGUPipelineOutput | tuple[Any]:
        """A video for each prompt (eq 17), as `UniViGUPipelineOutput.frames`; the arguments are `WanPipeline`'s.

        The prompt is given twice, as Wan's condition c and as clean text beside the video. Guidance above 1 moves away
        from the branch without text whose condition is the negative prompt, or the empty string. ``prompt_embeds``
        (B, L, text_dim) replace c; beside a ``prompt`` they leave its text, and alone the text is absent, noise at
        tau_t = 0. ``text_stream=False`` leaves the text stream out altogether, which is Wan's own model; the default is
        so until the text side has been trained.

        F must be 4k + 1; height and width are in pixels, and multiples of what one patch covers. ``latents``
        (B, C, T, H', W') are the video's noise. The noise is random, from ``generator`` or torch's own, or repeatable
        with ``seed``: video ``i`` has the seed ``seed[i]``, or ``seed + i``. ``shift`` is for our own steps; a
        ``scheduler`` has one. ``output_type`` is one of `outputs.OUTPUT_TYPES`. ``image``, where the base takes one
        (see `univigu.bases`), is the first frame: one for all prompts, or a list of one for each, see
        `inputs.list_images`. As in diffusers, an image of another shape is stretched to the video's.
        """
        check_output_type(output_type)
        if text_stream:
            self._refuse_discrete()
        text_stream = self._is_text_side_trained() if text_stream is None else text_stream
        asked = Conditions(self, prompt, prompt_embeds, num_videos_per_prompt, max_sequence_length, text_stream)
        asked.read_negative(negative_prompt, negative_prompt_embeds)
        shape = self._latent_shape(num_frames, height, width, latents, text_stream)
        asked.read_image(image, shape)
        noise, seeds = video_noise(len(asked), shape, seed, generator, latents, self._execution_device)
        frames = []
        for part in inputs.spans(len(asked), batch_size):
            stepper = Stepper(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
            steps = self._begin(num_inference_steps, shift, guidance_scale)
            text, tau = self._text_beside(asked, part, seeds[part]) if text_stream else (None, 0.0)
            batch = Batch(noise[part], text, seeds[part], asked.guide(part), steps, stepper)
            frames.append(to_frames(self.vae, self._denoise_video(batch, tau), output_type))
        self.maybe_free_model_hooks()
        return UniViGUPipelineOutput(join(frames)) if return_dict else (join(frames),)

    def generate(self, prompt: str | Sequence[str], seed: Seeds = 0, **arguments: Any) -> np.ndarray:
        """A video for each prompt as uint8 (B, F, H, W, 3).

        This is the pipeline's call with a seed and ``output_type="uint8"``; ``arguments`` are those of the call. Video
        ``i`` has the seed ``seed[i]``, or ``seed + i``.
        """
        (frames,) = self(prompt, seed=seed, output_type="uint8", return_dict=False, **arguments)
        return frames

    def _text_beside(self, asked: Conditions, part: slice, seeds: list[int]) -> tuple[Tensor, float]:
        """The text (B, N, d) beside the videos of one part, and its time: the prompts, clean, or noise for none."""
        if asked.texts is None:
            return seeded_noise(seeds, "text", self._text_shape, self._execution_device), 0.0
        return self._embed(asked.texts[part]), 1.0

    def _denoise_video(self, batch: Batch, text_tau: float, span: range | None = None) -> Tensor:
        """Latents (B, C, T, H', W') of the batch's videos after a span of its steps, beside its text (eq 17)."""
        field = video_field(self.transformer, batch.text, text_tau, batch.seeds, batch.guide)
        video = batch.stepper.integrate(
            field, "latents", batch.video, batch.steps, batch.guide, span, text_latents=batch.text
        )
        return batch.guide.finish(video)

    # --- text from video ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def caption(
        self,
        videos: Any,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        seed: Seeds = 0,
        batch_size: int = 1,
        generator: Generators = None,
        **steering: Any,
    ) -> list[str]:
        """Describe one video (F, H, W, 3), or each of several; always returns a list of texts (eq 16).

        ``videos`` is an array, a tensor, a list of frames, or a list of videos. A caption depends on its video alone:
        each has the same ``seed`` (or one draw from ``generator``), unless a list gives each its own. A guidance above
        1 runs the text a second time, without the video. A ``temperature`` of 1 samples from the texts that fit the
        video; a lower one sharpens the predicted tokens in each step, and 0 takes the most likely token at each
        position (for categorical predictions only). ``steering`` are further arguments of :meth:`caption_latents`.
        """
        frames = [self._fit(video) for video in inputs.split_videos(videos)]
        seeds = self._caption_seeds(seed, generator, len(frames))
        texts: list[str] = []
        for part in inputs.spans(len(frames), batch_size):
            latents = wan.encode_frames(self.vae, torch.from_numpy(np.stack(frames[part])))
            settings = (num_inference_steps, guidance_scale, temperature, seeds[part])
            texts += self.caption_latents(latents, *settings, **steering)
        return texts

    @torch.no_grad()
    def caption_latents(
        self,
        latents: Tensor,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        seed: Seeds = 0,
        video_tau: float = 1.0,
        text_latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("text_latents",),
    ) -> list[str]:
        """:meth:`caption` for normalised latents (B, C, T, H, W), in one batch (eq 16).

        ``video_tau`` is the time at which the video is shown: 1 is the clean video, 0 is noise, which shows what the
        model writes without any video. ``text_latents`` (B, N, d) are the text's noise, and ``prompt_embeds``
        (1, L, text_dim) the encoded empty string, for a pipeline without its text encoder.
        """
        seeds = inputs.list_seeds(seed, len(latents), same=True)
        device = self._execution_device
        scale, temperature = self._text_guidance(guidance_scale), self._temperature(temperature)
        empty = self._encode_nothing() if prompt_embeds is None else prompt_embeds.to(device)
        stepper, self._interrupt = Stepper(self, callback_on_step_end, callback_on_step_end_tensor_inputs), False
        steps = self._text_steps(num_inference_steps, seeds)
        latents = latents.to(device)
        field = text_field(self.transformer, latents, seeds, empty, empty, scale, temperature, video_tau)
        ids = self._write(field, self._text_noise(seeds, text_latents), steps, stepper, latents)
        self.maybe_free_model_hooks()
        return text_space.detokenize(self.tokenizer, ids)

    # --- both ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def joint(
        self,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        caption_guidance_scale: float | None = None,
        temperature: float | None = None,
        shift: float | None = None,
        text_at: float | None = None,
        in_step: float | None = None,
        text_shift: float | None = None,
        prompt_until: float | None = None,
        seed: Seeds | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        text_latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        batch_size: int = 1,
        image: Any = None,
    ) -> UniViGUPipelineOutput | tuple[Any, list[str]]:
        """A video and its caption for each prompt, which may be empty: the text is written on the way to the video.

        Returns ``frames`` and ``captions``; both start from noise. With ``in_step=0``, the video is denoised to tau_v =
        ``text_at``; there the text is written, in the model's ``caption_steps``, beside the clean video predicted then,
        decoded and encoded again (eq 16); and the video is completed with that text as its prompt (eq 17). With
        ``in_step=1`` (or True), both are denoised in lockstep, eq 18, in the larger of the two numbers of steps; in
        between, during that part of the video's times. ``text_shift`` and ``prompt_until``: see `schedules.JointPath`.

        Video guidance moves away from the negative prompt (the empty string) without text, text guidance away from the
        text without video. ``text_latents`` (B, N, d) are the text's noise; the other arguments are those of the
        pipeline's call. Without a ``generator`` the seed is 0; video ``i`` has ``seed[i]``, or ``seed + i``.
        """
        check_output_type(output_type)
        count, path = self._joint_path(num_inference_steps, text_at, in_step, text_shift, prompt_until)
        asked = Conditions(self, prompt, prompt_embeds, 1, max_sequence_length, True, allow_empty=True)
        asked.read_negative(negative_prompt, negative_prompt_embeds)
        shape = self._latent_shape(num_frames, height, width, latents)
        asked.read_image(image, shape)
        seed = 0 if seed is None and generator is None else seed
        noise, seeds = video_noise(len(asked), shape, seed, generator, latents, self._execution_device)
        text_noise, frames, captions = self._text_noise(seeds, text_latents), [], []
        texts = self._text_guidance(caption_guidance_scale), self._temperature(temperature)
        for part in inputs.spans(len(asked), batch_size):
            stepper = Stepper(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
            steps = self._begin(count, shift, guidance_scale)
            batch = Batch(noise[part], text_noise[part], seeds[part], asked.guide(part), steps, stepper)
            captions += self._denoise_both(batch, path, *texts)
            frames.append(to_frames(self.vae, batch.video, output_type))
        self.maybe_free_model_hooks()
        return UniViGUPipelineOutput(join(frames), captions) if return_dict else (join(frames), captions)

    def _denoise_both(self, batch: Batch, path: JointPath, text_scale: float, temperature: float) -> list[str]:
        """The texts at the end of a path through both times (eq 18), and their videos in the batch."""
        steps, span = batch.steps, path.span(batch.steps.taus)
        if span.start:  # the video, beside a text that is still noise
            batch.video = self._denoise_video(batch, 0.0, range(span.start))
        if span:
            ids = self._write_in_step(batch, path, span, text_scale, temperature)
        else:
            ids = self._write_in_turn(batch, span.start, text_scale, temperature)
        texts = text_space.detokenize(self.tokenizer, ids)
        if span.stop < len(steps):  # the rest of the video, with that text as its prompt
            batch.guide.condition = self._encode(texts)
            batch.text = text_space.embed(ids, token_table(self.transformer, ids.device))
            batch.video = self._denoise_video(batch, 1.0, range(span.stop, len(steps)))
        batch.video = batch.guide.finish(batch.video)
        return texts

    def _write_in_turn(self, batch: Batch, turn: int, text_scale: float, temperature: float) -> Tensor:
        """Token ids (B, N) of texts written before a step of the video, beside the clean video predicted there."""
        steps, guide, noise = batch.steps, batch.guide, batch.text
        predicted, tau = batch.video, steps.taus[turn]
        if turn < len(steps):
            field = video_field(self.transformer, noise, 0.0, batch.seeds, guide)
            predicted = guide.finish(flow.velocity_to_data(field(predicted, tau), predicted, tau))
        # decoded and encoded again, because captioning is trained on the latents of real clips alone
        latents = wan.encode_frames(self.vae, wan.decode_latents(self.vae, predicted)).to(self._execution_device)
        condition = guide.condition
        empty = self._encode([""]) if text_scale > 1 else condition
        field = text_field(self.transformer, latents, batch.seeds, condition, empty, text_scale, temperature)
        # pyrefly: ignore[bad-argument-type]
        return self._write(field, noise, self._text_steps(None, batch.seeds), batch.stepper, batch.video)

    def _write_in_step(
        self, batch: Batch, path: JointPath, span: range, text_scale: float, temperature: float
    ) -> Tensor:
        """Token ids (B, N) of texts denoised together with their videos, over a span of the video's steps (eq 18)."""
        video, text, steps, guide = batch.video, batch.text, batch.steps, batch.guide
        shapes = video.shape[1:], self._text_shape
        field = joint_field(self.transformer, *shapes, batch.seeds, guide, text_scale, temperature)
        text_steps = EulerSteps(len(span), path.text_shift, self._execution_device)
        for k, i in enumerate(self.progress_bar(span)):
            if self.interrupt:
                continue
            tau = text_steps.taus[k]
            # pyrefly: ignore[bad-argument-type]
            velocities = field((video, text), (steps.taus[i], tau))
            if k + 1 < len(span) and text_steps.taus[k + 1] >= path.prompt_until:
                # pyrefly: ignore[bad-argument-type]
                said = self._nearest(flow.velocity_to_data(velocities[1], text, tau))
                guide.condition = self._encode(text_space.detokenize(self.tokenizer, said))
            # pyrefly: ignore[bad-argument-type]
            video, text = steps.step(i, video, velocities[0]), text_steps.step(k, text, velocities[1])
            replaced = batch.stepper.end(steps.taus[i], {"latents": video, "text_latents": text}, guide)
            video, text = replaced.get("latents", video), replaced.get("text_latents", text)
        batch.video = video
        # pyrefly: ignore[bad-argument-type]
        return self._nearest(text)

    def _write(self, field: Field, noise: Tensor, steps: Steps, stepper: Stepper, video: Tensor) -> Tensor:
        """Token ids (B, N) of the texts that a text field leads to from noise."""
        return self._nearest(stepper.integrate(field, "text_latents", noise, steps, latents=video))

    def _embed(self, texts: Sequence[str]) -> Tensor:
        """Clean text latents (B, N, d) of prompts (eq 7)."""
        device = self._execution_device
        ids = text_space.tokenize(self.tokenizer, [prompt_clean(text) for text in texts], self._text_shape[0])
        return text_space.embed(ids.to(device), token_table(self.transformer, device))

    def _nearest(self, z: Tensor) -> Tensor:
        if self._discrete:
            return z
        return text_space.nearest(z, token_table(self.transformer, z.device), self.transformer.config.tokenizer_length)


# `DiffusionPipeline.from_pretrained` looks up the class of a folder in diffusers' own namespace.
diffusers.UniViGUPipeline = UniViGUPipeline
