"""How much memory a training step needs on one GPU, part by part, before there is a GPU to ask.

Weights, gradients and the optimizer's state follow from counts of parameters and from how DeepSpeed shares them out
(ZeRO, arXiv 1910.02054). Activations are no formula: a training step of the very model runs on fake tensors, which have
shapes and no memory, which count what is alive, at two depths; blocks are alike, so the rest is a straight line.
"""

import json
import math
import weakref
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from univigu.errors import BadInputError, ConfigError
from univigu.objective import TASKS, ObjectiveConfig, Samples, predict_joint, predict_prefix, text_losses, video_losses
from univigu.transformer import UniViGUTransformer3DModel

BYTES = {"fp32": 4, "bf16": 2}
COSTLIEST = ("understand", "joint")  # of the tasks of each attention policy
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
) -> dict[str, int]:
    """Bytes on one GPU at the peak of a step, by part; ``config`` is the transformer's, tokens are those of a sample.

    ``parameters``; ``gradients``; ``optimizer`` (fp32 weights, both moments and, with ``ema``, the average, shared out
    like them; an offloaded one takes nothing here); ``activations`` (what the forward pass leaves for the backward
    pass, under the costlier of the two attention policies); ``workspace`` (what the backward pass, DeepSpeed's buckets
    and gathered weights take on top at the worst moment); ``total``. ``trainable_parameters`` is their number, by
    default all; activations are counted as if all were trained. Left out: the CUDA context (it isn't in what
    ``torch.cuda.mem_get_info`` calls free) and what the allocator loses to fragmentation.
    """
    if zero_stage not in (0, 1, 2, 3) or precision not in BYTES:
        raise ConfigError(f"There is no ZeRO stage {zero_stage} in {precision}; use 0 to 3, and fp32 or bf16.")
    size = BYTES[precision]
    states, upcast = _model_states(config, world_size, zero_stage, precision, trainable_parameters, ema)
    moved = _moved(zero_stage, offload_optimizer, offload_parameters)
    activations, backward = _measured(
        _key(config), video_tokens, text_tokens, context_tokens, micro_batch_size, precision, gradient_checkpointing
    )
    gathered = min(parameter_count(config), MAX_LIVE + PREFETCH) * size if zero_stage == 3 else 0
    bucket = REDUCE_BUCKET * size if world_size > 1 or zero_stage else 0
    upcast = 0 if offload_optimizer else upcast
    parts = {
        **{part: 0 if part in moved else states[part] for part in states},
        "activations": activations,
        # when AdamW steps, the activations are gone
        "workspace": max(backward + bucket + gathered, upcast + bucket - activations),
    }
    return {**parts, "total": sum(parts.values())}


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
    """Bytes of the CPU's memory that a process takes for what is offloaded: the parts that `memory_needed` leaves out.

    ``gradients`` are the fp32 ones that AdamW reads, with a buffer in the model's own precision: of its gradients (ZeRO
    3), or of its new weights on their way to the GPU (1 and 2).
    """
    states, upcast = _model_states(config, world_size, zero_stage, precision, trainable_parameters, ema)
    moved = _moved(zero_stage, offload_optimizer, offload_parameters)
    parts = {part: states[part] if part in moved else 0 for part in states}
    parts["gradients"] = upcast + upcast // 4 * BYTES[precision] if offload_optimizer else 0
    return parts


def _model_states(
    config: Mapping[str, Any], world_size: int, zero_stage: int, precision: str, trained: int | None, ema: bool
) -> tuple[dict[str, int], int]:
    """Bytes of one process's weights, gradients and optimizer state, and of the fp32 gradients that AdamW reads."""
    size, parameters = BYTES[precision], parameter_count(config)
    trained = parameters if trained is None else trained
    stepped = math.ceil(trained / world_size) if zero_stage else trained
    held = parameters if zero_stage < 3 else math.ceil(parameters / world_size)
    graded = trained if zero_stage < 2 else stepped
    # ZeRO keeps fp32 weights beside the model's own, whatever its precision; plain training does not
    kept = (12 if zero_stage else 8) + (4 if ema else 0)
    states = {"parameters": held * size, "gradients": graded * size, "optimizer": kept * stepped}
    return states, 4 * stepped if zero_stage else 0


def _moved(zero_stage: int, offload_optimizer: bool, offload_parameters: bool) -> set[str]:
    """The parts that lie in the CPU's memory."""
    moved = {
        "parameters": offload_parameters and zero_stage == 3,
        "gradients": offload_optimizer and zero_stage > 1,
        "optimizer": offload_optimizer,
    }
    return {part for part, is_moved in moved.items() if is_moved}


def parameter_count(config: Mapping[str, Any]) -> int:
    """How many parameters a transformer of this ``config`` has."""
    # pyrefly: ignore[bad-argument-count]
    return _line(*(_parameters(_key(config), depth) for depth in (1, 2)), 1, config["num_layers"])


def training_loss_on_fakes(
    model: UniViGUTransformer3DModel, task: str, latents: tuple[int, ...], text_tokens: int, context_tokens: int
) -> torch.Tensor:
    """The loss of samples of one of `TASKS`, for tensors that hold nothing: latents of shape (B, C, T, H, W).

    Call it where ``torch.zeros`` makes fake or meta tensors.
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
    objective, loss = ObjectiveConfig(), table.new_zeros(())
    if TASKS[task].attention == "prefix":
        hidden = predict_prefix(model, samples, table, guessing=False)
    else:
        video, hidden = predict_joint(model, samples, table, guessing=False)
        loss = loss + video_losses(video, samples, objective)[0].sum()
    if "text" in TASKS[task].loss:
        loss = loss + text_losses(hidden, samples, table, model, objective, None)[0].sum()
    return loss


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it: how many are alive ``now``, and the ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen[storage] = None
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes()).atexit = False

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Don't count these, which were there before."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()] = None

    def _free(self, size: int) -> None:
        self.now -= size


def tracked_step(
    model: UniViGUTransformer3DModel, task: str, latents: tuple[int, ...], text_tokens: int, context_tokens: int
) -> tuple[int, int]:
    """Bytes that one training step keeps from its forward pass, and the most it holds at any moment.

    Weights and their gradients are left out of both.
    """
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    with LiveBytes() as memory:
        memory.ignore([*model.parameters(), *model.buffers()])
        loss = training_loss_on_fakes(model, task, latents, text_tokens, context_tokens)
        kept = memory.now
        loss.backward()
    return kept, memory.peak


def latent_size(config: Mapping[str, Any], video_tokens: int, text_tokens: int) -> tuple[int, int, int]:
    """(T, H, W) of latents of at least ``video_tokens`` patches, as few more as will fit the rotary tables."""
    limit = config["rope_max_seq_len"] - text_tokens
    if not 1 <= video_tokens <= limit**2:
        raise BadInputError(
            f"{video_tokens} video tokens beside {text_tokens} of text don't fit the model's rotary tables; choose a"
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
    key: str, video: int, text: int, context: int, batch: int, precision: str, checkpointing: bool
) -> tuple[int, int]:
    """Activations kept, and what the backward pass needs on top, of the costlier policy (bytes)."""
    config = json.loads(key)
    latents = (batch, config["in_channels"], *latent_size(config, video, text))
    found = []
    for task in COSTLIEST:
        # not from a depth of 1: the last block under ``prefix`` is cut short
        (kept, peak), (deeper, _) = (
            _on_fakes(config, depth, task, latents, text, context, precision, checkpointing) for depth in (2, 3)
        )
        found.append((_line(kept, deeper, 2, config["num_layers"]), peak - kept))
    return max(found, key=sum)


def _on_fakes(
    config: Mapping[str, Any],
    depth: int,
    task: str,
    latents: tuple[int, ...],
    text: int,
    context: int,
    precision: str,
    checkpointing: bool,
) -> tuple[int, int]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    # fake tensors of the CPU: there, as on a GPU, attention keeps no matrix of scores; on `meta` it would
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        model = _build(config, depth, DTYPES[precision])
        if checkpointing:
            model.enable_gradient_checkpointing()
        return tracked_step(model, task, latents, text, context)


def _build(config: Mapping[str, Any], depth: int, dtype: torch.dtype) -> UniViGUTransformer3DModel:
    """The model cut to ``depth`` blocks, all of it in ``dtype``, as DeepSpeed casts it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a cast of fake parameters is refused
    try:
        return UniViGUTransformer3DModel.from_config({**config, "num_layers": depth})
    finally:
        torch.set_default_dtype(before)


@cache
def _parameters(key: str, depth: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in _build(json.loads(key), depth, torch.float32).parameters())


def _key(config: Mapping[str, Any]) -> str:
    """A config as a key to remember results by: what a block is made of, and how many there are."""
    known = UniViGUTransformer3DModel._get_init_keys(UniViGUTransformer3DModel) - {"self"}
    return json.dumps({name: config[name] for name in sorted(known & set(config))})


def _line(first: int, second: int, depth: int, wanted: int) -> int:
    """What stands at ``wanted`` blocks when it is ``first`` at ``depth`` and ``second`` at one more."""
    return first + (wanted - depth) * (second - first)


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None
