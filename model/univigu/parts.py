"""The parts of the pipeline: how they are loaded, saved and offloaded."""

import inspect
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.utils.torch_utils import get_device
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from . import inputs, loading, released, wan
from .arguments import PipelineArguments
from .bases import Base, find_base
from .card import write_card
from .errors import BadInputError, MissingInputError
from .lora import UniViGULoraLoaderMixin
from .schedules import check_scheduler
from .stepping import CALLBACK_TENSORS
from .transformer import UniViGUTransformer3DModel

Device = torch.device | str | None


class PipelineParts(UniViGULoraLoaderMixin, PipelineArguments):
    """Uni-ViGU with its autoencoder, text encoder and tokenizer; the numbers are the defaults of its methods.

    ``height`` and ``width`` are in pixels, ``fps`` is the frame rate of saved clips, ``max_sequence_length`` the padded
    length of the text encoder's states in tokens, and ``joint_...`` is the path of `joint` (`schedules.JointPath`).
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
        joint_in_step: float = 0.0,
        joint_text_shift: float = 1.0,
        joint_prompt_until: float = 1.0,
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
            joint_in_step=float(joint_in_step),
            joint_text_shift=float(joint_text_shift),
            joint_prompt_until=float(joint_prompt_until),
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
    def from_release(cls, weights: str | Path, source: str | Path, **settings: Any) -> "PipelineParts":
        """The authors' released weights, in a safetensors file, with the other parts of the Wan folder they go with.

        See `univigu.released`; ``settings`` are those of :meth:`from_wan`. The model captions videos, and makes them
        from their prompt alone. Raises as `from_wan` and `released.read_weights`.
        """
        state = released.read_weights(weights)
        defaults = {"caption_steps": 50, "caption_temperature": 1.0}
        pipeline = cls.from_wan(source, **(defaults | released.text_side(state) | settings))
        released.load_weights(pipeline.transformer, state, weights)
        released.without_normalisation(pipeline.vae)
        return pipeline

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
        encode = wan.encode_padded if self._discrete else wan.encode_prompts
        return encode(self.tokenizer, self.text_encoder, prompts, length).to(self._execution_device)

    def _encode_nothing(self) -> Tensor:
        """The condition c (1, L, text_dim) without a prompt: the encoded empty string, or the release's zeros."""
        if self._discrete:
            return torch.zeros(1, self.config.max_sequence_length, self.transformer.config.text_dim).to(
                self._execution_device
            )
        return self._encode([""])
