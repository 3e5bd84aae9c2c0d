"""What callers give to the pipeline, checked and brought into one form; what can't be used raises ``BadInputError``."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from PIL import Image
from torch import Tensor

from .errors import BadInputError

Seeds = int | Sequence[int]
Generators = torch.Generator | Sequence[torch.Generator] | None


def split_videos(videos: Any) -> list[Any]:
    """One video, or several, as a list of videos: a single video is recognised by its frames of three dimensions."""
    if isinstance(videos, np.ndarray | Tensor):
        return list(videos) if videos.ndim == 5 else [videos]
    if not isinstance(videos, Sequence) or isinstance(videos, str | bytes) or not len(videos):
        raise BadInputError("The input has no video: give frames (F, H, W, 3), or a list of such videos.")
    # the array of an image has three dimensions; a video has four, or is itself a list of frames
    several = isinstance(videos[0], Sequence) or np.ndim(videos[0]) == 4
    return list(videos) if several else [videos]


def as_frames(video: Any) -> np.ndarray:
    """One video as uint8 RGB frames (F, H, W, 3); floats from 0 to 1, as pipelines return them, are converted."""
    frames = _as_array(video)
    if frames.dtype.kind == "f" and frames.size and frames.min() >= 0 and frames.max() <= 1:
        frames = (frames * 255).round().astype(np.uint8)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise BadInputError(
            f"A video must be RGB frames of shape (F, H, W, 3), uint8 or from 0 to 1, not {frames.dtype}"
            f" {frames.shape}: decode it to such frames first."
        )
    return frames


def _as_array(video: Any) -> np.ndarray:
    if isinstance(video, Tensor):
        return video.cpu().numpy()
    try:
        return np.asarray(video) if isinstance(video, np.ndarray) else np.stack([np.asarray(f) for f in video])
    except (TypeError, ValueError) as error:
        raise BadInputError(f"This is not a list of equal frames ({error}): give RGB frames of one size.") from error


def list_images(image: Any) -> list[Image.Image]:
    """One image, or a list of images, as RGB images: PIL's, arrays (H, W, 3), or tensors (H, W, 3) or (3, H, W).

    Arrays and tensors are uint8 or from 0 to 1; with a dimension more, they are several images.
    """
    # pyrefly: ignore[implicit-any-type-argument]
    several: list[Any] = list(image) if isinstance(image, list | tuple) or np.ndim(image) == 4 else [image]
    if not several:
        raise BadInputError("The list of images is empty: give an image, or one for each prompt.")
    return [_as_image(one) for one in several]


def _as_image(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] == 3 != image.shape[2]:
        image = image.movedim(0, -1)
    if np.ndim(image) != 3:
        raise BadInputError("An image must be PIL's, or RGB pixels of shape (H, W, 3): load it with PIL first.")
    return Image.fromarray(as_frames([image.cpu() if isinstance(image, Tensor) else image])[0])


def list_prompts(prompt: str | Sequence[str], tokenizer: Any, limit: int, allow_empty: bool) -> list[str]:
    """One prompt, or several, as a list; each has at most ``limit`` tokens. ``allow_empty`` allows "" alone."""
    # pyrefly: ignore[implicit-any-type-argument]
    prompts: list[Any] = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise BadInputError(
            "A prompt must be a text, or a list of texts that isn't empty: describe what the video should show."
        )
    for text in prompts:
        if allow_empty and text == "":
            continue
        if not text.strip():
            raise BadInputError("The prompt is empty: describe what the video should show.")
        length = len(tokenizer(prompt_clean(text), verbose=False)["input_ids"])
        if length > limit:
            raise BadInputError(f"The prompt has {length} tokens and this model reads at most {limit}: shorten it.")
    return prompts


def list_embeds(embeds: Any, width: int, name: str) -> list[Tensor]:
    """Encoded prompts (B, L, width) as a list of one per sample."""
    if not isinstance(embeds, Tensor) or embeds.ndim != 3 or embeds.shape[-1] != width:
        shape = tuple(getattr(embeds, "shape", ()))
        raise BadInputError(f"{name} must be a tensor (B, L, {width}), not {shape}: make it with `encode_prompt`.")
    return list(embeds)


def list_seeds(seed: Seeds, count: int, same: bool = False) -> list[int]:
    """One seed per sample: ``seed``, ``seed + 1`` and so on (``same``: ``seed`` for all), or the given list."""
    seeds = [seed + (0 if same else i) for i in range(count)] if isinstance(seed, int) else [int(s) for s in seed]
    if len(seeds) != count:
        raise BadInputError(f"There are {len(seeds)} seeds for {count} samples: give one per sample, or a single one.")
    return seeds


def draw_seeds(generator: Generators, count: int, same: bool = False) -> list[int]:
    """Seeds from a generator (None: torch's own), or one from each of a list of generators."""
    generators = list(generator) if isinstance(generator, Sequence) else [generator] * (1 if same else count)
    seeds = [
        int(torch.randint(0, 2**62, (1,), generator=one, device=one.device if one is not None else "cpu"))
        for one in generators
    ]
    return list_seeds(seeds * count if same and len(seeds) == 1 else seeds, count)


def spans(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``count`` items."""
    for start in range(0, count, positive(size)):
        yield slice(start, min(start + size, count))


def positive(number: int) -> int:
    """A number of steps, or of samples per batch."""
    if number < 1:
        raise BadInputError(f"The number of steps or the batch size is {number}: give a whole number of 1 or more.")
    return number


def valid_shift(shift: float) -> float:
    """A timestep shift."""
    if not shift > 0:
        raise BadInputError(f"The timestep shift is {shift}: give a number above 0.")
    return shift


def valid_temperature(temperature: float) -> float:
    """A temperature of the predicted tokens."""
    if not 0 <= temperature < math.inf:
        raise BadInputError(f"The temperature is {temperature}: give a finite number of 0 or more.")
    return temperature


def valid_tau(tau: float, name: str = "text_at") -> float:
    """A time of a joint sample, or a share of its times."""
    if not 0 <= tau <= 1:
        raise BadInputError(f"{name} is {tau}: give a number from 0 (noise) to 1 (clean).")
    return float(tau)
