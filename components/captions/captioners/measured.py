"""The captioner of the built-in toy dataset: measures the frames, reads the prompt, and words the result.

Attributes that the frames show clearly are taken from them. For the others, the prompt decides; if it doesn't state
them either, the best guess of the measurement does. Place, direction and speed are chosen together, so that they agree.
The measurement needs torch and scikit-learn; they are imported with the first clip, so that a pipeline's first task
starts fast.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
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

TEMPLATE_VERSION = "digits-2"
LOOKS = ("digit", "colour", "background")


def create(config: Mapping[str, Any]) -> Captioner:
    """The captioner. config: has `seed`, `batch_size`, and `wordings`, the number of ways to word a caption."""
    # pyrefly: ignore[bad-return]
    return Measured(config["seed"], config["wordings"], config["batch_size"])


class Measured:
    """See `Captioner`. The first wording is the plain one: it teaches a small model the facts, not the phrasing."""

    name = "measured"
    template_version = TEMPLATE_VERSION
    instructions = ""

    def __init__(self, seed: int, wordings: int, batch_size: int) -> None:
        self.seed, self.wordings, self.batch_size = seed, wordings, batch_size

    @cached_property
    def digest(self) -> str:
        code = code_digest(fingerprint([f"{__name__}:{type(self).__name__}"]))
        return json_digest([self.seed, self.wordings, code])

    def check(self) -> None:
        """Nothing to check: `create` needs no service."""

    def caption(self, requests: Iterable[CaptionRequest], follow_up: FollowUp) -> None:
        caption_in_batches(self.answer, requests, follow_up, self.batch_size)

    def answer(self, requests: Sequence[CaptionRequest], clips: Sequence[Clip]) -> list[CaptionResponse]:
        """Captions from the frames and the prompts; every further attempt words the same facts differently."""
        from components.digits import measure

        measured = measure.measure(np.stack([frames for frames, _ in clips]))
        return [self._word(request, seen) for request, seen in zip(requests, measured, strict=True)]

    def _word(self, request: CaptionRequest, seen: "Mapping[str, Measurement]") -> CaptionResponse:
        from components.digits import world

        key = hashlib.sha256(f"{self.seed} {request.id}".encode()).digest()
        wording = int.from_bytes(key[:8], "big") % self.wordings + request.attempt - 1
        facts = decide(seen, world.read_text(request.prompt))
        if wording == 0:
            return CaptionResponse(world.write_plain_caption(facts))
        return CaptionResponse(world.write_caption(facts, np.random.default_rng([self.seed, wording])))


def decide(seen: "Mapping[str, Measurement]", asked: Mapping[str, set[str]]) -> dict[str, str]:
    """The seven attributes of a clip, from its measurements and from the attributes that its prompt states."""
    from components.checks.digits import CONFIDENT
    from components.digits import world

    def belief(name: str, value: str) -> float:
        """The score of a value: a clear measurement counts most, then the prompt, then an unclear measurement."""
        found = seen[name]
        clear = found.confidence >= CONFIDENT[name]
        return (value == found.value) * (100.0 * clear + found.confidence) + 10.0 * (value in asked[name])

    looks = {name: max(world.ATTRIBUTES[name], key=partial(belief, name)) for name in LOOKS}
    course = max(world.motions(), key=lambda motion: sum(belief(name, value) for name, value in motion.items()))
    return {**looks, **course}
