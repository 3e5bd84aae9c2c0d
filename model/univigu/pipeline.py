"""Caption a video, generate a video, or do both jointly (eq 16-18), as one diffusers pipeline.

Videos are uint8 RGB frames (F, H, W, 3). A video of another size or length than the model's is scaled and cut around
its centre, and its frames are taken evenly from its whole length; what can't be used raises ``BadInputError``.
All noise of a sample comes from its own seed, so a result does not depend on what else is in the batch.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from . import flow, text_space, wan
from .errors import BadInputError, MissingInputError
from .transformer import UniViGUTransformer3DModel
from .video import fit_frames

Seeds = int | Sequence[int]
Field = Callable[[Tensor, Tensor], Tensor]  # (z, tau) to a velocity


class UniViGUPipeline(DiffusionPipeline):
    """Uni-ViGU with its autoencoder, text encoder and tokenizer; the numbers are the defaults of its methods.

    There is no scheduler: the times of sampling are :func:`flow.tau_grid`'s. ``shift`` is Wan's timestep shift,
    ``max_sequence_length`` the text encoder's padded length, ``fps`` what a saved clip plays at.
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

        ``settings`` are this pipeline's defaults (``num_frames`` ...) and the transformer's text arguments
        (``text_length`` ...). Raises MissingInputError or BadInputError where the folder isn't such a checkpoint.
        """
        wan.transformer_folder(source)
        folder = wan.local_folder(source)
        missing = [n for n in ("transformer", "vae", "text_encoder", "tokenizer") if not (folder / n).is_dir()]
        if missing:
            raise MissingInputError(f"{source} has no {' and no '.join(missing)}: give a whole checkpoint folder.")
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
        """Write the whole pipeline. Nothing in it says where its parts were read from: equal models, equal bytes."""
        for part in (self, self.vae, self.transformer):
            part.register_to_config(_name_or_path="")
        # A tokenizer that was used keeps the last call's length, and would write it down.
        if backend := getattr(self.tokenizer, "backend_tokenizer", None):
            backend.no_truncation()
            backend.no_padding()
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "UniViGUPipeline":
        """Load what ``save_pretrained`` wrote; a folder that holds something else is refused in one sentence."""
        source = pretrained_model_name_or_path
        folder = wan.local_folder(source)
        if not (folder / "model_index.json").is_file():
            raise MissingInputError(f"{source} holds no model_index.json: give the folder of a trained Uni-ViGU.")
        name = wan.read_json(folder / "model_index.json").get("_class_name")
        if name != cls.__name__:
            raise BadInputError(f"{source} is {name}, not {cls.__name__}: give the folder of a trained Uni-ViGU.")
        with wan.reading(source):
            pipeline = super().from_pretrained(folder, **({"use_safetensors": True} | kwargs))
        wan.check_text_encoder(pipeline.text_encoder)
        return pipeline

    # --- the three things it does -----------------------------------------------------------------------------------

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
        """Say what is in one video (F, H, W, 3), uint8, or in each of several; always a list of texts.

        ``videos`` is an array, a tensor, a list of frames, or a list of videos. Video ``i`` has the seed ``seed[i]``,
        or ``seed + i``. A guidance of 1 costs nothing; another runs the text a second time, without the video. In many
        steps at a ``temperature`` of 1 a text is drawn from those that fit the video; a lower one sharpens the
        predicted tokens on the way, down to the likeliest at each place at 0 (categorical predictions alone).
        """
        frames = [self._fit(video) for video in _split_videos(videos)]
        texts: list[str] = []
        for part, seeds in _batches(frames, seed, batch_size):
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

        ``video_tau`` is how much of the video is seen: 1 all, 0 nothing but noise, which shows what the model says
        without any video.
        """
        steps = _positive(self.config.caption_steps if num_inference_steps is None else num_inference_steps)
        seeds = _seeds(seed, len(latents))
        device = self._execution_device
        temperature = self._temperature(temperature)
        field = self._text_field(latents.to(device), seeds, self._text_guidance(guidance_scale), temperature, video_tau)
        z = self._carry(field, _noise(seeds, "text", self._text_shape, device), flow.tau_grid(steps, device=device))
        self.maybe_free_model_hooks()
        return self._say(z)

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

        The prompt is given twice, as Wan's condition and as clean text beside the video; guidance goes away from
        the empty condition without text. F must be 4k + 1 and the sides multiples of the model's patch, in pixels.
        """
        prompts = self._check_prompts(prompt)
        shape = self._latent_shape(num_frames, height, width)
        frames = []
        for part, seeds in _batches(prompts, seed, batch_size):
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
        """A video and its caption from noise together, for each prompt, which may be empty (eq 18).

        Returns uint8 (B, F, H, W, 3) and B texts. Of the two times one moves at a time: the video goes to tau_v =
        ``text_at``; the text is written, from noise, in the model's ``caption_steps``, beside the clean video that is
        predicted there, decoded and encoded like any other (eq 16); the video goes on with that text as its prompt (eq
        17). At 1 the text describes the finished video, at 0 it is written before there is one. With ``in_step`` both
        go together, as eq 18 is printed, in the larger of the two numbers of steps. Video guidance goes away from the
        empty condition without text, text guidance away from the text without video.
        """
        prompts = [prompt] if prompt == "" else self._check_prompts(prompt, allow=("",))
        shape = self._latent_shape(num_frames, height, width)
        steps, shift = self._video_steps(num_inference_steps, shift)
        scales = self._guidance(guidance_scale), self._text_guidance(caption_guidance_scale)
        if in_step and text_at is not None:
            raise BadInputError("With in_step a joint text is written all along: leave text_at out, or in_step.")
        temperature, text_at = self._temperature(temperature), self._text_at(text_at)
        frames, texts = [], []
        for part, seeds in _batches(prompts, seed, batch_size):
            if in_step:
                drawn, said = self._joint_in_step(part, shape, (steps, shift), scales, temperature, seeds)
            else:
                drawn, said = self._joint_in_turn(part, shape, (steps, shift), text_at, scales, temperature, seeds)
            frames.append(drawn)
            texts += said
        self.maybe_free_model_hooks()
        return torch.cat(frames).numpy(), texts

    # --- how --------------------------------------------------------------------------------------------------------

    def _text_field(
        self,
        latents: Tensor,
        seeds: list[int],
        scale: float,
        temperature: float,
        tau: float = 1.0,
        condition: Tensor | None = None,
    ) -> Field:
        """The text's velocity beside a video that is given: (z_t, tau_t) to u_t (eq 16)."""
        model, empty = self.transformer, self._encode([""])
        blank = _noise(seeds, "no video", latents.shape[1:], latents.device)
        context = empty if condition is None else condition
        seen = model.prefill_video(flow.interpolate(blank, latents, tau), _times(tau, latents), context)
        unseen = None if scale == 1 else model.prefill_video(blank, _times(0.0, latents), empty)
        guess: Tensor | None
        table, guess = model.text_space(), None

        def field(z: Tensor, tau: Tensor) -> Tensor:
            nonlocal guess
            tau = _times(tau, z)
            hidden = model.denoise_text(z, tau, seen, guess)
            if unseen is not None:
                without = model.denoise_text(z, tau, unseen, guess)
                hidden = without + scale * (hidden - without)
            prediction = model.read_text(hidden, z, tau, table, temperature=temperature)
            guess = prediction.data
            return prediction.velocity

        return field

    def _video_field(self, condition: Tensor, text: Tensor, text_tau: float, seeds: list[int], scale: float) -> Field:
        """The video's velocity beside a text at rest: (z_v, tau_v) to u_v (eq 17)."""
        model, empty = self.transformer, self._encode([""])
        no_text = _noise(seeds, "no text", self._text_shape, condition.device)

        def field(z: Tensor, tau: Tensor) -> Tensor:
            tau = _times(tau, z)
            velocity = model(z, tau, condition, text, _times(text_tau, z)).video.float()
            if scale != 1:
                without = model(z, tau, empty, no_text, _times(0.0, z)).video.float()
                velocity = without + scale * (velocity - without)
            return velocity

        return field

    def _carry(self, field: Field, z: Tensor, grid: Tensor) -> Tensor:
        """One modality along its grid, by Euler steps."""
        (z,) = flow.integrate(lambda states, taus: (field(*states, *taus),), [z], [grid], self.progress_bar)
        return z

    def _generate_latents(
        self,
        prompts: Sequence[str],
        shape: Sequence[int],
        num_inference_steps: int | None,
        guidance_scale: float | None,
        shift: float | None,
        seeds: list[int],
    ) -> Tensor:
        device = self._execution_device
        grid = flow.tau_grid(*self._video_steps(num_inference_steps, shift), device)
        ids = text_space.tokenize(self.tokenizer, [prompt_clean(p) for p in prompts], self._text_shape[0])
        text = text_space.embed(ids.to(device), self.transformer.text_space())
        field = self._video_field(self._encode(prompts), text, 1.0, seeds, self._guidance(guidance_scale))
        return self._carry(field, _noise(seeds, "video", shape, device), grid)

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
        device, (scale, text_scale) = self._execution_device, scales
        video, text = _noise(seeds, "video", shape, device), _noise(seeds, "text", self._text_shape, device)
        condition, grid = self._encode(prompts), flow.tau_grid(*sampler, device)
        turn = int(torch.searchsorted(grid, text_at))
        field = self._video_field(condition, text, 0.0, seeds, scale)
        video = self._carry(field, video, grid[: turn + 1])

        finished = turn == len(grid) - 1
        sketch = video if finished else flow.velocity_to_data(field(video, grid[turn]), video, grid[turn])
        frames = wan.decode_latents(self.vae, sketch)
        latents = wan.encode_frames(self.vae, frames).to(device)
        field = self._text_field(latents, seeds, text_scale, temperature, condition=condition)
        ids = self._nearest(
            self._carry(field, text, flow.tau_grid(_positive(self.config.caption_steps), device=device))
        )
        said = text_space.detokenize(self.tokenizer, ids)
        if finished:
            return frames, said

        text = text_space.embed(ids, self.transformer.text_space())
        field = self._video_field(self._encode(said), text, 1.0, seeds, scale)
        return wan.decode_latents(self.vae, self._carry(field, video, grid[turn:])), said

    def _joint_in_step(
        self,
        prompts: Sequence[str],
        shape: Sequence[int],
        sampler: tuple[int, float],
        scales: tuple[float, float],
        temperature: float,
        seeds: list[int],
    ) -> tuple[Tensor, list[str]]:
        model, device, (scale, text_scale) = self.transformer, self._execution_device, scales
        condition, empty = self._encode(prompts), self._encode([""])
        no_text = _noise(seeds, "no text", self._text_shape, device)
        no_video = _noise(seeds, "no video", shape, device)
        guess: Tensor | None
        table, guess = model.text_space(), None

        def field(states: tuple[Tensor, ...], taus: tuple[Tensor, ...]) -> Sequence[Tensor]:
            nonlocal guess
            video, text = states
            video_tau, text_tau = (_times(tau, video) for tau in taus)
            out = model(video, video_tau, condition, text, text_tau, guess)
            velocity, hidden = out.video.float(), out.text
            if scale != 1:
                without = model(video, video_tau, empty, no_text, _times(0.0, video)).video.float()
                velocity = without + scale * (velocity - without)
            if text_scale != 1:
                without = model(no_video, _times(0.0, video), condition, text, text_tau, guess).text
                hidden = without + text_scale * (hidden - without)
            prediction = model.read_text(hidden, text, text_tau, table, temperature=temperature)
            guess = prediction.data
            return velocity, prediction.velocity

        steps, shift = max(sampler[0], _positive(self.config.caption_steps)), sampler[1]
        grids = [flow.tau_grid(steps, shift, device), flow.tau_grid(steps, device=device)]
        states = _noise(seeds, "video", shape, device), _noise(seeds, "text", self._text_shape, device)
        video, text = flow.integrate(field, states, grids, self.progress_bar)
        return wan.decode_latents(self.vae, video), self._say(text)

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        length = self.config.max_sequence_length
        return wan.encode_prompts(self.tokenizer, self.text_encoder, prompts, length).to(self._execution_device)

    def _nearest(self, z: Tensor) -> Tensor:
        return text_space.nearest(z, self.transformer.text_space(), self.transformer.config.tokenizer_length)

    def _say(self, z: Tensor) -> list[str]:
        return text_space.detokenize(self.tokenizer, self._nearest(z))

    @property
    def _text_shape(self) -> tuple[int, int]:
        return self.transformer.config.text_length, self.transformer.config.text_latent_dim

    def _video_steps(self, num_inference_steps: int | None, shift: float | None) -> tuple[int, float]:
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        shift = self.config.shift if shift is None else shift
        if not shift > 0:
            raise BadInputError(f"A timestep shift of {shift} makes no sense: give a number above 0.")
        return _positive(steps), shift

    def _guidance(self, guidance_scale: float | None) -> float:
        return self.config.guidance_scale if guidance_scale is None else guidance_scale

    def _text_guidance(self, guidance_scale: float | None) -> float:
        return self.config.caption_guidance_scale if guidance_scale is None else guidance_scale

    def _temperature(self, temperature: float | None) -> float:
        temperature = self.config.caption_temperature if temperature is None else temperature
        if not 0 <= temperature < math.inf:
            raise BadInputError(f"A temperature of {temperature} makes no sense: give 0 or more.")
        return temperature

    def _text_at(self, text_at: float | None) -> float:
        text_at = self.config.joint_text_at if text_at is None else text_at
        if not 0 <= text_at <= 1:
            raise BadInputError(f"No video is at tau = {text_at}: give text_at a time from 0 (noise) to 1 (clean).")
        return text_at

    def _latent_shape(self, num_frames: int | None, height: int | None, width: int | None) -> tuple[int, ...]:
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
        self.transformer.rope.text(self.transformer.grid(shape[1:]), self._text_shape[0])  # is there room for all of it
        return shape

    def _check_prompts(self, prompt: str | Sequence[str], allow: Sequence[str] = ()) -> list[str]:
        # pyrefly: ignore[implicit-any-type-argument]
        prompts: list[Any] = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        limit = min(self.config.max_sequence_length, self.transformer.config.text_length)
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise BadInputError(
                "A prompt must be a text, or a list of texts that isn't empty: write what the video shows."
            )
        for text in prompts:
            if text in allow:
                continue
            if not text.strip():
                raise BadInputError("The prompt is empty: write what the video should show.")
            length = len(self.tokenizer(prompt_clean(text), verbose=False)["input_ids"])
            if length > limit:
                raise BadInputError(f"The prompt has {length} tokens and this model reads at most {limit}: shorten it.")
        return prompts

    def _fit(self, video: Any) -> np.ndarray:
        frames = _as_array(video)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise BadInputError(
                f"A video must be uint8 RGB frames of shape (F, H, W, 3) and this is {frames.dtype} {frames.shape}:"
                " decode it to such frames first."
            )
        wanted = self.config.num_frames
        if len(frames) == 1 < wanted:
            raise BadInputError("The video is a single frame and this model describes motion: give two frames or more.")
        return fit_frames(frames, wanted, self.config.height, self.config.width)


def _as_array(video: Any) -> np.ndarray:
    if isinstance(video, Tensor):
        return video.cpu().numpy()
    try:
        return np.asarray(video) if isinstance(video, np.ndarray) else np.stack([np.asarray(f) for f in video])
    except (TypeError, ValueError) as error:
        raise BadInputError(f"This is not a list of equal frames ({error}): give RGB frames of one size.") from error


def _split_videos(videos: Any) -> list[Any]:
    """One video, or several, as a list of videos: what has frames of three dimensions is one."""
    if isinstance(videos, np.ndarray | Tensor):
        return list(videos) if videos.ndim == 5 else [videos]
    if not isinstance(videos, Sequence) or isinstance(videos, str | bytes) or not len(videos):
        raise BadInputError("There is no video in what was given: give frames (F, H, W, 3), or a list of such videos.")
    # an image's array has three dimensions, a video has more, or is itself a list of frames
    several = isinstance(videos[0], Sequence) or np.ndim(videos[0]) == 4
    return list(videos) if several else [videos]


def _seeds(seed: Seeds, count: int) -> list[int]:
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else [int(s) for s in seed]
    if len(seeds) != count:
        raise BadInputError(f"There are {len(seeds)} seeds for {count} samples: give one each, or a single one.")
    return seeds


def _batches(items: list[Any], seed: Seeds, size: int) -> Iterator[tuple[list[Any], list[int]]]:
    seeds = _seeds(seed, len(items))
    for start in range(0, len(items), _positive(size)):
        yield items[start : start + size], seeds[start : start + size]


def _noise(seeds: Sequence[int], name: str, shape: Sequence[int], device: torch.device) -> Tensor:
    return flow.keyed_noise([(seed, name) for seed in seeds], shape, device)


def _times(tau: Tensor | float, like: Tensor) -> Tensor:
    """One time for the whole batch, as the model wants it: (B,)."""
    return torch.as_tensor(tau, dtype=torch.float32, device=like.device).expand(len(like))


def _positive(number: int) -> int:
    if number < 1:
        raise BadInputError(f"{number} steps, or samples at a time, make no sense: give a whole number of 1 or more.")
    return number
