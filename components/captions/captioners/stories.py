"""The captioner of the toy dataset's stories: measures the frames, reads the prompt, and words the facts.

As `measured` does for the first world: what the frames show clearly is taken from them, then the prompt decides, then
the best guess of the measurement. Every clip has its own wording, drawn from its id; a further attempt has another one.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from components.captions.captioners import (
    Captioner,
    CaptionRequest,
    CaptionResponse,
    Clip,
    FollowUp,
    caption_in_batches,
)
from components.pipeline.digests import json_digest
from components.pipeline.fingerprint import code_digest, fingerprint

if TYPE_CHECKING:
    from components.digits.measure import Measurement

TEMPLATE_VERSION = "stories-1"


def create(config: Mapping[str, Any]) -> Captioner:
    """The captioner. config: has `seed` and `batch_size`."""
    # pyrefly: ignore[bad-return]
    return Stories(config["seed"], config["batch_size"])


class Stories:
    """See `Captioner`."""

    name = "stories"
    template_version = TEMPLATE_VERSION
    instructions = ""

    def __init__(self, seed: int, batch_size: int) -> None:
        self.seed, self.batch_size = seed, batch_size

    @cached_property
    def digest(self) -> str:
        return json_digest([self.seed, code_digest(fingerprint([f"{__name__}:{type(self).__name__}"]))])

    def check(self) -> None:
        """Nothing to check: `create` needs no service."""

    def caption(self, requests: Iterable[CaptionRequest], follow_up: FollowUp) -> None:
        caption_in_batches(self.answer, requests, follow_up, self.batch_size)

    def answer(self, requests: Sequence[CaptionRequest], clips: Sequence[Clip]) -> list[CaptionResponse]:
        """Captions from the frames and the prompts."""
        from components.digits.stories import measure

        measured = measure.measure(np.stack([frames for frames, _ in clips]))
        return [self._word(request, seen) for request, seen in zip(requests, measured, strict=True)]

    def _word(self, request: CaptionRequest, seen: "Mapping[str, Measurement]") -> CaptionResponse:
        from components.digits.stories.reader import read
        from components.digits.stories.writer import write_caption

        key = hashlib.sha256(f"{self.seed} {request.id} {request.attempt}".encode()).digest()
        scene = decide(seen, read(request.prompt).claims)
        if scene is None:
            return CaptionResponse("", "error", "the frames and the prompt don't show two digits that move as they can")
        return CaptionResponse(write_caption(scene, np.random.default_rng(int.from_bytes(key[:8], "big"))))


def decide(seen: "Mapping[str, Measurement]", asked: Mapping[str, set[str]]) -> dict[str, str] | None:
    """The scene of a clip, from its measurements and from what its prompt states; None if no scene fits."""
    from components.checks.stories import is_clear
    from components.digits.stories import scenes

    facts = {}
    for name, found in seen.items():
        claimed = sorted(asked.get(name, ()))
        value = found.value if is_clear(name, found) or not claimed else claimed[0]
        if value:
            facts[name] = value
    return facts | scenes.relations(facts) if scenes.exists(facts) else None
