"""How a training section of a profile becomes a DeepSpeed engine, on one CPU process or on many GPUs."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from univigu import wan
from univigu.errors import ConfigError
from univigu.training.data import rank_slice

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter, besides the number of steps


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; the objective has its own configuration."""

    steps: int
    batch_size: int  # samples a step, over all processes and accumulated micro-batches
    learning_rate: float
    seed: int = 0
    micro_batch_size: int | None = None  # samples a process takes at once; None: its whole share of the batch
    warmup_steps: int = 0
    schedule: str = "cosine"  # after the warm-up: cosine, down to zero at the end, or constant
    betas: tuple[float, float] = (0.90, 0.95)
    weight_decay: float = 0.0  # on matrices alone: not on norms, biases, tables
    grad_clip: float = 1.0
    video_lr_factor: float = 1.0  # learning rate of Wan's own weights relative to the text side's
    zero_stage: int = 0
    precision: str = "fp32"  # or bf16: weights and activations; the optimizer keeps fp32 either way
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    checkpoint_every: int = 100
    heldout_every: int = 100  # and once at the end

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "constant"):
            raise ConfigError(f"Unknown schedule '{self.schedule}'; use cosine or constant.")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"Unknown precision '{self.precision}'; use fp32 or bf16.")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"There is no ZeRO stage {self.zero_stage}; use 0, 1, 2 or 3.")
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ConfigError("bf16 without ZeRO keeps no fp32 weights; set zero_stage to 1 or higher.")
        for name in ("steps", "batch_size", "learning_rate", "checkpoint_every", "heldout_every"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"`{name}` is {getattr(self, name)} and must be above zero; mend the profile.")

    @classmethod
    def from_section(cls, section: Mapping[str, Any], seed: int) -> "TrainingConfig":
        """The part of a profile's training section that is the loop's; other keys are left to who knows them."""
        known = {field.name for field in fields(cls)}
        try:
            return cls(**{key: value for key, value in section.items() if key in known}, seed=seed)
        except TypeError as error:
            raise ConfigError(f"The profile's training section does not fit ({error}); mend it.") from error


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The rate of step 1, 2, ...: linear up to `learning_rate` over the warm-up, then as `schedule` says."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps - 1) / max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(objective: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """The parameters by whether they decay and whose they are: matrices decay; tables, norms and biases do not."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        key = name.removeprefix("transformer.")
        decays = parameter.ndim > 1 and "scale_shift_table" not in key and "text_space" not in key
        factor = 1.0 if wan.is_text_side(key) else config.video_lr_factor
        groups.setdefault((config.weight_decay if decays else 0.0, factor), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_factor": factor}
        for (decay, factor), parameters in groups.items()
    ]


def init_distributed() -> torch.device:
    """Join the processes that torchrun started, or be the only one; returns this process's device."""
    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "WARNING")
    import deepspeed

    if not cuda:
        # else the first initialize compiles a shared-memory all-reduce for a minute and a half
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if os.environ["WORLD_SIZE"] == "1":
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # opens no port
        else:
            dist.init_process_group(backend)
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    return device


def is_main_process() -> bool:
    """Whether this process speaks for all: rank 0 of torchrun's, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def micro_batches(config: TrainingConfig, world_size: int) -> tuple[int, int]:
    """How many micro-batches each process makes of its share of a step, and of how many samples.

    Raises `BadInputError` or `ConfigError` where a batch can't be shared out evenly.
    """
    share = rank_slice(config.batch_size, 0, world_size).stop
    size = min(config.micro_batch_size or share, share)
    if share % size:
        raise ConfigError(f"{share} samples a process can't be cut into micro-batches of {size}; choose a divisor.")
    return share // size, size


def engine_settings(config: TrainingConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    count, size = micro_batches(config, world_size)
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": count,
        "gradient_clipping": 0.0 if _clips_itself(config) else config.grad_clip,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": 2**31,
    }


def make_engine(objective: nn.Module, config: TrainingConfig, world_size: int) -> Any:
    import deepspeed

    settings = engine_settings(config, world_size)
    optimizer = torch.optim.AdamW(
        parameter_groups(objective, config), lr=config.learning_rate, betas=tuple(config.betas), fused=True
    )
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)
    _make_moments(engine)
    return engine


def _clips_itself(config: TrainingConfig) -> bool:
    """In plain fp32 the engine clips but does not tell the norm, so the loop clips."""
    return config.zero_stage == 0 and config.precision == "fp32"


def clip_gradients(engine: Any, config: TrainingConfig) -> float | None:
    """Clip a whole step's gradients and return their norm; None where the engine does so itself in its `step`.

    A parameter that no sample of the step used gets a zero gradient, as it does when several processes share the step:
    AdamW would otherwise pass it over on one process and not on two.
    """
    if not _clips_itself(config):
        return None
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return float(nn.utils.clip_grad_norm_(parameters, config.grad_clip))


def gather_weights(engine: Any, objective: nn.Module) -> None:
    """Put the whole fp32 weights back into `objective` on rank 0, wherever ZeRO and bf16 had left them."""
    for parameter in objective.parameters():
        full = _read(engine, parameter, None)
        if dist.get_rank() == 0:
            parameter.data = full.cpu().clone()


def read_state(engine: Any) -> dict[str, Tensor]:
    """This rank's share of what training goes on from: whole fp32 tensors on the CPU, as ``name`` and ``name.moment``.

    Ranks take turns, parameter by parameter, so all of them must call this, after a step. Nothing in it depends on how
    many ranks there are, nor on the stage of ZeRO.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    state = {}
    for index, (name, parameter) in enumerate(_trained(engine)):
        for key in (None, *MOMENTS):
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
        for key in (None, *MOMENTS):
            _write(engine, parameter, key, tensor(_key(name, key)))


def _trained(engine: Any) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad)


def _key(name: str, key: str | None) -> str:
    return name if key is None else f"{name}.{key}"


def _read(engine: Any, parameter: nn.Parameter, key: str | None) -> Tensor:
    """A parameter in fp32, or one of its moments, whole; from all ranks that hold a part of it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not _is_partitioned(parameter):
        return parameter.detach() if key is None else engine.optimizer.state[parameter][key]
    if key is None:
        return safe_get_full_fp32_param(parameter).detach()
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


def _make_moments(engine: Any) -> None:
    """Give AdamW its state before its first step, which would make it: a checkpoint is read into it.

    DeepSpeed, too, looks for the moments after the first step, but only those of the first group of parameters are
    there by then, and it would never find the others.
    """
    adamw = _adamw(engine)
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3 leaves the groups empty
    for parameter in flat or [parameter for group in adamw.param_groups for parameter in group["params"]]:
        moments = {key: torch.zeros_like(parameter) for key in MOMENTS}
        adamw.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
