"""From the training section of a profile to a DeepSpeed engine, on one CPU process or on many GPUs."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from univigu import wan
from univigu.errors import ConfigError
from univigu.extras import import_extra
from univigu.training.optimizer_state import count_skipped_step, make_moments
from univigu.training.sampler import rank_slice

# Of a collective: saving and verifying a checkpoint at 100 MB/s takes a rank half an hour, while the others wait.
TIMEOUT = timedelta(hours=2)
OFFLOAD = {"optimizer": 1, "parameters": 3}  # what can be offloaded, and the lowest ZeRO stage that can


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; the objective has its own configuration."""

    steps: int
    batch_size: int  # samples per step, over all processes and accumulated micro-batches
    learning_rate: float
    seed: int = 0
    micro_batch_size: int | None = None  # samples per process and forward pass; None: its whole share of the batch
    warmup_steps: int = 0
    schedule: str = "cosine"  # after the warm-up: cosine (down to zero at the end) or constant
    betas: tuple[float, float] = (0.90, 0.95)
    weight_decay: float = 0.0  # of matrices only, not of norms, biases and tables
    grad_clip: float = 1.0
    video_lr_factor: float = 1.0  # learning rate of Wan's own weights relative to the text side's
    zero_stage: int = 0
    offload: tuple[str, ...] = ()  # to CPU memory: "optimizer" (ZeRO 1 to 3) and "parameters" (ZeRO 3)
    precision: str = "fp32"  # or bf16, for weights and activations; the optimizer keeps fp32 in both
    gradient_checkpointing: int = 0  # every k-th block recomputes its activations in the backward pass; 0: none
    freeze: tuple[str, ...] = ()  # parts that are not trained, see `adapters`
    lora: Mapping[str, Any] | None = None  # the video side is trained through adapters, see `adapters`
    attention_backend: str = ""  # one of diffusers', such as flash or sage; empty: torch's own
    compile: str = "none"  # or blocks, see `compiling`
    sequence_parallel: int = 1  # processes that share the tokens of a video, and train on the same samples
    ema_decay: float = 0.0  # above 0: evaluate and save a running average of the weights
    shuffle_shards: int = 0  # shuffle within this number of shards at a time; 0: over all samples
    checkpoint_every: int = 100  # steps
    heldout_every: int = 100  # steps, and once at the end
    samples_every: int = 0  # steps between samples; 0: never
    peak_tflops: float | None = None  # of one GPU, for the MFU; None: looked up by the GPU's name

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "constant"):
            raise ConfigError(f"Unknown schedule '{self.schedule}'; use cosine or constant.")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"Unknown precision '{self.precision}'; use fp32 or bf16.")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"Unknown ZeRO stage {self.zero_stage}; use 0, 1, 2 or 3.")
        if self.compile not in ("none", "blocks"):
            raise ConfigError(f"Unknown compile '{self.compile}'; use none or blocks.")
        if self.compile == "blocks" and self.zero_stage == 3:
            raise ConfigError("ZeRO 3 gathers weights within a block, which then isn't one graph; set compile to none.")
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ConfigError("With bf16 only ZeRO keeps fp32 weights; set zero_stage to 1 or higher.")
        if unknown := set(self.offload) - set(OFFLOAD):
            raise ConfigError(f"`offload` has {', '.join(sorted(unknown))}; use {' and '.join(OFFLOAD)}, or neither.")
        needed = max((OFFLOAD[part] for part in self.offload), default=0)
        if self.zero_stage < needed:
            raise ConfigError(f"To offload {' and '.join(self.offload)}, set zero_stage to {needed} or higher.")
        if len(self.betas) != 2:
            raise ConfigError(f"`betas` is {list(self.betas)}; give two numbers, such as [0.9, 0.95].")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"`ema_decay` is {self.ema_decay}; use 0 for none, or a number below 1, such as 0.9999.")
        for name in ("gradient_checkpointing", "shuffle_shards", "samples_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; use 0 for none, or a positive number.")
        if self.sequence_parallel < 1:
            raise ConfigError(f"`sequence_parallel` is {self.sequence_parallel}; use 1 for none, or more.")
        for name in ("steps", "batch_size", "learning_rate", "checkpoint_every", "heldout_every"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"`{name}` is {getattr(self, name)} and must be above zero; correct the profile.")

    @classmethod
    def from_section(cls, section: Mapping[str, Any], seed: int) -> "TrainingConfig":
        """The part of a profile's training section that configures the loop; other keys are ignored."""
        known = {field.name for field in fields(cls)}
        try:
            values: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in section.items() if k in known
            }
            return cls(**values, seed=seed)
        except TypeError as error:
            raise ConfigError(f"The profile's training section is invalid ({error}); correct it.") from error


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The learning rate of step 1, 2, ...: linear up to `learning_rate` in the warm-up, then by `schedule`."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps - 1) / max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(objective: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """The trained parameters, grouped by weight decay (matrices only) and by side (video or text) for the rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        key = name.removeprefix("transformer.")
        decays = (
            len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            and "scale_shift_table" not in key
            and "text_space" not in key
            and "text_output" not in key
        )
        factor = 1.0 if wan.is_text_side(key) else config.video_lr_factor
        groups.setdefault((config.weight_decay if decays else 0.0, factor), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_factor": factor}
        for (decay, factor), parameters in groups.items()
    ]


def init_distributed() -> torch.device:
    """Initialise torch.distributed, under torchrun or for a single process; returns this process's device."""
    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "WARNING")
    if cuda and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # tensor sizes differ from bucket to bucket, which would fragment the GPU's memory
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    deepspeed = import_extra("deepspeed")
    if not cuda:
        # otherwise the first initialize compiles a shared-memory all-reduce, which takes a minute and a half
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # ranges for NVIDIA's profiler, which ZeRO 3 opens and closes hundreds of times per layer
        deepspeed.utils.nvtx.enable_nvtx = False
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
            dist.init_process_group(backend, timeout=TIMEOUT)
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    return device


def is_main_process() -> bool:
    """Whether this process is rank 0 under torchrun, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def data_rank(sequence_parallel: int) -> tuple[int, int]:
    """This process's rank among those with samples of their own, and their number; see `sequence_parallel`."""
    return dist.get_rank() // sequence_parallel, dist.get_world_size() // sequence_parallel


def micro_batches(config: TrainingConfig, world_size: int) -> tuple[int, int]:
    """The number of micro-batches per process and step, and the number of samples in each.

    Processes that share a sequence have the same samples. Raises `BadInputError` or `ConfigError` where a batch can't
    be divided evenly.
    """
    share = rank_slice(config.batch_size, 0, max(1, world_size // config.sequence_parallel)).stop
    size = min(config.micro_batch_size or share, share)
    if share % size:
        raise ConfigError(f"{share} samples per process can't be divided into micro-batches of {size}; use a divisor.")
    return share // size, size


def recompute_activations(transformer: Any, every: int) -> None:
    """Turn on gradient checkpointing for each `every`-th block: it recomputes its activations in the backward pass.

    It is the non-reentrant kind: the reentrant one silently drops gradients where a block's input needs none. 0: none.
    """
    if not every:
        return
    transformer.recomputed_blocks = set(transformer.blocks[::every])
    transformer.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))


def engine_settings(config: TrainingConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    count, size = micro_batches(config, world_size)
    to_cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    offload = {"offload_optimizer": "optimizer", "offload_param": "parameters"}
    settings: dict[str, Any] = {
        # as DeepSpeed counts, for which every process has samples of its own
        "train_batch_size": count * size * world_size,
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": count,
        "gradient_clipping": 0.0 if _clips_itself(config) else config.grad_clip,
        "zero_optimization": {
            "stage": config.zero_stage,
            **{key: to_cpu for key, part in offload.items() if part in config.offload},
        },
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW runs on a CPU too; DeepSpeed's own would have to be compiled first
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": 2**31,
    }
    if count > 1 and config.precision == "bf16":
        # a sum in bf16 loses summands that are small beside it
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def partition_weights(objective: nn.Module, config: TrainingConfig, settings: Mapping[str, Any]) -> None:
    """Partition rank 0's weights among the ranks (ZeRO 3), one at a time, so that no GPU ever holds all of them."""
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


def keep_attention_gathered(objective: Any) -> None:
    """Gather the weights that a block uses for both of its streams once per pass, and not once per stream (ZeRO 3).

    DeepSpeed frees a layer's weights when the layer has run, unless it has seen the same sequence of layers in the step
    before; but tasks change. As weights of the block itself they stay until the block has run.
    """
    import deepspeed

    for block in objective.transformer.blocks:
        for part in (block.attn1, block.attn2, block.norm2):
            for parameter in part.parameters():
                deepspeed.zero.register_external_parameter(block, parameter)


def make_engine(objective: nn.Module, config: TrainingConfig, world_size: int) -> Any:
    """A DeepSpeed engine that trains `objective` from rank 0's weights; other ranks' may be on the meta device."""
    import deepspeed

    settings = engine_settings(config, world_size)
    if config.zero_stage == 3:
        partition_weights(objective, config, settings)
        keep_attention_gathered(objective)
    else:
        for module in objective.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:  # DeepSpeed broadcasts rank 0's values into it
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    optimizer = torch.optim.AdamW(
        parameter_groups(objective, config), lr=config.learning_rate, betas=tuple(config.betas), fused=True
    )
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)
    make_moments(engine, averaged=config.ema_decay > 0)
    return engine


def _clips_itself(config: TrainingConfig) -> bool:
    """Whether the loop clips the gradients: in plain fp32 DeepSpeed clips, but does not report the norm."""
    return config.zero_stage == 0 and config.precision == "fp32"


def clear_gradients(engine: Any) -> None:
    """Set to zero what ZeRO keeps of the last step's gradients; call it before a step's first micro-batch.

    ZeRO 3 and offloading replace only the gradients of weights that a step uses, and a step of one task leaves the
    other tasks' weights out.
    """
    optimizer = engine.optimizer
    offloaded = [
        *getattr(optimizer, "fp32_partitioned_groups_flat", []),  # ZeRO 3
        *getattr(optimizer, "single_partition_of_fp32_groups", []),  # ZeRO 1 and 2
    ]
    for kept in (getattr(optimizer, "grad_partitions_flat_buffer", None), *(weights.grad for weights in offloaded)):
        if kept is not None:
            kept.zero_()


def finish_step(engine: Any, config: TrainingConfig) -> float:
    """Clip the gradients of a whole batch and update the weights; returns the norm of the gradients before clipping.

    Where that is not finite, the weights and their moments stay as they are.
    """
    norm = _clip_gradients(engine, config) if _clips_itself(config) else None
    # ZeRO 1 and 2 skip such a step by themselves
    overflow = config.zero_stage == 3 and bool(engine.optimizer.has_overflow())
    if overflow or not math.isfinite(norm or 0.0):
        engine.optimizer.zero_grad()
        engine.micro_steps += 1  # as `engine.step` would
        norm = math.inf
    else:
        engine.step()
        norm = float(engine.get_global_grad_norm()) if norm is None else norm
    if not math.isfinite(norm):
        count_skipped_step(engine)
    return norm


def _clip_gradients(engine: Any, config: TrainingConfig) -> float:
    """Clip the gradients of a whole batch and return their norm.

    A parameter that no sample of the step used gets a zero gradient, as it does with several processes. AdamW would
    otherwise skip it on one process and update it on two.
    """
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return float(nn.utils.clip_grad_norm_(parameters, config.grad_clip))
