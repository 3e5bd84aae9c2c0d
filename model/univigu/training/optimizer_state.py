"""What a run goes on from, wherever ZeRO keeps it: fp32 weights, AdamW's moments, the average of the weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from univigu.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter, besides the number of steps
AVERAGE = "average"  # the running average of the parameter, when there is one


def frozen_weights(objective: nn.Module, precision: str) -> dict[str, Tensor]:
    """The fp32 weights that don't learn, on rank 0, where training would leave nothing but their bf16."""
    if precision == "fp32" or dist.get_rank():
        return {}
    return {n: p.detach().cpu().clone() for n, p in objective.named_parameters() if not p.requires_grad}


def gather_weights(engine: Any, objective: nn.Module, frozen: Mapping[str, Tensor]) -> None:
    """Put the whole fp32 weights back into `objective` on rank 0, wherever ZeRO and bf16 had left them."""
    for name, parameter in objective.named_parameters():
        full = _read(engine, parameter, None)
        if dist.get_rank() == 0:
            parameter.data = frozen.get(name, full).cpu().clone()


def read_state(engine: Any) -> dict[str, Tensor]:
    """This rank's share of what training goes on from: whole fp32 tensors on the CPU, as ``name`` and ``name.moment``.

    Ranks take turns, parameter by parameter, so all of them must call this, after a step. Nothing in it depends on how
    many ranks there are, nor on the stage of ZeRO.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    state = {}
    for index, (name, parameter) in enumerate(_trained(engine)):
        for key in (None, *_kept(engine)):
            full = _read(engine, parameter, key)
            if index % world_size == rank:
                state[_key(name, key)] = full.float().cpu().contiguous()
    return state


def write_state(engine: Any, step: int, tensor: Callable[[str], Tensor]) -> None:
    """Bring the engine to where `read_state` found one after `step`.

    `tensor(name)` gives any rank's entries of `read_state`. All ranks must call this.
    """
    for state in _adamw(engine).state.values():
        state["step"].fill_(step)
    for name, parameter in _trained(engine):
        for key in (None, *_kept(engine)):
            full = tensor(_key(name, key))
            if full.shape != getattr(parameter, "ds_shape", parameter.shape):
                raise ConfigError(
                    f"The checkpoint's '{name}' is {tuple(full.shape)} and the model's another, so it is of another "
                    "model; remove the checkpoints to begin again."
                )
            _write(engine, parameter, key, full)


def _trained(engine: Any) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad)


def _key(name: str, key: str | None) -> str:
    return name if key is None else f"{name}.{key}"


def _read(engine: Any, parameter: nn.Parameter, key: str | None) -> Tensor:
    """A parameter in fp32, or one of its moments, whole; from all ranks that hold a part of it."""
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
def _write(engine: Any, parameter: nn.Parameter, key: str | None, full: Tensor) -> None:
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state, safe_set_local_fp32_param
    from deepspeed.utils import safe_set_local_optimizer_state as safe_set_local_state

    if not _is_partitioned(parameter):
        (parameter if key is None else engine.optimizer.state[parameter][key]).copy_(full)
        return
    if hasattr(parameter, "ds_id"):  # ZeRO 3 cuts parameters into equal parts, the last of which is padded
        # pyrefly: ignore[missing-attribute]
        size = parameter.ds_tensor.numel()
        part = torch.zeros(size * dist.get_world_size())
        part[: full.numel()] = full.flatten()
        part = part[size * dist.get_rank() :][:size]
        if key is not None:
            safe_set_local_state(parameter, part, key)
            return
        safe_set_local_fp32_param(parameter, part)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(full)
    elif key is None:
        safe_set_full_fp32_param(parameter, full)
        parameter.copy_(full)  # what the next step computes with
    else:
        safe_set_full_optimizer_state(parameter, full, key)


def _is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed keeps the fp32 weights of a parameter elsewhere, shared out over the ranks."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _adamw(engine: Any) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)  # ZeRO's optimizers wrap it


def make_moments(engine: Any, averaged: bool) -> None:
    """Give AdamW its state before its first step, which would make it: a checkpoint is read into it.

    An average of the weights (`averaged`) is kept there too: as large and as shared out as a moment, it is saved, read
    and offloaded like one. DeepSpeed, too, looks for the moments after the first step, but only those of the first
    group of parameters are there by then, and it would never find the others.
    """
    for parameter, state in _fp32_weights(engine):
        state["step"] = torch.zeros((), device=parameter.device)
        state |= {key: torch.zeros_like(parameter) for key in MOMENTS}
        if averaged:
            state[AVERAGE] = parameter.detach().clone()
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


@torch.no_grad()
def update_average(engine: Any, step: int, decay: float) -> None:
    """Move the average of the weights towards those after `step`; early on faster, as they have moved far by then."""
    decay = min(decay, (1 + step) / (10 + step))
    pairs = [(state[AVERAGE], parameter.detach()) for parameter, state in _fp32_weights(engine)]
    torch._foreach_lerp_([average for average, _ in pairs], [weights for _, weights in pairs], 1 - decay)


@contextmanager
def averaged_weights(engine: Any) -> Iterator[None]:
    """Within it the engine has the average of its weights, if there is one, in their place. All ranks must enter it."""
    swap_average(engine)
    try:
        yield
    finally:
        swap_average(engine)


@torch.no_grad()
def swap_average(engine: Any) -> None:
    """Put the average, if there is one, in the weights' place, and the weights in the average's."""
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
    """What AdamW steps on this rank, and its state of each."""
    adamw = _adamw(engine)
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3 leaves the groups empty
    parameters = flat or [parameter for group in adamw.param_groups for parameter in group["params"]]
    return [(parameter, adamw.state[parameter]) for parameter in parameters]


def _kept(engine: Any) -> tuple[str, ...]:
    """What AdamW's state holds of each weight."""
    has_average = any(AVERAGE in state for _, state in _fp32_weights(engine))
    return (*MOMENTS, AVERAGE) if has_average else MOMENTS
