"""What describes a kind of base, and how a first image is shown to it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from diffusers.video_processor import VideoProcessor
from PIL.Image import Image
from torch import Tensor


class ImageCondition(Protocol):
    """The first image of B videos, or one for all of them, as a transformer is given it."""

    states: Tensor | None  # (B or 1, L', image_dim), of an image encoder

    def show(self, z: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """What the transformer takes for videos z (B, C, T, H', W') at tau (B,): ``hidden_states`` and ``tau``."""
        ...

    def finish(self, z: Tensor) -> Tensor:
        """The videos (B, C, T, H', W') that the last step has led to, with the image in its place."""
        ...


@dataclass(frozen=True)
class Base:
    """A kind of base. ``index`` is model_index.json; where a folder doesn't state its clips, they are ``clip``'s."""

    name: str
    fits: Callable[[Mapping[str, Any], Mapping[str, Any]], bool]  # (the transformer's config, index): is it this kind?
    clip: Mapping[str, Any]  # num_frames, height, width, and fps where it is not the pipeline's default
    # the parts in a folder beside those that every base has, with a precision by part: see `PipelineParts`
    parts: Callable[[Path, Callable[[str], Any]], dict[str, Any]] = lambda *_: {}
    # (pipeline, images: one, or one for each video, (C, T, H', W')): None for a base that takes no image
    show: Callable[[Any, Sequence[Image], Sequence[int]], ImageCondition] | None = None


def image_pixels(images: Sequence[Image], height: int, width: int) -> Tensor:
    """Images as pixels (B, 3, height, width) from -1 to 1; as in diffusers, an image of another shape is stretched."""
    return VideoProcessor().preprocess(list(images), height=height, width=width)
