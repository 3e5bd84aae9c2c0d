"""The loop over the steps of a sampler, with what diffusers' users can do between two steps.

A callback of diffusers' form is called at the end of each step: ``callback(pipe, step, timestep, tensors)``, with
``step`` counted from 0 for each sample, or batch of samples, and may return a dictionary of tensors that replace the
given ones.
"""

from collections.abc import Callable, Sequence
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from . import wan
from .errors import BadInputError
from .sampling import Field, Guide
from .schedules import Steps

Callback = Callable[..., Any]
CALLBACK_TENSORS = ("latents", "text_latents", "prompt_embeds", "negative_prompt_embeds")


class Stepper:
    """The steps of one sample, or of one batch of samples, of a call of the pipeline."""

    def __init__(self, pipeline: Any, callback: Callback | None = None, names: Sequence[str] = ("latents",)):
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            names = callback.tensor_inputs
        unknown = [name for name in names if name not in CALLBACK_TENSORS]
        if unknown:
            raise BadInputError(
                f"A callback can't be given {unknown[0]!r}: use {', '.join(CALLBACK_TENSORS)} in"
                " callback_on_step_end_tensor_inputs."
            )
        self._pipeline, self._callback, self._names, self._done = pipeline, callback, names, 0

    def integrate(
        self,
        field: Field,
        name: str,
        z: Tensor,
        steps: Steps,
        guide: Guide | None = None,
        span: range | None = None,
        **beside: Tensor | None,
    ) -> Tensor:
        """Carry one modality, ``name``, from noise to data, or over a ``span`` of the steps (eq 16, 17).

        ``beside`` are the tensors of the other modality, which the callback may see. ``guide`` may be changed by it.
        """
        for i in self._pipeline.progress_bar(range(len(steps)) if span is None else span):
            if self._pipeline.interrupt:
                continue
            z = steps.step(i, z, field(z, steps.taus[i]))
            z = self.end(steps.taus[i], {**beside, name: z}, guide).get(name, z)
        return z

    def end(self, tau: Tensor, tensors: dict[str, Any], guide: Guide | None) -> dict[str, Any]:
        """The end of a step at time ``tau``: returns what the callback replaces."""
        step, self._done = self._done, self._done + 1
        if self._callback is None:
            return {}
        if guide is not None:
            tensors = {**tensors, "prompt_embeds": guide.condition, "negative_prompt_embeds": guide.negative}
        given = {name: tensors.get(name) for name in self._names}
        replaced = self._callback(self._pipeline, step, wan.wan_timestep(tau), given) or {}
        if guide is not None:
            guide.condition = replaced.get("prompt_embeds", guide.condition)
            guide.negative = replaced.get("negative_prompt_embeds", guide.negative)
            guide.scale = self._pipeline.guidance_scale
        return replaced
