"""What callers give to the pipeline, checked and brought into one form; what can't be used raises ``BadInputError``."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from .errors import BadInputError

Seeds = int | Sequence[int]


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
    """One video as uint8 RGB frames (F, H, W, 3)."""
    frames = _as_array(video)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise BadInputError(
            f"A video must be uint8 RGB frames of shape (F, H, W, 3), not {frames.dtype} {frames.shape}: decode it to"
            " such frames first."
        )
    return frames


def _as_array(video: Any) -> np.ndarray:
    if isinstance(video, Tensor):
        return video.cpu().numpy()
    try:
        return np.asarray(video) if isinstance(video, np.ndarray) else np.stack([np.asarray(f) for f in video])
    except (TypeError, ValueError) as error:
        raise BadInputError(f"This is not a list of equal frames ({error}): give RGB frames of one size.") from error


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


def list_seeds(seed: Seeds, count: int) -> list[int]:
    """One seed per sample: ``seed``, ``seed + 1`` and so on, or the given list."""
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else [int(s) for s in seed]
    if len(seeds) != count:
        raise BadInputError(f"There are {len(seeds)} seeds for {count} samples: give one per sample, or a single one.")
    return seeds


def batches(items: list[Any], seed: Seeds, size: int) -> Iterator[tuple[list[Any], list[int]]]:
    """The items in batches of at most ``size``, each with the seeds of its items."""
    seeds = list_seeds(seed, len(items))
    for start in range(0, len(items), positive(size)):
        yield items[start : start + size], seeds[start : start + size]


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


def valid_tau(tau: float) -> float:
    """The time at which a joint text is written."""
    if not 0 <= tau <= 1:
        raise BadInputError(f"text_at is {tau}: give a time from 0 (noise) to 1 (clean video).")
    return tau
