"""The state that a run resumes from, wherever ZeRO keeps it: fp32 weights, AdamW's moments, averaged weights."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from univigu.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, besides the number of steps
AVERAGE = "average"  # the running average of the parameter, if there is one


class SavedTensor(Protocol):
    """A tensor in storage that may be slow, of which a rank reads what it keeps."""

    shape: tuple[int, ...]

    def whole(self) -> Tensor: ...

    def part(self, start: int, stop: int) -> Tensor:
        """The elements from ``start`` to ``stop`` of the flattened tensor."""
        ...


def frozen_weights(objective: nn.Module, precision: str) -> dict[str, Tensor]:
    """The fp32 weights that are not trained, on rank 0; empty for fp32, because only bf16 would round them."""
    if precision == "fp32" or dist.get_rank():
        return {}
    return {n: p.detach().cpu().clone() for n, p in objective.named_parameters() if not p.requires_grad}


def gather_weights(engine: Any, objective: nn.Module, frozen: Mapping[str, Tensor]) -> None:
    """Write the whole fp32 weights, wherever ZeRO keeps them, back into `objective` on rank 0.

    All ranks must call this.
    """
    for name, parameter in objective.named_parameters():
        full = _read(engine, parameter, None)
        if dist.get_rank() == 0:
            parameter.data = frozen.get(name, full).cpu().clone()


def read_state(engine: Any) -> dict[str, Tensor]:
    """This rank's share of the training state: whole fp32 tensors on the CPU, named ``name`` and ``name.moment``.

    All ranks must call this, after a step: each tensor is gathered from all of them, and kept by one in turn. All
    shares together depend neither on the number of ranks nor on the ZeRO stage.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    state = {}
    for index, (name, parameter) in enumerate(_trained(engine)):
        for key in (None, *_kept(engine)):
            full = _read(engine, parameter, key)
            if index % world_size == rank:
                state[_key(name, key)] = full.float().cpu().contiguous()
    return state


def write_state(engine: Any, step: int, saved: Callable[[str], SavedTensor]) -> None:
    """Restore the state that `read_state` read after `step`; `saved(name)` returns any rank's entry of it.

    All ranks must call this. Under ZeRO each reads the slices that it keeps, and of ZeRO 3's weights rank 0 reads all:
    under ZeRO 1 and 2, every rank has all weights. Raises `ConfigError` for the state of another model.
    """
    for state in _adamw(engine).state.values():
        state["step"].fill_(step)
    for name, parameter in _trained(engine):
        for key in (None, *_kept(engine)):
            entry = saved(_key(name, key))
            if entry.shape != tuple(getattr(parameter, "ds_shape", parameter.shape)):
                raise ConfigError(
                    f"The checkpoint's '{name}' has the shape {entry.shape}, which is not the model's; "
                    "start again with --restart."
                )
            _write(engine, parameter, key, entry)


def _trained(engine: Any) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad)


def _key(name: str, key: str | None) -> str:
    return name if key is None else f"{name}.{key}"


def _read(engine: Any, parameter: nn.Parameter, key: str | None) -> Tensor:
    """A whole parameter in fp32, or one of its moments, gathered from the ranks that hold a part of it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not parameter.requires_grad and hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    if not _is_partitioned(parameter):
        return parameter.detach() if key is None else engine.optimizer.state[parameter][key]
    if key is None:
        # pyrefly: ignore[missing-attribute]
        return safe_get_full_fp32_param(parameter).detach()
    # pyrefly: ignore[bad-return]
    return safe_get_full_optimizer_state(parameter, key)


@torch.no_grad()
def _write(engine: Any, parameter: nn.Parameter, key: str | None, saved: SavedTensor) -> None:
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param
    from deepspeed.utils import safe_set_local_optimizer_state as safe_set_local_state

    if not _is_partitioned(parameter):
        (parameter if key is None else engine.optimizer.state[parameter][key]).copy_(saved.whole())
        return
    if hasattr(parameter, "ds_id"):  # ZeRO 3 divides parameters into equal parts and pads the last one
        # pyrefly: ignore[missing-attribute]
        size, count = parameter.ds_tensor.numel(), math.prod(saved.shape)
        start, stop = (min(size * rank, count) for rank in (dist.get_rank(), dist.get_rank() + 1))
        part = torch.zeros(size)
        part[: stop - start] = saved.part(start, stop)
        if key is not None:
            safe_set_local_state(parameter, part, key)
            return
        safe_set_local_fp32_param(parameter, part)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.copy_(saved.whole())
    elif key is None:
        full = saved.whole()
        safe_set_full_fp32_param(parameter, full)
        parameter.copy_(full)  # the copy that the next forward pass uses
    # pyrefly: ignore[missing-attribute]
    elif (mapping := parameter._hp_mapping) is not None:  # this rank keeps a part of it
        start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        mapping.get_hp_fragment(key).copy_(saved.part(start, start + count))


def _is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed keeps the fp32 weights of a parameter elsewhere, partitioned among the ranks."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _adamw(engine: Any) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)  # ZeRO's optimizers wrap it


def make_moments(engine: Any, averaged: bool) -> None:
    """Create AdamW's state before its first step, which would create it too late: a checkpoint is loaded into it.

    An average of the weights (`averaged`) is kept there too: it has the size and the partition of a moment, so it is
    saved, loaded and offloaded like one. DeepSpeed registers the moments after the first step, when only those of the
    first parameter group exist, and would never register the others; so they are registered here.
    """
    for parameter, state in _fp32_weights(engine):
        state["step"] = torch.zeros((), device=parameter.device)
        state |= {key: torch.zeros_like(parameter) for key in MOMENTS}
        if averaged:
            state[AVERAGE] = parameter.detach().clone()
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def count_skipped_step(engine: Any) -> None:
    """Count a step that was skipped among AdamW's steps, as a run that resumes after it does."""
    for _, state in _fp32_weights(engine):
        state["step"] += 1


@torch.no_grad()
def update_average(engine: Any, step: int, decay: float) -> None:
    """Move the average towards the weights after `step`; the decay is smaller early on, when weights move fast."""
    decay = min(decay, (1 + step) / (10 + step))
    pairs = [(state[AVERAGE], parameter.detach()) for parameter, state in _fp32_weights(engine)]
    torch._foreach_lerp_([average for average, _ in pairs], [weights for _, weights in pairs], 1 - decay)


@contextmanager
def averaged_weights(engine: Any) -> Iterator[None]:
    """Replace the engine's weights by their average, if there is one, within the block. All ranks must enter it."""
    swap_average(engine)
    try:
        yield
    finally:
        swap_average(engine)


@torch.no_grad()
def swap_average(engine: Any) -> None:
    """Exchange the weights and their average, if there is one. All ranks must call this."""
    if AVERAGE not in _kept(engine):
        return
    for parameter, state in _fp32_weights(engine):
        weights = parameter.detach().clone()
        parameter.copy_(state[AVERAGE])
        state[AVERAGE].copy_(weights)
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3, as at the end of its step
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif hasattr(optimizer, "update_lp_params"):  # ZeRO 1 and 2
        optimizer.update_lp_params()


def _fp32_weights(engine: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """The fp32 tensors that AdamW updates on this rank, each with its state."""
    adamw = _adamw(engine)
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # under ZeRO 3 AdamW's groups are empty
    parameters = flat or [parameter for group in adamw.param_groups for parameter in group["params"]]
    return [(parameter, adamw.state[parameter]) for parameter in parameters]


def _kept(engine: Any) -> tuple[str, ...]:
    """The keys of AdamW's state of each weight that are saved."""
    has_average = any(AVERAGE in state for _, state in _fp32_weights(engine))
    return (*MOMENTS, AVERAGE) if has_average else MOMENTS
