"""Check that a run fits into memory, before anything is loaded."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from univigu.errors import ConfigError
from univigu.training.engine import TrainingConfig, micro_batches


def needed_memory(transformer: Mapping[str, Any], config: TrainingConfig, **sizes: Any) -> dict[str, int]:
    """Bytes on one GPU, by part, of the task of a run that needs the most; the arguments are `needed_by_task`'s."""
    return max(needed_by_task(transformer, config, **sizes).values(), key=lambda parts: parts["total"])


def needed_by_task(
    transformer: Mapping[str, Any],
    config: TrainingConfig,
    *,
    video_tokens: int,
    context_tokens: int,
    world_size: int,
    trainable: int | None = None,
    text_draws: int = 1,
) -> dict[str, dict[str, int]]:
    """Bytes on one GPU by part (see `memory_needed`) of each task of a run.

    transformer: the model's config. trainable: the number of parameters that are trained; None: all. text_draws: the
    objective's.

    The tasks: ``training step``; ``evaluation``, the held-out losses, where the run has any; ``caption`` and
    ``generate``, the samples that it shows, where it shows any. The latter have the whole training's state beside them.
    """
    from univigu.training.memory import memory_needed, state_memory
    from univigu.training.memory_looks import Look, peak_bytes

    samples = micro_batches(config, world_size)[1]
    sizes = {"video_tokens": video_tokens, "context_tokens": context_tokens, "text_tokens": transformer["text_length"]}
    shares, sharing = _shares(config, world_size, trainable), {"sequence_parallel": config.sequence_parallel}

    def needed(recompute: bool) -> dict[str, int]:
        batch = {"micro_batch_size": samples, "gradient_checkpointing": recompute, "text_draws": text_draws}
        return memory_needed(transformer, **sizes, **batch, **shares, **sharing)

    every = int(config.gradient_checkpointing)
    step = needed(every == 1)
    if every > 1:  # every k-th block recomputes its activations, the others keep theirs
        least = needed(True)
        step = {part: least[part] + (step[part] - least[part]) * (every - 1) // every for part in least}
    found = {"training step": step}
    looks = [(Look("evaluation"), samples)] if config.heldout_every else []
    if config.samples_every:
        looks += [(Look("caption"), 1), (Look("generate", guided=True), 1)]
    states = state_memory(transformer, **shares)
    for look, batch_size in looks:
        batch = {"batch_size": batch_size, "precision": config.precision}
        peak = peak_bytes(look, transformer, **sizes, **batch, **sharing)
        parts = {**states, "activations": peak}
        found[look.kind] = {**parts, "total": sum(parts.values())}
    return found


def count_trainable(transformer: Mapping[str, Any], config: TrainingConfig) -> int:
    """The number of trained parameters, adapters included, of a model with the config `transformer`."""
    from univigu.training.adapters import choose_trainable
    from univigu.training.meta_tensors import without_weights
    from univigu.transformer import UniViGUTransformer3DModel

    with without_weights():
        model = UniViGUTransformer3DModel.from_config(transformer)
        choose_trainable(model, config.freeze, config.lora, config.seed)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def needed_host_memory(
    transformer: Mapping[str, Any],
    config: TrainingConfig,
    *,
    world_size: int,
    processes: int,
    trainable: int | None = None,
) -> dict[str, int]:
    """Bytes of a machine's own memory, by part, for what its `processes` offload; ``weights`` are rank 0's in fp32.

    Rank 0 loads all weights, gathers all of them at the end, and in bf16 keeps those that are not trained in between.
    """
    from univigu.training.memory import offloaded_memory, parameter_count

    offloaded = offloaded_memory(transformer, **_shares(config, world_size, trainable))
    count = parameter_count(transformer)
    frozen = max(count - trainable, 0) if trainable is not None and config.precision == "bf16" else 0
    parts = {**{part: size * processes for part, size in offloaded.items()}, "weights": 4 * (count + frozen)}
    return {**parts, "total": sum(parts.values())}


def _shares(config: TrainingConfig, world_size: int, trainable: int | None) -> dict[str, Any]:
    """The arguments of `memory_needed` and `offloaded_memory` that say how the model's states are partitioned."""
    return {
        "world_size": world_size,
        "zero_stage": config.zero_stage,
        "precision": config.precision,
        "offload_optimizer": "optimizer" in config.offload,
        "offload_parameters": "parameters" in config.offload,
        "trainable_parameters": trainable,
        "ema": config.ema_decay > 0,
    }


def free_memory() -> int:
    """Free bytes of this process's GPU, or of the machine where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))[0]
    return free_host_memory()


def free_host_memory() -> int:
    """Free bytes of the machine's own memory."""
    import psutil

    return psutil.virtual_memory().available


def require_memory(needed: Mapping[str, int], free: int, config: TrainingConfig) -> None:
    """Raise `ConfigError` where a run needs more memory than is free; the message says what needs it and what helps."""
    if needed["total"] <= free:
        return
    help_with = []
    if not config.gradient_checkpointing or config.gradient_checkpointing > 1:
        help_with.append("gradient_checkpointing: true")
    if config.micro_batch_size != 1:
        help_with.append("micro_batch_size: 1")
    if config.zero_stage < 3:
        help_with.append(f"zero_stage: {config.zero_stage + 1} on more GPUs")
    if config.zero_stage and "optimizer" not in config.offload:
        help_with.append("offload: [optimizer]")
    if config.lora is None:
        help_with.append("lora: {rank: 32}")
    raise ConfigError(
        f"Training needs {_gib(needed['total'])} GiB per process, and {_gib(free)} are free "
        f"({_largest_first(needed)}); set {', or '.join(help_with) or 'smaller clips'}."
    )


def require_host_memory(needed: Mapping[str, int], free: int, config: TrainingConfig) -> None:
    """Raise `ConfigError`, like `require_memory`, where a machine's processes need more of its own memory than is free.

    ``needed``: see `needed_host_memory`.
    """
    if needed["total"] <= free:
        return
    help_with = ["use a machine with more"]
    if config.offload:
        help_with = ["set offload: []", "use more machines"]
    if "optimizer" in config.offload and config.lora is None:
        help_with.insert(1, "lora: {rank: 32}")
    raise ConfigError(
        f"Training needs {_gib(needed['total'])} GiB of the machine's own memory for all its processes, and "
        f"{_gib(free)} are free ({_largest_first(needed)}); {', or '.join(help_with)}."
    )


def _largest_first(needed: Mapping[str, int]) -> str:
    parts = sorted(needed.keys() - {"total"}, key=lambda part: (-needed[part], part))
    return ", ".join(f"{part} {_gib(needed[part])}" for part in parts)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
