"""Caption a video, generate a video, or do both jointly (eq 16-18), as one diffusers pipeline.

Videos are uint8 RGB frames (F, H, W, 3). A video whose size or length is not the model's is scaled and cropped around
its centre, and its frames are taken evenly from its whole length. Input that can't be used raises ``BadInputError``.
All noise of a sample comes from its own seed, so a result does not depend on the rest of the batch.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from . import flow, inputs, text_space, wan
from .errors import BadInputError, MissingInputError
from .inputs import Seeds
from .sampling import Field, integrate_one, joint_field, seeded_noise, text_field, video_field
from .transformer import UniViGUTransformer3DModel
from .video import fit_frames


class UniViGUPipeline(DiffusionPipeline):
    """Uni-ViGU with its autoencoder, text encoder and tokenizer; the numbers are the defaults of its methods.

    There is no scheduler: the sampling times come from :func:`flow.tau_grid`. ``height`` and ``width`` are in pixels,
    ``fps`` is the frame rate of saved clips, ``shift`` Wan's timestep shift, ``max_sequence_length`` the padded length
    of the text encoder's states in tokens, and ``joint_text_at`` the tau_v at which :meth:`joint` writes the text.
    """

    def __init__(
        self,
        tokenizer: AutoTokenizer,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        transformer: UniViGUTransformer3DModel,
        num_frames: int = 81,
        height: int = 480,
        width: int = 832,
        fps: float = 16.0,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        shift: float = 3.0,
        caption_steps: int = 16,
        caption_guidance_scale: float = 1.0,
        caption_temperature: float = 0.1,
        joint_text_at: float = 0.2,
        max_sequence_length: int = 512,
    ):
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer)
        self.register_to_config(
            num_frames=num_frames,
            height=height,
            width=width,
            fps=float(fps),
            num_inference_steps=num_inference_steps,
            guidance_scale=float(guidance_scale),
            shift=float(shift),
            caption_steps=caption_steps,
            caption_guidance_scale=float(caption_guidance_scale),
            caption_temperature=float(caption_temperature),
            joint_text_at=float(joint_text_at),
            max_sequence_length=max_sequence_length,
        )

    @classmethod
    def from_wan(cls, source: str | Path, **settings: Any) -> "UniViGUPipeline":
        """A whole Wan text-to-video folder (or hub id) with a new, untrained text side.

        ``settings`` are this pipeline's defaults (``num_frames`` and so on) and the transformer's text arguments
        (``text_length`` and so on). Raises MissingInputError or BadInputError for any other folder.
        """
        wan.transformer_folder(source)
        folder = wan.local_folder(source)
        missing = [n for n in ("transformer", "vae", "text_encoder", "tokenizer") if not (folder / n).is_dir()]
        if missing:
            raise MissingInputError(f"{source} has no {' and no '.join(missing)}: give a complete checkpoint folder.")
        with wan.reading(source):
            tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tokenizer")
            text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", use_safetensors=True)
            vae = AutoencoderKLWan.from_pretrained(folder / "vae", use_safetensors=True)
        wan.check_text_encoder(text_encoder)
        defaults = {k: settings.pop(k) for k in list(settings) if k in inspect.signature(cls.__init__).parameters}
        vocabulary = {
            "tokenizer_length": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        transformer = UniViGUTransformer3DModel.from_wan(folder, **(vocabulary | settings))
        return cls(tokenizer, text_encoder, vae, transformer, **defaults)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the whole pipeline. The files don't name the source of its parts: equal models give equal bytes."""
        for part in (self, self.vae, self.transformer):
            part.register_to_config(_name_or_path="")
        # A tokenizer keeps the length of its last call, and would save it.
        if backend := getattr(self.tokenizer, "backend_tokenizer", None):
            backend.no_truncation()
            backend.no_padding()
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "UniViGUPipeline":
        """Load what ``save_pretrained`` wrote; raises a BadInputError (or a subclass of it) for other folders."""
        source = pretrained_model_name_or_path
        folder = wan.local_folder(source)
        if not (folder / "model_index.json").is_file():
            raise MissingInputError(f"{source} has no model_index.json: give the folder of a trained Uni-ViGU model.")
        name = wan.read_json(folder / "model_index.json").get("_class_name")
        if name != cls.__name__:
            raise BadInputError(f"{source} is {name}, not {cls.__name__}: give the folder of a trained Uni-ViGU model.")
        with wan.reading(source):
            # without a dtype, parts from transformers would keep the precision of their files
            precision = {} if "torch_dtype" in kwargs else {"dtype": torch.float32}
            pipeline = super().from_pretrained(folder, **({"use_safetensors": True} | precision | kwargs))
        wan.check_text_encoder(pipeline.text_encoder)
        return pipeline

    # --- caption, generate, joint -------------------------------------------------------------------------------------

    @torch.no_grad()
    def caption(
        self,
        videos: Any,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        seed: Seeds = 0,
        batch_size: int = 8,
    ) -> list[str]:
        """Describe one video (F, H, W, 3), uint8, or each of several; always returns a list of texts (eq 16).

        ``videos`` is an array, a tensor, a list of frames, or a list of videos. Video ``i`` has the seed ``seed[i]``,
        or ``seed + i``. A guidance other than 1 runs the text a second time, without the video. A ``temperature`` of 1
        samples from the texts that fit the video; a lower one sharpens the predicted tokens in each step, and 0 takes
        the most likely token at each position (for categorical predictions only).
        """
        frames = [self._fit(video) for video in inputs.split_videos(videos)]
        texts: list[str] = []
        for part, seeds in inputs.batches(frames, seed, batch_size):
            latents = wan.encode_frames(self.vae, torch.from_numpy(np.stack(part)))
            texts += self.caption_latents(latents, num_inference_steps, guidance_scale, temperature, seeds)
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
    ) -> list[str]:
        """:meth:`caption` for normalised latents (B, C, T, H, W), in one batch (eq 16).

        ``video_tau`` is the time at which the video is shown: 1 is the clean video, 0 is noise, which shows what the
        model writes without any video.
        """
        steps = inputs.positive(self.config.caption_steps if num_inference_steps is None else num_inference_steps)
        seeds = inputs.list_seeds(seed, len(latents))
        device = self._execution_device
        scale, temperature = self._text_guidance(guidance_scale), self._temperature(temperature)
        empty = self._encode([""])
        field = text_field(self.transformer, latents.to(device), seeds, empty, empty, scale, temperature, video_tau)
        ids = self._write(field, seeds, steps)
        self.maybe_free_model_hooks()
        return text_space.detokenize(self.tokenizer, ids)

    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str],
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        shift: float | None = None,
        seed: Seeds = 0,
        batch_size: int = 8,
    ) -> np.ndarray:
        """A video for each prompt: uint8 (B, F, H, W, 3) (eq 17).

        The prompt is given twice, as Wan's condition and as clean text beside the video; guidance moves away from the
        empty condition without text. F must be 4k + 1; height and width are in pixels, and multiples of what one patch
        covers. Video ``i`` has the seed ``seed[i]``, or ``seed + i``.
        """
        prompts = self._check_prompts(prompt)
        shape = self._latent_shape(num_frames, height, width)
        frames = []
        for part, seeds in inputs.batches(prompts, seed, batch_size):
            latents = self._generate_latents(part, shape, num_inference_steps, guidance_scale, shift, seeds)
            frames.append(wan.decode_latents(self.vae, latents))
        self.maybe_free_model_hooks()
        return torch.cat(frames).numpy()

    @torch.no_grad()
    def joint(
        self,
        prompt: str | Sequence[str] = "",
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        caption_guidance_scale: float | None = None,
        temperature: float | None = None,
        shift: float | None = None,
        text_at: float | None = None,
        in_step: bool = False,
        seed: Seeds = 0,
        batch_size: int = 8,
    ) -> tuple[np.ndarray, list[str]]:
        """A video and its caption, both from noise, for each prompt, which may be empty (eq 18).

        Returns uint8 (B, F, H, W, 3) and B texts. The two times move one after the other. First the video is denoised
        to tau_v = ``text_at``. Then the text is written from noise, in the model's ``caption_steps``, beside the clean
        video that is predicted at that point, decoded and encoded again (eq 16). Then the video is completed with that
        text as its prompt (eq 17). At 1 the text describes the finished video; at 0 it is written before any video.

        With ``in_step``, video and text are denoised in lockstep, as eq 18 is printed, in the larger of the two numbers
        of steps. Video guidance moves away from the empty condition without text, text guidance away from the text
        without video.
        """
        prompts = self._check_prompts(prompt, allow_empty=True)
        shape = self._latent_shape(num_frames, height, width)
        steps, shift = self._video_steps(num_inference_steps, shift)
        scales = self._guidance(guidance_scale), self._text_guidance(caption_guidance_scale)
        if in_step and text_at is not None:
            raise BadInputError(
                "With in_step, text and video are denoised in lockstep: give either text_at or in_step, not both."
            )
        temperature, text_at = self._temperature(temperature), self._text_at(text_at)
        frames, texts = [], []
        for part, seeds in inputs.batches(prompts, seed, batch_size):
            if in_step:
                videos, captions = self._joint_in_step(part, shape, (steps, shift), scales, temperature, seeds)
            else:
                videos, captions = self._joint_in_turn(part, shape, (steps, shift), text_at, scales, temperature, seeds)
            frames.append(videos)
            texts += captions
        self.maybe_free_model_hooks()
        return torch.cat(frames).numpy(), texts

    def _generate_latents(
        self,
        prompts: Sequence[str],
        shape: Sequence[int],
        num_inference_steps: int | None,
        guidance_scale: float | None,
        shift: float | None,
        seeds: list[int],
    ) -> Tensor:
        """Normalised latents (B, *shape) for each prompt (eq 17)."""
        device = self._execution_device
        grid = flow.tau_grid(*self._video_steps(num_inference_steps, shift), device)
        ids = text_space.tokenize(self.tokenizer, [prompt_clean(p) for p in prompts], self._text_shape[0])
        text = text_space.embed(ids.to(device), self.transformer.text_space())
        field = self._video_field(text, 1.0, seeds, self._encode(prompts), self._guidance(guidance_scale))
        return integrate_one(field, seeded_noise(seeds, "video", shape, device), grid, self.progress_bar)

    def _joint_in_turn(
        self,
        prompts: Sequence[str],
        shape: Sequence[int],
        sampler: tuple[int, float],
        text_at: float,
        scales: tuple[float, float],
        temperature: float,
        seeds: list[int],
    ) -> tuple[Tensor, list[str]]:
        """:meth:`joint` with one time moving at a time; ``sampler`` is the number of video steps and the shift."""
        device, (scale, text_scale) = self._execution_device, scales
        video = seeded_noise(seeds, "video", shape, device)
        text = seeded_noise(seeds, "text", self._text_shape, device)
        condition, grid = self._encode(prompts), flow.tau_grid(*sampler, device)

        # the video, beside a text that is still noise, up to the first time that is not before `text_at`
        turn = int(torch.searchsorted(grid, text_at))
        field = self._video_field(text, 0.0, seeds, condition, scale)
        video = integrate_one(field, video, grid[: turn + 1], self.progress_bar)

        # the text, beside the clean video predicted there
        finished = turn == len(grid) - 1
        predicted = video if finished else flow.velocity_to_data(field(video, grid[turn]), video, grid[turn])
        # decoded and encoded again, because captioning is trained on the latents of real clips alone
        frames = wan.decode_latents(self.vae, predicted)
        latents = wan.encode_frames(self.vae, frames).to(device)
        empty = self._encode([""])
        field = text_field(self.transformer, latents, seeds, condition, empty, text_scale, temperature)
        ids = self._write(field, seeds, inputs.positive(self.config.caption_steps))
        captions = text_space.detokenize(self.tokenizer, ids)
        if finished:
            return frames, captions

        # the rest of the video, with that text as its prompt
        text = text_space.embed(ids, self.transformer.text_space())
        field = self._video_field(text, 1.0, seeds, self._encode(captions), scale)
        return wan.decode_latents(self.vae, integrate_one(field, video, grid[turn:], self.progress_bar)), captions

    def _joint_in_step(
        self,
        prompts: Sequence[str],
        shape: Sequence[int],
        sampler: tuple[int, float],
        scales: tuple[float, float],
        temperature: float,
        seeds: list[int],
    ) -> tuple[Tensor, list[str]]:
        """:meth:`joint` in lockstep; only the video's times are shifted."""
        device, condition, empty = self._execution_device, self._encode(prompts), self._encode([""])
        field = joint_field(self.transformer, shape, self._text_shape, seeds, condition, empty, scales, temperature)
        steps, shift = max(sampler[0], inputs.positive(self.config.caption_steps)), sampler[1]
        grids = [flow.tau_grid(steps, shift, device), flow.tau_grid(steps, device=device)]
        states = [seeded_noise(seeds, "video", shape, device), seeded_noise(seeds, "text", self._text_shape, device)]
        video, text = flow.integrate(field, states, grids, self.progress_bar)
        return wan.decode_latents(self.vae, video), text_space.detokenize(self.tokenizer, self._nearest(text))

    def _video_field(self, text: Tensor, text_tau: float, seeds: list[int], condition: Tensor, scale: float) -> Field:
        return video_field(self.transformer, text, text_tau, seeds, condition, self._encode([""]), scale)

    def _write(self, field: Field, seeds: list[int], steps: int) -> Tensor:
        """Token ids (B, N) of the texts that a text field leads to from noise."""
        device = self._execution_device
        noise = seeded_noise(seeds, "text", self._text_shape, device)
        return self._nearest(integrate_one(field, noise, flow.tau_grid(steps, device=device), self.progress_bar))

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        """The condition c (B, L, text_dim) for each prompt."""
        length = self.config.max_sequence_length
        return wan.encode_prompts(self.tokenizer, self.text_encoder, prompts, length).to(self._execution_device)

    def _nearest(self, z: Tensor) -> Tensor:
        return text_space.nearest(z, self.transformer.text_space(), self.transformer.config.tokenizer_length)

    # --- arguments, or else the pipeline's defaults ------------------------------------------------------------------

    @property
    def _text_shape(self) -> tuple[int, int]:
        """(N, d) of a text's latents."""
        return self.transformer.config.text_length, self.transformer.config.text_latent_dim

    def _video_steps(self, num_inference_steps: int | None, shift: float | None) -> tuple[int, float]:
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        shift = inputs.valid_shift(self.config.shift if shift is None else shift)
        return inputs.positive(steps), shift

    def _guidance(self, guidance_scale: float | None) -> float:
        return self.config.guidance_scale if guidance_scale is None else guidance_scale

    def _text_guidance(self, guidance_scale: float | None) -> float:
        return self.config.caption_guidance_scale if guidance_scale is None else guidance_scale

    def _temperature(self, temperature: float | None) -> float:
        return inputs.valid_temperature(self.config.caption_temperature if temperature is None else temperature)

    def _text_at(self, text_at: float | None) -> float:
        return inputs.valid_tau(self.config.joint_text_at if text_at is None else text_at)

    def _latent_shape(self, num_frames: int | None, height: int | None, width: int | None) -> tuple[int, ...]:
        """(C, T, H, W) of the latents of a video, given or default, that this model can make."""
        given, default = (num_frames, height, width), (self.config.num_frames, self.config.height, self.config.width)
        frames, height, width = (d if g is None else g for g, d in zip(given, default, strict=True))
        time = self.vae.config.scale_factor_temporal
        _, patch_h, patch_w = self.transformer.config.patch_size
        tall, wide = (self.vae.config.scale_factor_spatial * patch for patch in (patch_h, patch_w))
        if min(frames, height, width) < 1 or (frames - 1) % time or height % tall or width % wide:
            raise BadInputError(
                f"{frames} frames of {height}x{width} pixels don't fit this model: give {time}k + 1 frames, a height"
                f" that is a multiple of {tall} and a width that is a multiple of {wide}."
            )
        shape = wan.latent_shape(self.vae, frames, height, width)
        # raises where video and text together are longer than the rotary tables
        self.transformer.rope.text(self.transformer.grid(shape[1:]), self._text_shape[0])
        return shape

    def _check_prompts(self, prompt: str | Sequence[str], allow_empty: bool = False) -> list[str]:
        limit = min(self.config.max_sequence_length, self.transformer.config.text_length)
        return inputs.list_prompts(prompt, self.tokenizer, limit, allow_empty)

    def _fit(self, video: Any) -> np.ndarray:
        """A video as the model takes it: (num_frames, height, width, 3)."""
        frames = inputs.as_frames(video)
        wanted = self.config.num_frames
        if len(frames) == 1 < wanted:
            raise BadInputError("The video is a single frame and this model describes motion: give two frames or more.")
        return fit_frames(frames, wanted, self.config.height, self.config.width)
