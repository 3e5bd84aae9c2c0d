"""The generator of clips: any text-to-video pipeline in diffusers' layout, called with the arguments it accepts."""

import copy
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from components.pipeline.lean_imports import import_models
from components.pipeline.weights import how_to_fetch
from components.settings.sections import Video
from univigu.attention import set_attention_backend
from univigu.compiling import compile_blocks
from univigu.errors import ConfigError, MissingInputError, first_line
from univigu.threads import Result, in_parts, map_on_cores

if TYPE_CHECKING:
    import numpy as np
    from diffusers import DiffusionPipeline


class Sampling(NamedTuple):
    """How clips are sampled."""

    steps: int
    guidance_scale: float
    negative_prompt: str = ""
    arguments: Mapping[str, Any] = MappingProxyType({})  # further arguments of the pipeline's call, by name


def load_generator(
    folder: Path,
    precision: str,
    *,
    vae_precision: str = "fp32",
    flow_shift: float | None = None,
    offload: str = "none",
    vae_memory: Sequence[str] = (),
    attention_backend: str = "",
    compiled: bool = False,
) -> "DiffusionPipeline":
    """The text-to-video pipeline in `folder`, on the GPU if there is one.

    precision: fp32 or bf16, of all parts but the autoencoder, which has `vae_precision`. flow_shift: the scheduler's
    timestep shift; None keeps its own. offload: `none`, `model` (idle parts are moved to CPU memory) or `sequential`
    (idle layers are); ignored without a GPU. vae_memory: `tiling` and `slicing`, which save memory. attention_backend:
    one of diffusers', such as `flash` or `sage`. compiled: let torch compile the denoiser's blocks. Raises
    `MissingInputError` if the folder or its weights are missing, and `ConfigError` if it isn't such a pipeline or
    doesn't support an option.
    """
    import_models()
    import torch
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    check_layout(folder)
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            folder,
            dtype={"default": kinds[precision], "vae": kinds[vae_precision]},
            local_files_only=True,
            use_safetensors=True,
        )
        if not torch.cuda.is_available():
            pipeline.to("cpu")
        elif offload == "none":
            pipeline.to("cuda")
        elif offload == "model":
            pipeline.enable_model_cpu_offload()
        else:
            pipeline.enable_sequential_cpu_offload()
    # pyrefly: ignore[unreachable-except-clause]
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, AttributeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise ConfigError(f"The generator {folder.name} doesn't fit the GPU; {_SMALLER}.") from error
        raise ConfigError(
            f"The pipeline at {folder} can't be loaded ({first_line(error)}); it is damaged, incomplete, or from "
            f"another library: {how_to_fetch(folder)}."
        ) from error
    if flow_shift is not None:
        pipeline.scheduler = _with_shift(pipeline.scheduler, flow_shift)
    for option in vae_memory:
        _save_memory(pipeline, option)
    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    set_attention_backend(denoiser, attention_backend)
    if compiled:
        compile_blocks(denoiser)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    return pipeline


_SMALLER = "lower 'batch_size', set 'vae_memory' to [tiling], or 'offload' to model (then sequential)"


def check_layout(folder: Path) -> None:
    """Check that `folder` has a pipeline's index and weights for each part; raises as `load_generator` does."""
    import json

    if (unfinished := sorted(folder.rglob("*.incomplete"))) and not list(folder.glob("*/*.safetensors")):
        raise MissingInputError(
            f"The download of {folder} isn't finished ({unfinished[0].name}); {how_to_fetch(folder)}."
        )
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingInputError(
            f"There is no pipeline in diffusers' layout at {folder} (no model_index.json); {how_to_fetch(folder)}."
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'model_index.json'} can't be read as JSON; {how_to_fetch(folder)}.") from error
    for name, part in index.items():
        needs_weights = isinstance(part, list) and part[0] and name in ("transformer", "unet", "vae", "text_encoder")
        if needs_weights and not list((folder / name).glob("*.safetensors")):
            raise MissingInputError(f"There are no weights (*.safetensors) in {folder / name}; {how_to_fetch(folder)}.")


def _with_shift(scheduler: Any, flow_shift: float) -> Any:
    for name in ("flow_shift", "shift"):
        if name in scheduler.config:
            return type(scheduler).from_config(scheduler.config, **{name: flow_shift})
    raise ConfigError(f"The generator's {type(scheduler).__name__} has no timestep shift; set 'flow_shift' to null.")


def _save_memory(pipeline: "DiffusionPipeline", option: str) -> None:
    try:
        getattr(pipeline.vae, f"enable_{option}")()
    except (AttributeError, NotImplementedError) as error:
        raise ConfigError(f"The generator's autoencoder has no {option}; remove it from 'vae_memory'.") from error


def generate(
    pipeline: "DiffusionPipeline",
    rows: Sequence[Mapping[str, Any]],
    video: Video,
    sampling: Sampling,
) -> "np.ndarray":
    """Clips float (B, F, H, W, 3) in [0, 1], one per row; each has its own noise, so the batch doesn't change it.

    rows: with `prompt` and `seed`. Raises `ConfigError` for a size that this pipeline can't make, and for arguments
    that it doesn't accept. On a CPU, several parts of the batch are made at a time.
    """
    import numpy as np

    return np.concatenate(map_generated(lambda _, clips: clips, pipeline, rows, video, sampling))


def map_generated(
    use: Callable[[Sequence[Mapping[str, Any]], "np.ndarray"], Result],
    pipeline: "DiffusionPipeline",
    rows: Sequence[Mapping[str, Any]],
    video: Video,
    sampling: Sampling,
) -> list[Result]:
    """`use(rows, clips)` of each part of a batch (see `generate`), in the thread that made the part's clips."""
    check_size(pipeline, video)

    def make(part: Sequence[Mapping[str, Any]]) -> Result:
        return use(part, _generate(for_a_thread(pipeline), part, video, sampling))

    return map_on_cores(make, in_parts(rows))


def for_a_thread(pipeline: Any) -> Any:
    """A pipeline with the same weights that can run beside the given one: what a call changes is its own.

    These are the pipeline's attributes, the scheduler's steps, and the frames that Wan's autoencoder keeps
    (diffusers 0.39, AutoencoderKLWan.clear_cache).
    """
    other = copy.copy(pipeline)
    for name, own in (("scheduler", copy.deepcopy), ("vae", copy.copy)):
        if getattr(pipeline, name, None) is not None:
            # not by diffusers' own way, which imports torch's compiler and writes to the config that both share
            vars(other)[name] = own(getattr(pipeline, name))
    return other


def _generate(
    pipeline: "DiffusionPipeline", rows: Sequence[Mapping[str, Any]], video: Video, sampling: Sampling
) -> "np.ndarray":
    import numpy as np
    import torch

    arguments = call_arguments(pipeline, rows, video, sampling)
    name = type(pipeline).__name__
    try:
        videos = np.asarray(pipeline(**arguments).frames)
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"The GPU has too little memory for a batch of {len(rows)} clips; {_SMALLER}.") from error
    except ValueError as error:  # raised by pipelines for invalid arguments
        raise ConfigError(
            f"{name} rejected the profile's settings ({first_line(error)}); correct them in the profile."
        ) from error
    wanted = (len(rows), video.frames, video.height, video.width, 3)
    if videos.shape != wanted:
        raise ConfigError(
            f"{name} made clips of shape {videos.shape} instead of {wanted}; choose another size in the profile's "
            "'video'."
        )
    return videos


def call_arguments(
    pipeline: "DiffusionPipeline",
    rows: Sequence[Mapping[str, Any]],
    video: Video,
    sampling: Sampling,
) -> dict[str, Any]:
    """The arguments of a pipeline's call: those of the profile's settings that the pipeline accepts."""
    import torch

    known = inspect.signature(pipeline.__call__).parameters
    offered = {
        "prompt": [row["prompt"] for row in rows],
        "negative_prompt": sampling.negative_prompt,
        **dict.fromkeys(("num_frames", "video_length"), video.frames),
        **dict.fromkeys(("frame_rate", "fps"), video.fps),
        "height": video.height,
        "width": video.width,
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        "generator": [torch.Generator("cpu").manual_seed(row["seed"]) for row in rows],
        "output_type": "np",
    }
    extra = sampling.arguments
    name = type(pipeline).__name__
    if unknown := sorted(extra.keys() - known.keys()):
        raise ConfigError(f"{name} has no argument '{unknown[0]}'; it has {', '.join(sorted(known))}.")
    arguments = {**{key: value for key, value in offered.items() if key in known}, **extra}
    needed = [key for key, parameter in known.items() if parameter.default is inspect.Parameter.empty]
    missing = [key for key in ("prompt", "generator", *needed) if key not in arguments]
    if missing or not {"num_frames", "video_length"} & arguments.keys():
        lack = f"it needs '{missing[0]}'" if missing else "it has no argument for the number of frames"
        raise ConfigError(f"{name} can't make a video from text alone ({lack}); use a text-to-video pipeline.")
    return arguments


def check_size(pipeline: "DiffusionPipeline", video: Video) -> None:
    """Raise `ConfigError` if the pipeline can't make clips of exactly this size; many would round it."""
    temporal = _first(pipeline, "vae_scale_factor_temporal", "vae_temporal_compression_ratio") or 1
    spatial = _first(pipeline, "vae_scale_factor_spatial", "vae_spatial_compression_ratio") or 1
    denoiser = getattr(pipeline, "transformer", None)
    patch = getattr(denoiser.config, "patch_size", 1) if denoiser else 1
    sides = math.lcm(16, spatial * (patch[-1] if isinstance(patch, Sequence) else patch or 1))
    if video.height % sides or video.width % sides or (video.frames - 1) % temporal:
        raise ConfigError(
            f"{type(pipeline).__name__} can't make {video.frames} frames of {video.height}x{video.width}; "
            f"choose sides that are multiples of {sides} and {temporal}k + 1 frames in the profile's 'video'."
        )


def _first(pipeline: Any, *names: str) -> Any:
    return next((getattr(pipeline, name) for name in names if getattr(pipeline, name, None)), None)
