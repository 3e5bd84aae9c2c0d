"""The memory of what needs no gradients: held-out losses, captions and videos, in training and on their own.

As in `memory`, the code itself runs on meta tensors at two depths, the bytes that are alive are counted, and the peak
at the real depth is extrapolated: it grows by the keys and values that one more block keeps, or not at all.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

from univigu.errors import ConfigError
from univigu.sampling import Guide, text_field, video_field
from univigu.training import memory
from univigu.training.heldout import evaluate_heldout
from univigu.training.meta_tensors import LiveBytes, without_data
from univigu.transformer import UniViGUTransformer3DModel
from univigu.wan import latent_channels

GUIDED = 2.0  # any scale of guidance above 1: memory doesn't depend on it


class Look(NamedTuple):
    """What is looked at: ``evaluation`` (held-out losses), ``caption`` or ``generate``, and whether with guidance."""

    kind: str
    guided: bool = False


def peak_bytes(
    look: Look,
    config: Mapping[str, Any],
    *,
    video_tokens: int,
    text_tokens: int,
    context_tokens: int,
    batch_size: int,
    precision: str,
    sequence_parallel: int = 1,
) -> int:
    """Bytes of tensors at the peak of a look at ``batch_size`` samples, beyond the model's weights.

    ``config`` is the transformer's; token counts are per sample. Raises ConfigError for an unknown kind.
    """
    if look.kind not in KINDS:
        raise ConfigError(f"Unknown kind of look {look.kind!r}; use one of {', '.join(KINDS)}.")
    key = memory.config_key(config)
    sizes = key, video_tokens, text_tokens, context_tokens, batch_size, precision, sequence_parallel
    found = _counted(look, *sizes)
    # In few blocks the keys and values that an evaluation keeps are smaller than what its pass over video and text
    # needs, and in many they are larger: that part of it is like a caption's.
    return max(found, _counted(Look("caption"), *sizes)) if look.kind == "evaluation" else found


@cache
def _counted(
    look: Look, key: str, video: int, text: int, context: int, batch: int, precision: str, sharing: int
) -> int:
    config = json.loads(key)
    latents = (batch, latent_channels(config), *memory.latent_size(config, video, text))
    # the first and the last of a video's blocks need less than those between
    found, shallow = [], 3 if look.kind == "generate" else 2
    for depth in (shallow, shallow + 1):
        with without_data(), torch.no_grad():
            model = memory.build_model(config, depth, memory.DTYPES[precision], sharing)
            with Answering() as counted:
                counted.ignore([*model.parameters(), *model.buffers()])
                KINDS[look.kind](model, latents, text, context, look.guided)
            found.append(counted.peak)
    return memory.extrapolate(found[0], found[1], shallow, config["num_layers"])


class Answering(LiveBytes):
    """`LiveBytes` for code that reads a number from a tensor, which a meta tensor doesn't have: it reads 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        return super().__torch_dispatch__(func, types, args, kwargs)


def _evaluate(model: UniViGUTransformer3DModel, latents: tuple[int, ...], text: int, context: int, _: bool) -> None:
    """The held-out losses of one batch, at two times."""
    ids = torch.zeros(latents[0], text, dtype=torch.long)
    batch: dict[str, Any] = {
        "latents": torch.zeros(latents),
        "prompt_ids": ids,
        "target_ids": ids,
        "prompt_embeds": torch.zeros(latents[0], context, model.config.text_dim),
        "empty_embeds": torch.zeros(context, model.config.text_dim),
        "sample_ids": _Numbers(latents[0]),
    }
    evaluate_heldout(model, [batch], bins=2)


def _caption(model: UniViGUTransformer3DModel, latents: tuple[int, ...], text: int, context: int, guided: bool) -> None:
    """The first two steps of captions; the second has an estimate of the first."""
    empty, seeds = torch.zeros(1, context, model.config.text_dim), list(range(latents[0]))
    field = text_field(model, torch.zeros(latents), seeds, empty, empty, GUIDED if guided else 1.0, 0.1)
    z = torch.zeros(latents[0], text, model.config.text_latent_dim)
    for tau in (0.0, 0.5):
        z = z + field(z, tau)


def _generate(
    model: UniViGUTransformer3DModel, latents: tuple[int, ...], text: int, context: int, guided: bool
) -> None:
    """Two steps of videos beside their text."""
    condition = torch.zeros(latents[0], context, model.config.text_dim)
    guide = Guide(condition, condition, GUIDED if guided else 1.0)
    beside = torch.zeros(latents[0], text, model.config.text_latent_dim)
    field, z = video_field(model, beside, 1.0, list(range(latents[0])), guide), torch.zeros(latents)
    for tau in (0.0, 0.5):
        z = z + field(z, tau)


class _Numbers:
    """The ids of samples in the place of a tensor, whose numbers a meta tensor doesn't have."""

    def __init__(self, count: int) -> None:
        self.count = count

    def tolist(self) -> list[int]:
        return list(range(self.count))


KINDS: Mapping[str, Callable[[UniViGUTransformer3DModel, tuple[int, ...], int, int, bool], None]] = {
    "evaluation": _evaluate,
    "caption": _caption,
    "generate": _generate,
}
