"""Which weights are trained: all, those that are not frozen, or LoRA adapters in place of the video side's weights."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from univigu import wan
from univigu.errors import ConfigError
from univigu.extras import import_extra
from univigu.lora import TRAINED, adapter_layers
from univigu.transformer import UniViGUTransformer3DModel

# Names for `freeze`; anything else is a pattern of parameter names, such as `blocks.0.*`.
PARTS: dict[str, Callable[[str], bool]] = {
    "video": lambda name: not wan.is_text_side(name),
    "text": wan.is_text_side,
    "self_attention": lambda name: ".attn1." in name,
    "cross_attention": lambda name: ".attn2." in name,
    "video_feed_forward": lambda name: ".ffn." in name,
    "text_feed_forward": lambda name: ".ffn_text." in name,
    "token_table": lambda name: name.startswith("text_space."),
}
LORA: dict[str, Any] = {"rank": 32, "alpha": 32.0, "targets": ("to_q", "to_k", "to_v", "to_out.0"), "merge": True}


def choose_trainable(
    transformer: UniViGUTransformer3DModel, freeze: Sequence[str], lora: Mapping[str, Any] | None, seed: int
) -> None:
    """Freeze the named parts; with `lora`, the video side is trained through adapters alone.

    lora: ``rank``, ``alpha`` (adapters are scaled by alpha / rank), ``targets``, the linear layers that get an
    adapter, by the end of their names, and ``merge``, for `finish_lora`. Adapters start at zero, so the model's output
    does not change. Raises `ConfigError` where a name matches nothing, and where nothing is left to train.
    """
    if lora is not None:
        _add_lora(transformer, lora, seed)
    names = [name for name, _ in transformer.named_parameters()]
    for part in freeze:
        # pyrefly: ignore[implicit-any-lambda]
        matches = PARTS.get(part, lambda name, pattern=part: fnmatchcase(name, pattern))
        chosen = {name for name in names if matches(name)}
        if not chosen:
            raise ConfigError(
                f"`freeze` has '{part}', which matches no weight; use {', '.join(PARTS)}, or a pattern like blocks.0.*."
            )
        for name, parameter in transformer.named_parameters():
            if name in chosen:
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in transformer.parameters()):
        raise ConfigError("All weights are frozen, so there is nothing to train; remove an entry from `freeze`.")


def finish_lora(transformer: UniViGUTransformer3DModel, lora: Mapping[str, Any] | None) -> None:
    """Merge the trained adapters, or leave them as the one adapter that is saved with the model (`lora.TRAINED`)."""
    if lora is None or lora.get("merge", True):
        merge_lora(transformer)
        return
    layers = adapter_layers(transformer, next(iter(transformer.peft_config)))
    transformer.unload_lora()
    transformer.load_lora_adapter(layers, adapter_name=TRAINED, prefix=None)


def merge_lora(transformer: UniViGUTransformer3DModel) -> None:
    """Add the adapters, if there are any, to the weights that they adapt; the model then has no adapters."""
    if getattr(transformer, "peft_config", None):
        transformer.fuse_lora()
        transformer.unload_lora()


def _add_lora(transformer: UniViGUTransformer3DModel, lora: Mapping[str, Any], seed: int) -> None:
    peft = import_extra("peft")
    unknown = set(lora) - set(LORA)
    # pyrefly: ignore[unsupported-operation]
    settings: dict[str, Any] = LORA | lora
    if unknown or not settings["rank"] >= 1 or not settings["targets"]:
        raise ConfigError(
            f"`lora` is {dict(lora)}; give a rank of at least 1, an alpha and targets, or null for no adapters."
        )
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in settings["targets"]:
        if not any(name.endswith(f".{target}") for name in linear):
            raise ConfigError(f"`lora.targets` has '{target}', which no linear layer's name ends with; try to_q.")
    trainable = {name for name, _ in transformer.named_parameters() if wan.is_text_side(name)}
    targets = [
        name
        for name in linear
        if not wan.is_text_side(f"{name}.weight") and any(name.endswith(f".{t}") for t in settings["targets"])
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(
            peft.LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules=targets, bias="none")
        )
    for name, parameter in transformer.named_parameters():
        if name in trainable:
            parameter.requires_grad_(True)  # peft freezes everything but the adapters
