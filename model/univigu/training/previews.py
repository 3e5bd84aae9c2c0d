"""What a model in training says and makes: captions of held-out clips, and clips from held-out prompts.

Everything it starts from is encoded already, so neither autoencoder nor text encoder is needed, and all processes can
take part (under ZeRO 3 they hold the weights together).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from univigu import text_space
from univigu.pipeline import UniViGUPipeline
from univigu.training.data import LatentDataset
from univigu.transformer import UniViGUTransformer3DModel


@dataclass(frozen=True)
class Sample:
    """A held-out sample, and what the model makes of it."""

    id: str
    prompt: str
    target: str  # what the stage should say about the clip
    said: str  # what the model says about it
    latents: Tensor  # of the clip that the model makes from the prompt: (C, T, H, W), normalised, on the CPU


class EncodedPipeline(UniViGUPipeline):
    """The pipeline without its encoders: it knows the states of the prompts that it is given."""

    states: Mapping[str, Tensor] = MappingProxyType({})

    @property
    def _execution_device(self) -> torch.device:
        return self.transformer.text_space.weight.device

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.stack([self.states[prompt] for prompt in prompts]).to(self._execution_device)


@torch.no_grad()
def draw_samples(
    transformer: UniViGUTransformer3DModel,
    tokenizer: Any,
    heldout: LatentDataset,
    count: int,
    sampling: Mapping[str, Any],
) -> list[Sample]:
    """What the model makes of the first `count` held-out samples; `sampling` are `UniViGUPipeline`'s settings.

    All processes must call this. They share the samples out, each going through equally many, as under ZeRO 3 they
    gather each other's weights in step; all get the whole list.
    """
    count, rank, world_size = min(count, len(heldout)), dist.get_rank(), dist.get_world_size()
    turns = -(-count // world_size)
    mine = [(turn * world_size + rank) % count for turn in range(turns)]
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, [_draw(transformer, tokenizer, heldout, index, sampling) for index in mine])
    return [gathered[index % world_size][index // world_size] for index in range(count)]


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
    # pyrefly: ignore[bad-argument-type]
    pipeline = EncodedPipeline(tokenizer, None, None, transformer, **sampling)
    pipeline.states = states
    pipeline.set_progress_bar_config(disable=True)
    said = pipeline.caption_latents(batch["latents"], seed=index)[0]
    made = pipeline._generate_latents([prompt], batch["latents"].shape[1:], None, None, None, [index])
    return Sample(heldout.samples[index].id, prompt, target, said, made[0].float().cpu())
