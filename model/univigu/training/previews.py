"""Samples from a model in training: captions of held-out clips, and clips from held-out prompts.

All inputs are encoded already, so neither autoencoder nor text encoder is needed, and all processes can take part
(under ZeRO 3 each holds a part of the weights).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from univigu import text_space
from univigu.pipeline import Batch, UniViGUPipeline
from univigu.sampling import Guide, seeded_noise
from univigu.stepping import Stepper
from univigu.training.data import LatentDataset
from univigu.training.engine import data_rank
from univigu.transformer import UniViGUTransformer3DModel


@dataclass(frozen=True)
class Sample:
    """A held-out sample, and the model's output for it."""

    id: str
    prompt: str
    target: str  # the stage's target text for the clip
    caption: str  # the model's text for the clip
    latents: Tensor  # of the clip that the model generates from the prompt: (C, T, H, W), normalised, on the CPU


class EncodedPipeline(UniViGUPipeline):
    """The pipeline without its encoders: it looks up the states of its prompts in ``states``."""

    states: Mapping[str, Tensor] = MappingProxyType({})

    @property
    def _execution_device(self) -> torch.device:
        return self.transformer.text_space.weight.device

    def _encode(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        return torch.stack([self.states[prompt] for prompt in prompts]).to(self._execution_device)


@torch.no_grad()
def draw_samples(
    transformer: UniViGUTransformer3DModel,
    tokenizer: Any,
    heldout: LatentDataset,
    count: int,
    sampling: Mapping[str, Any],
) -> list[Sample]:
    """The model's output for the first `count` held-out samples; `sampling` are `UniViGUPipeline`'s settings.

    All processes must call this; all get the whole list. The samples are divided among them, or among the groups that
    share a sequence. Every process runs the same number of samples, because under ZeRO 3 each forward pass gathers
    weights from all processes.
    """
    size = transformer.sequence.size if transformer.sequence else 1
    count, (rank, groups) = min(count, len(heldout)), data_rank(size)
    turns = -(-count // groups)
    mine = [(turn * groups + rank) % count for turn in range(turns)]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [_draw(transformer, tokenizer, heldout, index, sampling) for index in mine])
    return [gathered[index % groups * size][index // groups] for index in range(count)]


def _draw(
    transformer: UniViGUTransformer3DModel,
    tokenizer: Any,
    heldout: LatentDataset,
    index: int,
    sampling: Mapping[str, Any],
) -> Sample:
    batch = heldout.batch([index], [0])
    prompt, target = (text_space.detokenize(tokenizer, batch[name])[0] for name in ("prompt_ids", "target_ids"))
    states = {prompt: batch["prompt_embeds"][0], "": batch["empty_embeds"]}
    pipeline = EncodedPipeline(tokenizer, None, None, transformer, **sampling)
    pipeline.states = states
    pipeline.set_progress_bar_config(disable=True)
    caption = pipeline.caption_latents(batch["latents"], seed=index)[0]
    noise = seeded_noise([index], "video", batch["latents"].shape[1:], pipeline._execution_device)
    steps = pipeline._begin(None, None, None)
    guide = Guide(pipeline._encode([prompt]), pipeline._encode([""]), pipeline.guidance_scale)
    latents = pipeline._denoise_video(
        Batch(noise, pipeline._embed([prompt]), [index], guide, steps, Stepper(pipeline)), text_tau=1.0
    )
    return Sample(heldout.samples[index].id, prompt, target, caption, latents[0].float().cpu())
