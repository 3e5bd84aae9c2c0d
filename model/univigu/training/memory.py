"""The memory of a training step on one GPU, part by part, computed without a GPU.

Weights, gradients and optimizer state follow from the number of parameters and from how DeepSpeed partitions them
(ZeRO, arXiv 1910.02054). For activations there is no formula: a training step of the model itself runs on meta tensors,
which have shapes but no memory, and a dispatch mode counts the bytes that are alive. This is done at two depths. All
blocks are alike, so memory is linear in the depth, and the real depth is extrapolated.
"""

import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from univigu.errors import BadInputError, ConfigError
from univigu.objective import mean_text_losses, predict_joint, predict_prefix, video_losses
from univigu.sequence_parallel import SequenceGroup
from univigu.tasks import TASKS, ObjectiveConfig, Samples
from univigu.training.meta_tensors import LiveBytes, recomputed, without_data, without_weights
from univigu.transformer import UniViGUTransformer3DModel
from univigu.wan import latent_channels

BYTES = {"fp32": 4, "bf16": 2}
COSTLIEST = ("understand", "joint")  # the task with the most memory, for each attention policy
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# DeepSpeed's defaults, counted in elements: reduce_bucket_size, stage3_max_live_parameters, prefetch_bucket_size
REDUCE_BUCKET, MAX_LIVE, PREFETCH = 500_000_000, 1_000_000_000, 50_000_000


def memory_needed(
    config: Mapping[str, Any],
    *,
    video_tokens: int,
    text_tokens: int,
    context_tokens: int,
    micro_batch_size: int,
    world_size: int,
    zero_stage: int,
    precision: str,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    gradient_checkpointing: bool = False,
    trainable_parameters: int | None = None,
    ema: bool = False,
    text_draws: int = 1,
    sequence_parallel: int = 1,
) -> dict[str, int]:
    """Bytes on one GPU at the peak of a step, by part; ``config`` is the transformer's, token counts are per sample.

    The parts: ``parameters``; ``gradients``; ``optimizer`` (fp32 weights, both moments and, with ``ema``, the average,
    all partitioned alike; nothing if offloaded); ``activations`` (kept by the forward pass for the backward pass, under
    the costlier attention policy); ``workspace`` (what the backward pass, DeepSpeed's buckets and gathered weights need
    in addition at the worst moment); ``total``. ``trainable_parameters`` is their number, by default all; activations
    are counted as if all were trained. ``text_draws`` is the objective's, ``sequence_parallel`` the run's. Not
    included: the CUDA context (``torch.cuda.mem_get_info`` doesn't count it as free) and fragmentation of the
    allocator. Raises ConfigError for an unknown ZeRO stage or precision.
    """
    if zero_stage not in (0, 1, 2, 3) or precision not in BYTES:
        raise ConfigError(f"Unknown ZeRO stage {zero_stage} or precision {precision}; use 0 to 3, and fp32 or bf16.")
    size, tokens = BYTES[precision], (video_tokens, text_tokens, context_tokens)
    _, upcast = _model_states(config, world_size, zero_stage, precision, trainable_parameters, ema)
    states = state_memory(
        config,
        world_size=world_size,
        zero_stage=zero_stage,
        precision=precision,
        offload_optimizer=offload_optimizer,
        offload_parameters=offload_parameters,
        trainable_parameters=trainable_parameters,
        ema=ema,
    )
    gathered = states.pop("workspace")
    activations, backward = _measured(
        config_key(config), *tokens, micro_batch_size, precision, gradient_checkpointing, text_draws, sequence_parallel
    )
    bucket = REDUCE_BUCKET * size if world_size > 1 or zero_stage else 0
    upcast = 0 if offload_optimizer else upcast
    parts = {
        **states,
        "activations": activations,
        # two peaks: the backward pass, and AdamW's step, by which time the activations are freed
        "workspace": max(backward + bucket + gathered, upcast + bucket - activations),
    }
    return {**parts, "total": sum(parts.values())}


def state_memory(
    config: Mapping[str, Any],
    *,
    world_size: int,
    zero_stage: int,
    precision: str,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    trainable_parameters: int | None = None,
    ema: bool = False,
) -> dict[str, int]:
    """Bytes on one GPU of what a run holds at any time: three parts of `memory_needed`, and ``workspace``.

    ``workspace`` is what a forward pass gathers of partitioned weights (ZeRO 3).
    """
    states, _ = _model_states(config, world_size, zero_stage, precision, trainable_parameters, ema)
    offloaded = _offloaded(zero_stage, offload_optimizer, offload_parameters)
    gathered = min(parameter_count(config), MAX_LIVE + PREFETCH) * BYTES[precision] if zero_stage == 3 else 0
    return {**{part: 0 if part in offloaded else states[part] for part in states}, "workspace": gathered}


def offloaded_memory(
    config: Mapping[str, Any],
    *,
    world_size: int,
    zero_stage: int,
    precision: str,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    trainable_parameters: int | None = None,
    ema: bool = False,
) -> dict[str, int]:
    """Bytes of CPU memory that a process needs for what is offloaded: the parts that `memory_needed` leaves out.

    ``gradients`` are the fp32 gradients that AdamW reads, and a buffer in the model's own precision, for its gradients
    (ZeRO 3) or for its new weights on their way to the GPU (ZeRO 1 and 2).
    """
    states, upcast = _model_states(config, world_size, zero_stage, precision, trainable_parameters, ema)
    offloaded = _offloaded(zero_stage, offload_optimizer, offload_parameters)
    parts = {part: states[part] if part in offloaded else 0 for part in states}
    parts["gradients"] = upcast + upcast // 4 * BYTES[precision] if offload_optimizer else 0
    return parts


def _model_states(
    config: Mapping[str, Any], world_size: int, zero_stage: int, precision: str, trained: int | None, ema: bool
) -> tuple[dict[str, int], int]:
    """Bytes of a process's weights, gradients and optimizer state, and of the fp32 gradients that AdamW reads."""
    size, parameters = BYTES[precision], parameter_count(config)
    trained = parameters if trained is None else trained
    stepped = math.ceil(trained / world_size) if zero_stage else trained
    held = parameters if zero_stage < 3 else math.ceil(parameters / world_size)
    graded = trained if zero_stage < 2 else stepped
    # 4 bytes for each moment, and 4 for ZeRO's fp32 weights, which it keeps even beside a model in fp32
    kept = (12 if zero_stage else 8) + (4 if ema else 0)
    states = {"parameters": held * size, "gradients": graded * size, "optimizer": kept * stepped}
    return states, 4 * stepped if zero_stage else 0


def _offloaded(zero_stage: int, offload_optimizer: bool, offload_parameters: bool) -> set[str]:
    """The parts that are in CPU memory."""
    offloaded = {
        "parameters": offload_parameters and zero_stage == 3,
        "gradients": offload_optimizer and zero_stage > 1,
        "optimizer": offload_optimizer,
    }
    return {part for part, is_moved in offloaded.items() if is_moved}


def parameter_count(config: Mapping[str, Any]) -> int:
    """The number of parameters of a transformer with this ``config``."""
    # pyrefly: ignore[bad-argument-count]
    return extrapolate(*(_parameters(config_key(config), depth) for depth in (1, 2)), 1, config["num_layers"])


def training_loss_without_data(
    model: UniViGUTransformer3DModel,
    task: str,
    latents: tuple[int, ...],
    text_tokens: int,
    context_tokens: int,
    text_draws: int = 1,
    guessing: bool = False,
) -> torch.Tensor:
    """The loss of one of `TASKS` on tensors without data; ``latents`` is their shape (B, C, T, H, W).

    ``text_draws``: of the texts under ``prefix`` attention, as in `ObjectiveConfig`. ``guessing``: self-conditioned,
    where that keeps anything for the backward pass (under ``prefix``).
    Call it within `without_data`.
    """
    config = model.config
    table = model.text_space()
    batch = latents[0]
    text, times = (batch, text_tokens, config.text_latent_dim), torch.zeros(batch)
    videos = {name: torch.zeros(latents) for name in ("latents", "video_noise", "z_video")}
    texts = {name: torch.zeros(text) for name in ("text_data", "text_noise", "z_text")}
    samples = Samples(
        **videos,
        **texts,
        video_tau=times,
        text_tau=times,
        ids=torch.zeros(batch, text_tokens, dtype=torch.long),
        condition=torch.zeros(batch, context_tokens, config.text_dim),
        is_prefix=torch.zeros(batch, dtype=torch.bool),
        has_video_loss=torch.zeros(batch, dtype=torch.bool),
        has_text_loss=torch.zeros(batch, dtype=torch.bool),
    )
    objective, loss, draws = ObjectiveConfig(), table.new_zeros(()), [samples]
    if TASKS[task].attention == "prefix":
        draws = [samples] * text_draws
        hidden = predict_prefix(model, draws, table, guessing)
    else:
        video, hidden = predict_joint(model, samples, table, guessing=False)
        loss = loss + video_losses(video, samples, objective)[0].sum()
    if "text" in TASKS[task].loss:
        loss = loss + mean_text_losses(hidden, draws, table, model, objective, None)[0].sum()
    return loss


def tracked_step(
    model: UniViGUTransformer3DModel,
    task: str,
    latents: tuple[int, ...],
    text_tokens: int,
    context_tokens: int,
    text_draws: int = 1,
) -> tuple[int, int]:
    """Bytes that one training step keeps after its forward pass, and its peak; both without weights and gradients.

    The step is self-conditioned, which needs the most.
    """
    for parameter in filter(lambda one: one.requires_grad, model.parameters()):
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    with LiveBytes() as memory:
        memory.ignore([*model.parameters(), *model.buffers()])
        loss = training_loss_without_data(model, task, latents, text_tokens, context_tokens, text_draws, guessing=True)
        kept = memory.now
        loss.backward()
    return kept, memory.peak


def latent_size(config: Mapping[str, Any], video_tokens: int, text_tokens: int) -> tuple[int, int, int]:
    """(T, H, W) of one-frame latents with ``video_tokens`` patches, or the next number that the rotary tables allow.

    Memory depends on the number of tokens, not on their arrangement. Raises BadInputError where they don't fit.
    """
    limit = config["rope_max_seq_len"] - text_tokens
    if not 1 <= video_tokens <= limit**2:
        raise BadInputError(
            f"{video_tokens} video tokens and {text_tokens} text tokens don't fit the model's rotary tables; choose a"
            " smaller video."
        )
    tokens = video_tokens
    while True:
        for height in range(math.isqrt(tokens), math.ceil(tokens / limit) - 1, -1):
            if tokens % height == 0:
                patch = config["patch_size"]
                return patch[0], height * patch[1], tokens // height * patch[2]
        tokens += 1


@cache
def _measured(
    key: str,
    video: int,
    text: int,
    context: int,
    batch: int,
    precision: str,
    checkpointing: bool,
    draws: int,
    sharing: int,
) -> tuple[int, int]:
    """Bytes of kept activations, and of what the backward pass needs in addition, under the costlier policy."""
    config = json.loads(key)
    latents = (batch, latent_channels(config), *latent_size(config, video, text))
    found = []
    for task in COSTLIEST:
        # depths 2 and 3, not 1: under ``prefix`` the last block is incomplete (see `UniViGUTransformer3DModel`)
        shallow, deep = (
            _count_step(config, depth, task, latents, text, context, precision, checkpointing, draws, sharing)
            for depth in (2, 3)
        )
        kept, peak = (extrapolate(*pair, 2, config["num_layers"]) for pair in zip(shallow, deep, strict=True))
        found.append((kept, peak - kept))
    return max(found, key=sum)


def _count_step(
    config: Mapping[str, Any],
    depth: int,
    task: str,
    latents: tuple[int, ...],
    text: int,
    context: int,
    precision: str,
    checkpointing: bool,
    draws: int,
    sharing: int,
) -> tuple[int, int]:
    with without_data():
        model = build_model(config, depth, DTYPES[precision], sharing)
        if checkpointing:
            model.enable_gradient_checkpointing(recomputed)
        return tracked_step(model, task, latents, text, context, draws)


def build_model(
    config: Mapping[str, Any], depth: int, dtype: torch.dtype, sharing: int = 1
) -> UniViGUTransformer3DModel:
    """The model cut to ``depth`` blocks, all of it in ``dtype``, as DeepSpeed casts it.

    ``sharing``: the number of processes that share a sequence, of which it is one.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # built in it, not cast afterwards, which takes memory
    try:
        model = UniViGUTransformer3DModel.from_config({**config, "num_layers": depth})
    finally:
        torch.set_default_dtype(before)
    model.share_sequence(SequenceGroup(None, 0, sharing) if sharing > 1 else None)
    return model


@cache
def _parameters(key: str, depth: int) -> int:
    with without_weights():
        return sum(parameter.numel() for parameter in build_model(json.loads(key), depth, torch.float32).parameters())


def config_key(config: Mapping[str, Any]) -> str:
    """The transformer's arguments in a config as a hashable key for `cache`."""
    known = UniViGUTransformer3DModel._get_init_keys(UniViGUTransformer3DModel) - {"self"}
    return json.dumps({name: config[name] for name in sorted(known & set(config))})


def extrapolate(first: int, second: int, depth: int, wanted: int) -> int:
    """Linear extrapolation to ``wanted`` blocks from ``first`` at ``depth`` blocks and ``second`` at one more."""
    return first + (wanted - depth) * (second - first)


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None
