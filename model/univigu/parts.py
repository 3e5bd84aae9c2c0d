"""The parts of the pipeline: how they are loaded and saved, and the values of arguments that are not given."""

import inspect
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from diffusers.utils.torch_utils import get_device, randn_tensor
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from . import inputs, loading, wan
from .bases import Base, find_base
from .card import write_card
from .errors import BadInputError, MissingInputError
from .inputs import Generators, Seeds
from .lora import UniViGULoraLoaderMixin
from .sampling import seeded_noise
from .schedules import EulerSteps, Steps, check_scheduler, video_steps
from .stepping import CALLBACK_TENSORS
from .transformer import UniViGUTransformer3DModel
from .video import fit_frames

Device = torch.device | str | None


class PipelineParts(UniViGULoraLoaderMixin, DiffusionPipeline):
    """Uni-ViGU with its autoencoder, text encoder and tokenizer; the numbers are the defaults of its methods.

    ``height`` and ``width`` are in pixels, ``fps`` is the frame rate of saved clips, ``max_sequence_length`` the padded
    length of the text encoder's states in tokens, and ``joint_text_at`` the tau_v at which `joint` writes the text.
    Without a ``scheduler``, the steps of a video are Euler's, at the times of :func:`flow.tau_grid` with Wan's timestep
    ``shift``; any flow-matching scheduler of diffusers can replace them. Without a ``text_encoder``, prompts are given
    encoded. ``image_encoder``, ``image_processor`` and ``expand_timesteps`` are diffusers' for bases that take a first
    image (see `univigu.bases`).
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->transformer->vae"
    _optional_components = ["scheduler", "text_encoder", "image_encoder", "image_processor"]  # noqa: RUF012
    _callback_tensor_inputs = list(CALLBACK_TENSORS)  # noqa: RUF012

    def __init__(
        self,
        tokenizer: AutoTokenizer,
        text_encoder: UMT5EncoderModel | None,
        vae: AutoencoderKLWan,
        transformer: UniViGUTransformer3DModel,
        scheduler: Any = None,
        image_encoder: Any = None,
        image_processor: Any = None,
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
        expand_timesteps: bool = False,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
            image_encoder=image_encoder,
            image_processor=image_processor,
        )
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
            expand_timesteps=expand_timesteps,
        )
        self._guidance_scale, self._num_timesteps, self._interrupt = float(guidance_scale), 0, False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler" and value is not None:
            check_scheduler(value)
        super().__setattr__(name, value)
        if name == "scheduler":
            # diffusers doesn't write down a component where there was none before
            found = (None, None) if value is None else ("diffusers", type(value).__name__)
            self.register_to_config(scheduler=found)

    # --- loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def from_wan(cls, source: str | Path, **settings: Any) -> "PipelineParts":
        """A whole Wan folder (or hub id), of one of the kinds in `univigu.bases`, with a new, untrained text side.

        Nothing else is needed: sizes, lengths and shift come from the folder (see :func:`loading.wan_defaults`).
        ``settings`` are this pipeline's defaults (``num_frames`` and so on), the transformer's text arguments
        (``text_length`` and so on), and of diffusers' arguments ``dtype`` (or ``torch_dtype``), ``revision``,
        ``token``, ``cache_dir``, ``local_files_only`` and ``text_encoder=None``. Until the text side is trained,
        calling the pipeline gives Wan's own videos. Raises MissingInputError or BadInputError for any other folder.
        """
        folder = loading.fetch(source, settings)
        loading.check_wan(source, folder, without_text_encoder="text_encoder" in settings)
        settings = loading.wan_defaults(folder) | settings
        parts = {"tokenizer", "text_encoder", "vae", "transformer", "image_encoder", "image_processor"}
        ours = inspect.signature(cls.__init__).parameters.keys() - parts
        defaults = {name: settings.pop(name) for name in list(settings) if name in ours}
        return cls(**loading.wan_parts(source, folder, settings), **defaults)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "PipelineParts":
        """Load what ``save_pretrained`` wrote, from a folder or the hub.

        ``kwargs`` are those of diffusers: ``dtype`` (or ``torch_dtype``; by default float32), ``device_map``,
        ``quantization_config``, ``revision``, ``token``, ``cache_dir``, ``local_files_only``, and components such as
        ``scheduler`` or ``text_encoder=None``. An adapter that the model was trained with is loaded as ``trained``.
        Raises a BadInputError (or a subclass of it) for other folders.
        """
        source = pretrained_model_name_or_path
        folder = loading.fetch(source, kwargs)
        if not (folder / "model_index.json").is_file():
            raise MissingInputError(f"{source} has no model_index.json: give the folder of a trained Uni-ViGU model.")
        name = wan.read_json(folder / "model_index.json").get("_class_name")
        if name != cls.__name__:
            raise BadInputError(f"{source} is {name}, not {cls.__name__}: give the folder of a trained Uni-ViGU model.")
        with loading.reading(source, kwargs):
            # without a dtype, parts from transformers would keep the precision of their files
            precision = {} if "torch_dtype" in kwargs else {"dtype": torch.float32}
            pipeline = super().from_pretrained(folder, **({"use_safetensors": True} | precision | kwargs))
        loading.check_token_table(pipeline.text_encoder)
        pipeline._load_trained(folder)
        return pipeline

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the whole pipeline and its model card; with ``push_to_hub``, upload the folder too.

        The files don't name the source of its parts: equal models give equal bytes. A README.md that is there already
        is kept. The adapter that the model was trained with is saved beside it. Raises BadInputError while other LoRA
        adapters are loaded, because their layers would not load again.
        """
        trained = self._take_trained()
        for part in (self, self.vae, self.transformer):
            part.register_to_config(_name_or_path="")
        # A tokenizer keeps the length of its last call, and would save it.
        if backend := getattr(self.tokenizer, "backend_tokenizer", None):
            backend.no_truncation()
            backend.no_padding()
        hub = {name: kwargs.pop(name) for name in loading.PUSH_OPTIONS if name in kwargs}
        super().save_pretrained(save_directory, **kwargs)
        if trained:
            self.save_lora_weights(save_directory, transformer_lora_layers=trained)
            self._load_trained(Path(save_directory))
        card = Path(save_directory) / "README.md"
        if not card.exists():
            card.write_text(write_card(self), encoding="utf-8")
        if push_to_hub:
            loading.upload(Path(save_directory), hub.pop("repo_id", Path(save_directory).resolve().name), **hub)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save the pipeline and upload it to the hub repository ``owner/name``; returns the address of the commit.

        ``kwargs`` are ``commit_message``, ``private``, ``token``, ``create_pr``, and those of ``save_pretrained``.
        """
        hub = {name: kwargs.pop(name) for name in loading.PUSH_OPTIONS if name in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            return loading.upload(Path(folder), repo_id, **hub)

    # --- offloading ---------------------------------------------------------------------------------------------------

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Device = None) -> None:
        """Keep each part in CPU memory until it is called, as in diffusers.

        Without an accelerator the parts stay on the CPU, so the same script runs there, where diffusers raises. Without
        a ``device``, that of the previous call is used: ``load_lora_weights`` calls this again, without one.
        """
        super().enable_model_cpu_offload(gpu_id, self._offload_target(gpu_id, device))

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep each layer's weights in CPU memory until the layer is called, as in diffusers.

        Raises BadInputError without an accelerator. diffusers asks for the device ``cpu:0`` then, and accelerate
        (1.15, utils/modeling.py) fails with it: moved from ``cpu`` to ``cpu:0``, a parameter becomes a plain tensor.
        """
        target = self._offload_target(gpu_id, device)
        if torch.device(target).type == "cpu":
            raise BadInputError(
                "Sequential offloading needs an accelerator, and there is none: use `enable_model_cpu_offload()`,"
                " or call the pipeline as it is."
            )
        super().enable_sequential_cpu_offload(gpu_id, target)

    def _offload_target(self, gpu_id: int | None, device: Device) -> torch.device | str:
        """Where offloaded parts run: the given device, that of the previous call, the accelerator, or the CPU."""
        if device is not None:
            return device
        before = getattr(self, "_offload_device", None)
        return get_device() if before is None or gpu_id is not None else before

    @property
    def base(self) -> Base:
        """The kind of base that this model was made from."""
        return find_base(self.transformer.config, self.config)

    # --- what diffusers' callbacks and tools read ---------------------------------------------------------------------

    @property
    def guidance_scale(self) -> float:
        """The video's guidance in the call that runs; a callback may set ``_guidance_scale``."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the video is guided in the call that runs."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """The number of video steps of the call that runs."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the steps that remain are skipped; a callback may set ``_interrupt``."""
        return self._interrupt

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``prompt_embeds`` and ``negative_prompt_embeds``, (B, L, text_dim) each, for all three tasks.

        Without guidance the second is None.
        """
        length = self.config.max_sequence_length if max_sequence_length is None else max_sequence_length
        prompts = inputs.list_prompts(prompt, self.tokenizer, length, allow_empty=True)
        given = "" if negative_prompt is None else negative_prompt
        negatives = inputs.list_prompts(given, self.tokenizer, length, allow_empty=True)
        negatives = negatives * len(prompts) if len(negatives) == 1 else negatives
        found = [
            self._encode(prompts, length),
            self._encode(negatives, length) if do_classifier_free_guidance else None,
        ]
        first, second = (None if x is None else x.repeat_interleave(num_videos_per_prompt, dim=0) for x in found)
        # pyrefly: ignore[bad-return]
        return first, second

    def _encode(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        """The condition c (B, L, text_dim) for each prompt."""
        if self.text_encoder is None:
            raise BadInputError(
                "This pipeline has no text encoder: give `prompt_embeds` (with guidance above 1 also"
                " `negative_prompt_embeds`), or load the pipeline with its text encoder."
            )
        length = self.config.max_sequence_length if length is None else length
        return wan.encode_prompts(self.tokenizer, self.text_encoder, prompts, length).to(self._execution_device)

    # --- arguments, or else the pipeline's defaults ------------------------------------------------------------------

    @property
    def _text_shape(self) -> tuple[int, int]:
        """(N, d) of a text's latents."""
        return self.transformer.config.text_length, self.transformer.config.text_latent_dim

    def _is_text_side_trained(self) -> bool:
        """Whether the text head has left the zeros that it starts from (see `UniViGUTransformer3DModel.from_wan`).

        The head is asked by a call, because its weights may be offloaded.
        """
        model = self.transformer
        width = model.config.num_attention_heads * model.config.attention_head_dim
        hidden = torch.linspace(-1, 1, width, device=wan.runs_on(model.text_head)).to(model.dtype)
        return bool(model.text_head(hidden[None, None], hidden[None]).any())

    def _begin(self, num_inference_steps: int | None, shift: float | None, guidance_scale: float | None) -> Steps:
        """The steps of one batch of videos, and the state that callbacks read."""
        count = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        steps = video_steps(self.scheduler, count, shift, self.config.shift, self._execution_device)
        self._guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        self._num_timesteps, self._interrupt = len(steps), False
        return steps

    def _text_steps(self, num_inference_steps: int | None) -> EulerSteps:
        count = self.config.caption_steps if num_inference_steps is None else num_inference_steps
        return EulerSteps(inputs.positive(count), device=self._execution_device)

    def _text_guidance(self, guidance_scale: float | None) -> float:
        return self.config.caption_guidance_scale if guidance_scale is None else guidance_scale

    def _temperature(self, temperature: float | None) -> float:
        return inputs.valid_temperature(self.config.caption_temperature if temperature is None else temperature)

    def _joint_times(self, count: int | None, text_at: float | None, in_step: bool) -> tuple[int, float]:
        """How many steps `joint` takes, and the video's time at which it writes the text."""
        if in_step and text_at is not None:
            raise BadInputError(
                "With in_step, text and video are denoised in lockstep: give either text_at or in_step, not both."
            )
        count = inputs.positive(self.config.num_inference_steps if count is None else count)
        if in_step:
            count = max(count, inputs.positive(self.config.caption_steps))
        return count, inputs.valid_tau(self.config.joint_text_at if text_at is None else text_at)

    def _video_noise(
        self, count: int, shape: Sequence[int], seed: Seeds | None, generator: Generators, latents: Tensor | None
    ) -> tuple[Tensor, list[int]]:
        """The noise (B, C, T, H', W') of the videos, and a seed for all other noise of each."""
        device = self._execution_device
        if seed is not None and generator is not None:
            raise BadInputError("Both a seed and a generator were given: give one of them.")
        if isinstance(generator, Sequence) and len(generator) != count:
            raise BadInputError(f"There are {len(generator)} generators for {count} videos: give one for each.")
        if seed is not None:
            seeds = inputs.list_seeds(seed, count)
            noise = seeded_noise(seeds, "video", shape, device) if latents is None else latents
        else:
            noise = randn_tensor((count, *shape), generator, device, torch.float32) if latents is None else latents
            seeds = inputs.draw_seeds(generator, count)
        if len(noise) != count:
            raise BadInputError(f"There are latents of {len(noise)} videos for {count} prompts: give one for each.")
        return noise.to(device, torch.float32), seeds

    def _text_noise(self, seeds: list[int], text_latents: Tensor | None) -> Tensor:
        """The noise (B, N, d) of the texts."""
        device, shape = self._execution_device, (len(seeds), *self._text_shape)
        if text_latents is None:
            return seeded_noise(seeds, "text", self._text_shape, device)
        if tuple(text_latents.shape) != shape:
            raise BadInputError(f"text_latents are {tuple(text_latents.shape)}: give noise of the shape {shape}.")
        return text_latents.to(device, torch.float32)

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
