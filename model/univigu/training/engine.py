"""How a training section of a profile becomes a DeepSpeed engine, on one CPU process or on many GPUs."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from univigu import wan
from univigu.errors import ConfigError
from univigu.training.optimizer_state import make_moments
from univigu.training.sampler import rank_slice

OFFLOAD = {"optimizer": 1, "parameters": 3}  # what can be, from which ZeRO stage on


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
    offload: tuple[str, ...] = ()  # to the CPU's memory: the optimizer (ZeRO 1 to 3), and parameters (ZeRO 3)
    precision: str = "fp32"  # or bf16: weights and activations; the optimizer keeps fp32 either way
    gradient_checkpointing: int = 0  # every block (1, true), or every k-th, recomputes its activations backward
    freeze: tuple[str, ...] = ()  # parts that don't learn, see `adapters`
    lora: Mapping[str, Any] | None = None  # the video side learns through adapters, see `adapters`
    ema_decay: float = 0.0  # above 0: a running average of the weights is what is evaluated and saved
    shuffle_shards: int = 0  # shuffle within so many shards at a time; 0: over all samples
    checkpoint_every: int = 100
    heldout_every: int = 100  # and once at the end
    samples_every: int = 0  # show samples so often; 0: never
    peak_tflops: float | None = None  # of one GPU, for the MFU; None: by its name

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "constant"):
            raise ConfigError(f"Unknown schedule '{self.schedule}'; use cosine or constant.")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"Unknown precision '{self.precision}'; use fp32 or bf16.")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"There is no ZeRO stage {self.zero_stage}; use 0, 1, 2 or 3.")
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ConfigError("bf16 without ZeRO keeps no fp32 weights; set zero_stage to 1 or higher.")
        if unknown := set(self.offload) - set(OFFLOAD):
            raise ConfigError(f"`offload` names {', '.join(sorted(unknown))}; use {' and '.join(OFFLOAD)}, or neither.")
        needed = max((OFFLOAD[part] for part in self.offload), default=0)
        if self.zero_stage < needed:
            raise ConfigError(f"To offload {' and '.join(self.offload)}, set zero_stage to {needed} or higher.")
        if len(self.betas) != 2:
            raise ConfigError(f"`betas` is {list(self.betas)}; give it two numbers, such as [0.9, 0.95].")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"`ema_decay` is {self.ema_decay}; use 0 for none, or a number below 1, as 0.9999.")
        for name in ("gradient_checkpointing", "shuffle_shards", "samples_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; use 0 for none, or a number above it.")
        for name in ("steps", "batch_size", "learning_rate", "checkpoint_every", "heldout_every"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"`{name}` is {getattr(self, name)} and must be above zero; mend the profile.")

    @classmethod
    def from_section(cls, section: Mapping[str, Any], seed: int) -> "TrainingConfig":
        """The part of a profile's training section that is the loop's; other keys are left to who knows them."""
        known = {field.name for field in fields(cls)}
        try:
            values: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in section.items() if k in known
            }
            return cls(**values, seed=seed)
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
        decays = (
            len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            and "scale_shift_table" not in key
            and "text_space" not in key
        )
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
    if cuda and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # buckets change the sizes of everything from step to step, which would leave holes in a GPU's memory
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
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


def recompute_activations(transformer: Any, every: int) -> None:
    """Have each `every`-th block forget its activations, and compute them again in the backward pass.

    Not the reentrant kind, which silently drops gradients where the input needs none.
    """
    chosen = set(transformer.blocks[::every])

    def run(block: nn.Module, *args: Any) -> Any:
        return checkpoint(block, *args, use_reentrant=False) if block in chosen else block(*args)

    transformer.enable_gradient_checkpointing(run)


def engine_settings(config: TrainingConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    count, size = micro_batches(config, world_size)
    to_cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    offload = {"offload_optimizer": "optimizer", "offload_param": "parameters"}
    settings: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": count,
        "gradient_clipping": 0.0 if _clips_itself(config) else config.grad_clip,
        "zero_optimization": {
            "stage": config.zero_stage,
            **{key: to_cpu for key, part in offload.items() if part in config.offload},
        },
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW runs on the CPU too; DeepSpeed's own would have to be compiled there
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": 2**31,
    }
    if count > 1 and config.precision == "bf16":
        # a sum in bf16 loses what is small beside it
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def share_out_weights(objective: nn.Module, config: TrainingConfig, settings: Mapping[str, Any]) -> None:
    """Cut rank 0's weights into the ranks' parts (ZeRO 3), one at a time: no GPU ever holds all of them."""
    import deepspeed

    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    zero = deepspeed.zero.Init(
        config_dict_or_path=dict(settings),
        remote_device="cpu" if "parameters" in config.offload else None,
        pin_memory=torch.cuda.is_available(),
        dtype=dtype,
    )
    for module in objective.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=dtype, device=zero.local_device)
                parameter = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                setattr(module, name, parameter)
            parameter.data = parameter.data.to(dtype)
            zero._convert_to_zero_parameters([parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(zero.local_device))


def make_engine(objective: nn.Module, config: TrainingConfig, world_size: int) -> Any:
    """A DeepSpeed engine that trains `objective`, from rank 0's weights; the other ranks' may be on the meta device."""
    import deepspeed

    settings = engine_settings(config, world_size)
    if config.zero_stage == 3:
        share_out_weights(objective, config, settings)
    else:
        for module in objective.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:  # the engine fills it from rank 0's
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    optimizer = torch.optim.AdamW(
        parameter_groups(objective, config), lr=config.learning_rate, betas=tuple(config.betas), fused=True
    )
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)
    make_moments(engine, averaged=config.ema_decay > 0)
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
