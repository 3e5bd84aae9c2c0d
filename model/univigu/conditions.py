"""What a caller asks for, as one condition per video: prompts, encoded prompts, or both, and what to move away from."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from . import inputs
from .bases import ImageCondition
from .errors import BadInputError
from .sampling import Guide

Given = str | Sequence[str] | None


class Conditions:
    """One prompt per video, as a text, encoded (L, text_dim), or both; and its negative likewise.

    ``texts`` is None where only encoded prompts were given. ``copies`` videos are made of each prompt. ``length`` is
    the number of positions that a prompt is encoded in. Raises BadInputError for prompts that can't be used.
    """

    def __init__(
        self,
        pipeline: Any,
        prompt: Given,
        embeds: Tensor | None,
        copies: int,
        length: int | None,
        text_stream: bool,
        allow_empty: bool = False,
    ):
        self._pipeline, self._copies = pipeline, inputs.positive(copies)
        self.length = pipeline.config.max_sequence_length if length is None else inputs.positive(length)
        if prompt is None and embeds is None:
            raise BadInputError("There is no prompt: give `prompt`, or `prompt_embeds`.")
        config = pipeline.transformer.config
        limit = min(self.length, config.text_length) if text_stream else self.length
        self._width = config.text_dim
        # an empty prompt stands for no prompt, whose text is not one to embed either
        prompt = None if allow_empty and prompt == "" and embeds is not None else prompt
        texts = None if prompt is None else inputs.list_prompts(prompt, pipeline.tokenizer, limit, allow_empty)
        self.texts = None if texts is None else self._copied(texts)
        self._states = (
            None if embeds is None else self._copied(inputs.list_embeds(embeds, self._width, "prompt_embeds"))
        )
        counts = {len(found) for found in (self.texts, self._states) if found is not None}
        if len(counts) > 1:
            raise BadInputError("`prompt` and `prompt_embeds` differ in number: give one of each for every video.")
        self._count = counts.pop()
        self._negatives: list[str] = [""] * self._count
        self._negative_states: list[Tensor] | None = None
        self._images: list[Image] = []
        self._shape: Sequence[int] = ()

    def __len__(self) -> int:
        return self._count

    def read_negative(self, prompt: Given, embeds: Tensor | None) -> None:
        """Take in the negative prompts: one for all videos, or one per prompt; none is the empty string."""
        if prompt is not None and embeds is not None:
            raise BadInputError("Both `negative_prompt` and `negative_prompt_embeds` were given: give one of them.")
        if prompt is not None:
            found = inputs.list_prompts(prompt, self._pipeline.tokenizer, self.length, True)
            self._negatives = self._for_each(found, "negative prompts")
        if embeds is not None:
            found = inputs.list_embeds(embeds, self._width, "negative_prompt_embeds")
            self._negative_states = self._for_each(found, "negative prompts")

    def read_image(self, image: Any, shape: Sequence[int]) -> None:
        """Take in the first image of all videos, or one per prompt; ``shape`` is (C, T, H', W') of their latents."""
        if image is None:
            return
        base = self._pipeline.base
        if base.show is None:
            raise BadInputError(
                f"This model's base is {base.name}, which takes no image: leave `image` out, or use a model whose base"
                " is Wan2.1 I2V or Wan2.2 TI2V."
            )
        self._images, self._shape = self._for_each(inputs.list_images(image), "images"), shape

    def guide(self, part: slice) -> Guide:
        """What guides the videos of one part; the negative is encoded only where the guidance needs it."""
        scale = self._pipeline.guidance_scale
        # pyrefly: ignore[bad-argument-type]
        condition = self._encoded(self.texts and self.texts[part], self._states and self._states[part])
        negative = None
        if scale > 1:
            states = self._negative_states
            negative = self._encoded(self._negatives[part], states and states[part])
        return Guide(condition, negative, scale, self._shown(self._images[part]))

    def _shown(self, images: Sequence[Image]) -> ImageCondition | None:
        if not images:
            return None
        same = all(image is images[0] for image in images)  # then it is encoded once
        return self._pipeline.base.show(self._pipeline, images[:1] if same else images, self._shape)

    def _encoded(self, texts: list[str], states: list[Tensor] | None) -> Tensor:
        if states is not None:
            return torch.stack(states).to(self._pipeline._execution_device)
        same = len(set(texts)) == 1  # then one condition serves the whole batch
        return self._pipeline._encode(texts[:1] if same else texts, self.length)

    def _copied(self, items: list[Any]) -> list[Any]:
        return [item for item in items for _ in range(self._copies)]

    def _for_each(self, items: list[Any], name: str) -> list[Any]:
        if len(items) == 1:
            return items * self._count
        if len(items) * self._copies != self._count:
            raise BadInputError(
                f"There are {len(items)} {name} for {self._count // self._copies} prompts: give one for all, or one for"
                " each."
            )
        return self._copied(items)
