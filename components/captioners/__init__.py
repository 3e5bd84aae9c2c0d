"""Who writes captions: one module a captioner, named in the profile, with ``create(config) -> Captioner``.

The interface fits a program that measures frames and a language model behind an HTTP API alike: requests come in
batches, carry what a caption must keep to and what was wrong with the last one, and each gets a response with a status.
A service that can't be reached raises `TransientError`: the step stops, and its next run goes on with the shard.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol

from univigu.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

Status = Literal["success", "truncated", "blocked", "error", "skipped"]


@dataclass(frozen=True)
class CaptionRequest:
    """One clip to be described: what is seen, what was asked for, and what the caption must keep to."""

    id: str  # the clip's id: keys all randomness, and makes a repeated request recognisable to a service
    frames: "np.ndarray"  # uint8 (F, H, W, 3)
    fps: float
    prompt: str
    token_range: tuple[int, int]  # the profile's, EOS included, counted with the base's tokenizer
    attempt: int = 1
    last_text: str = ""
    complaint: str = ""  # what was wrong with `last_text`, in words


@dataclass(frozen=True)
class CaptionResponse:
    """What came back. `usage` counts whatever a service charges for (tokens, images); sums go into the manifest."""

    text: str
    status: Status = "success"
    detail: str = ""
    usage: Mapping[str, float] | None = None


class Captioner(Protocol):
    """Writes captions. `digest` changes whenever its captions may; `template_version` names its wording or prompt."""

    name: str
    digest: str
    template_version: str

    def caption(self, requests: Sequence[CaptionRequest]) -> list[CaptionResponse]:
        """One response a request, in order; a request that fails alone gets a status, never an exception."""
        ...


def load_captioner(name: str, config: Mapping[str, Any]) -> Captioner:
    """The captioner in ``components/captioners/<name>.py``; raises `ConfigError` where there is none.

    config: the profile's whole `caption_videos` section, with the profile's `seed` added.
    """
    try:
        module = import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise ConfigError(f"There is no captioner '{name}'; name a module of components/captioners.") from error
    return module.create(config)
