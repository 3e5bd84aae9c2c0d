"""What a training sample is, and its loss (eq 9-11).

A tau drawn from (0, 1) is never exactly at the corners that inference uses (a clean video, an embedded prompt, no
condition), so a share of the samples is placed exactly there: see the table `TASKS`. Everything random about a sample
(its task, its times, its noise, what is dropped) is a function of (seed, epoch, sample id). So a run depends neither on
the number of processes nor on what else is in a batch.

A batch is a dict of tensors on one device (B samples, N text tokens, L condition tokens):

=================  ===================  ======================================================================
``latents``        (B, C, T, H, W)      clean video z_v1: normalised VAE means
``prompt_embeds``  (B, L, text_dim)     the condition c: text-encoder states, zeros at padded places
``empty_embeds``   (L, text_dim)        the dropped condition: the states of the empty string, padded likewise
``prompt_ids``     (B, N)               the prompt as tokens: EOS, then PAD
``target_ids``     (B, N)               the stage's target text: the prompt (stage 1), a caption (stage 2)
``sample_ids``     (B,)                 int64 keys of the samples
``epochs``         (B,)                 int64, how often each sample was used before
=================  ===================  ======================================================================
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import flow, text_space
from .errors import ConfigError
from .text_space import TextPrediction
from .transformer import UniViGUTransformer3DModel

# In the loss, 1 - tau is at least this. The velocity is (z_1 - z_tau) / (1 - tau), so near tau = 1 a tiny error of the
# predicted z_1 would outweigh all other samples. Velocity and data are equivalent up to tau = 0.95.
TAU_FLOOR = 0.05
NEGLIGIBLE = 1e-20  # a gradient below this changes no float32 sum that it is part of
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A row of `TASKS`. A time of None is drawn from (0, 1); a modality at its clean corner has no loss."""

    share: float
    text: tuple[str, ...]  # the ids in the text stream; of two, each is used for half of the samples
    condition_dropout: float | None  # None: ObjectiveConfig.prompt_dropout of this task
    video_tau: float | None
    text_tau: float | None
    absent: float  # share in which the clean modality is replaced by noise (tau = 0): the unconditional guidance branch
    attention: str
    loss: tuple[str, ...]


TASKS = {
    "understand": Task(0.5, ("target_ids",), 1.0, 1.0, None, 0.1, "prefix", ("text",)),
    "joint": Task(0.3, ("target_ids",), None, None, None, 0.0, "joint", ("video", "text")),
    "generate": Task(0.2, ("prompt_ids", "target_ids"), None, None, 1.0, 0.1, "joint", ("video",)),
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """Choices of the objective. ``form="literal"`` is eq 11 as printed, and needs the joint task alone.

    ``weighted`` adds a cross-entropy, because E under a squared error alone can collapse. Its default weights are those
    that worked in small trials. Raises ConfigError for invalid values and for values that exclude each other.
    """

    shares: Mapping[str, float] = field(default_factory=lambda: {name: task.share for name, task in TASKS.items()})
    prompt_dropout: Mapping[str, float] = field(default_factory=lambda: {"joint": 0.5, "generate": 0.1})
    video_shift: float = 1.0  # timestep shift of the times drawn in training, see flow.shift_tau
    text_shift: float = 1.0
    video_weight: float = 0.3
    text_weight: float = 0.1
    ce_weight: float = 1.0
    self_conditioning: float = 0.5  # share of steps in which the text is given its own first estimate of z_1
    form: str = "weighted"  # weighted | literal
    seed: int = 0

    def __post_init__(self):
        unknown = set(self.shares) - set(TASKS)
        if unknown or not sum(self.shares.values()) > 0 or min(self.shares.values()) < 0:
            raise ConfigError(f"Task shares {dict(self.shares)} are invalid: give {', '.join(TASKS)} numbers >= 0.")
        dropped = {name for name, task in TASKS.items() if task.condition_dropout is None}
        if (
            not isinstance(self.prompt_dropout, Mapping)
            or set(self.prompt_dropout) != dropped
            or not all(0 <= p <= 1 for p in self.prompt_dropout.values())
        ):
            raise ConfigError(
                f"prompt_dropout {self.prompt_dropout} is invalid: give {' and '.join(sorted(dropped))} a number"
                " from 0 to 1."
            )
        if not min(self.video_shift, self.text_shift) > 0:
            raise ConfigError(
                f"Timestep shifts {self.video_shift} and {self.text_shift} are invalid: give numbers above 0."
            )
        if self.form not in ("weighted", "literal"):
            raise ConfigError(f"Unknown form {self.form!r}: use weighted or literal.")
        if self.form == "literal" and any(self.shares.get(name) for name in TASKS if name != "joint"):
            raise ConfigError("The literal objective has the joint task alone: set shares to {joint: 1}.")
        if self.form == "literal" and not self.video_shift == self.text_shift == 1:
            raise ConfigError("The literal objective draws its times uniformly: set both timestep shifts to 1.")


@dataclass(frozen=True)
class Plan:
    """The random choices for each of B samples in this epoch: all tensors (B,)."""

    task: Tensor  # index into TASKS
    video_tau: Tensor
    text_tau: Tensor
    drop_condition: Tensor
    text_is_prompt: Tensor  # bool: the text stream holds prompt_ids, otherwise target_ids


def draw_plan(keys: Sequence[tuple[Hashable, ...]], config: ObjectiveConfig) -> Plan:
    """Task, times and dropouts of the samples with these keys, on the CPU; a sample depends on its own key alone."""
    draws = torch.stack([torch.rand(6, generator=flow.keyed_generator(*key, "plan")) for key in keys])
    names, tasks = list(TASKS), list(TASKS.values())
    shares = torch.tensor([float(config.shares.get(name, 0)) for name in names])
    task = torch.searchsorted(shares.cumsum(0) / shares.sum(), draws[:, 0].contiguous(), right=True)

    def column(values: Iterable[float | None]) -> Tensor:
        return torch.tensor([float("nan") if v is None else v for v in values])[task]

    absent = draws[:, 1] < column(t.absent for t in tasks)
    fixed_times = column(t.video_tau for t in tasks), column(t.text_tau for t in tasks)
    drawn_times = flow.shift_tau(draws[:, 2], config.video_shift), flow.shift_tau(draws[:, 3], config.text_shift)
    times = [
        torch.where(fixed.isnan(), drawn, fixed.masked_fill(absent, 0.0))
        for drawn, fixed in zip(drawn_times, fixed_times, strict=True)
    ]
    dropout = column(
        config.prompt_dropout[name] if task.condition_dropout is None else task.condition_dropout
        for name, task in TASKS.items()
    )
    prompt_share = column(t.text.count("prompt_ids") / len(t.text) for t in tasks)
    # the unconditional branch of guidance has neither text nor condition, so where the text is absent, drop both
    # pyrefly: ignore[bad-argument-count]
    return Plan(task, *times, (draws[:, 4] < dropout) | absent, draws[:, 5] < prompt_share)


@dataclass(frozen=True)
class Samples:
    """A batch on its paths from noise to data (eq 9): tensors of B samples, ready for the model."""

    latents: Tensor  # z_v1 (B, C, T, H, W)
    video_noise: Tensor  # z_v0
    video_tau: Tensor  # (B,)
    z_video: Tensor  # z_v at video_tau
    ids: Tensor  # (B, N)
    text_data: Tensor  # z_t1 = E[ids] (B, N, d)
    text_noise: Tensor  # z_t0
    text_tau: Tensor  # (B,)
    z_text: Tensor  # z_t at text_tau
    condition: Tensor  # c (B, L, text_dim)
    is_prefix: Tensor  # bool: attention policy
    has_video_loss: Tensor  # bool
    has_text_loss: Tensor  # bool

    def __getitem__(self, rows: Tensor) -> "Samples":
        return Samples(**{name: tensor[rows] for name, tensor in vars(self).items()})

    def __len__(self) -> int:
        return len(self.latents)

    def smallest(self, patch: Sequence[int]) -> "Samples":
        """The first sample, cut down to one patch of video, one text token and one condition token."""
        frames, height, width = (slice(size) for size in patch)
        cuts = {
            **dict.fromkeys(("latents", "video_noise", "z_video"), (slice(1), slice(None), frames, height, width)),
            **dict.fromkeys(("ids", "text_data", "text_noise", "z_text", "condition"), (slice(1), slice(1))),
        }
        return Samples(**{name: tensor[cuts.get(name, slice(1))] for name, tensor in vars(self).items()})


def prepare(batch: Batch, table: Tensor, config: ObjectiveConfig) -> Samples:
    """Draw each sample's task, noise and times, and place it on its paths (eq 6, 7, 9); ``table`` is E, (V, d)."""
    device, latents = batch["latents"].device, batch["latents"].float()
    ids, epochs = batch["sample_ids"].tolist(), batch["epochs"].tolist()
    keys = [(config.seed, epoch, sample) for sample, epoch in zip(ids, epochs, strict=True)]
    plan = draw_plan(keys, config)
    video_tau, text_tau = plan.video_tau.to(device), plan.text_tau.to(device)
    token_ids = torch.where(plan.text_is_prompt.to(device)[:, None], batch["prompt_ids"], batch["target_ids"])
    text_data = text_space.embed(token_ids, table)
    video_noise = flow.keyed_noise([(*key, "video") for key in keys], latents.shape[1:], device)
    text_noise = flow.keyed_noise([(*key, "text") for key in keys], text_data.shape[1:], device)
    drop = plan.drop_condition.to(device)[:, None, None]
    tasks = [list(TASKS.values())[i] for i in plan.task.tolist()]
    return Samples(
        latents=latents,
        video_noise=video_noise,
        video_tau=video_tau,
        z_video=flow.interpolate(video_noise, latents, video_tau),
        ids=token_ids,
        text_data=text_data,
        text_noise=text_noise,
        text_tau=text_tau,
        z_text=flow.interpolate(text_noise, text_data, text_tau),
        condition=torch.where(drop, batch["empty_embeds"], batch["prompt_embeds"]),
        is_prefix=torch.tensor([task.attention == "prefix" for task in tasks], device=device),
        has_video_loss=torch.tensor(["video" in task.loss for task in tasks], device=device),
        has_text_loss=torch.tensor(["text" in task.loss for task in tasks], device=device),
    )


def predict_prefix(model: UniViGUTransformer3DModel, s: Samples, table: Tensor, guessing: bool) -> Tensor:
    """The text's h (B, N, d) for samples under ``prefix``; the video is computed once, for both passes of the text.

    ``guessing``: condition the text on its own first estimate of z_1 (self-conditioning).
    """
    # under `prefix` every sample has the empty condition, so one row of it is enough
    cache = model.prefill_video(s.z_video, s.video_tau, s.condition[:1])
    # zeros, not None: a weight that a step does not use keeps the last step's gradient under ZeRO 3
    guess = torch.zeros_like(s.z_text)
    if guessing:
        with torch.no_grad():
            first = model.denoise_text(s.z_text, s.text_tau, cache)
            guess = model.read_text(first, s.z_text, s.text_tau, table).data
    return model.denoise_text(s.z_text, s.text_tau, cache, guess)


def predict_joint(model: UniViGUTransformer3DModel, s: Samples, table: Tensor, guessing: bool) -> tuple[Tensor, Tensor]:
    """Video velocity (B, C, T, H, W) and the text's h (B, N, d) for samples under ``joint`` (eq 10)."""
    guess = torch.zeros_like(s.z_text)
    if guessing:
        # a text at tau = 1 is given, not denoised: inference has no estimate for it, so training has none either
        rows = s.has_text_loss.nonzero()[:, 0]
        # without such a text the extra pass runs all the same, on one patch: see `training_loss`
        t = s[rows] if len(rows) else s.smallest(model.config.patch_size)
        with torch.no_grad():
            first = model(t.z_video, t.video_tau, t.condition, t.z_text, t.text_tau).text
            if len(rows):
                data = model.read_text(first, t.z_text, t.text_tau, table).data
                guess = torch.zeros_like(s.z_text).index_copy(0, rows, data)
    out = model(s.z_video, s.video_tau, s.condition, s.z_text, s.text_tau, guess)
    return out.video, out.text


def video_losses(velocity: Tensor, s: Samples, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Each sample's contribution to the loss, and its mean squared error of the velocity (eq 11), both (B,)."""
    squares = (velocity.float() - flow.velocity(s.video_noise, s.latents)).square().flatten(1)
    mse = squares.mean(1)
    return (squares.sum(1) if config.form == "literal" else config.video_weight * mse), mse


def text_losses(
    hidden: Tensor,
    s: Samples,
    table: Tensor,
    model: UniViGUTransformer3DModel,
    config: ObjectiveConfig,
    token_weights: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each sample's contribution to the loss (B,), and its ``text_mse``, ``text_ce`` and ``token_accuracy`` (B,)."""
    prediction = model.read_text(hidden, s.z_text, s.text_tau, table, TAU_FLOOR)
    data, z = s.text_data, s.z_text
    if config.form == "weighted":
        # E learns from the cross-entropy alone: a target with a gradient is easiest to hit where all rows are equal
        data, z = data.detach(), z.detach()
    if model.config.prediction == "velocity":
        target = flow.velocity(s.text_noise, data)
    else:
        target = flow.data_to_velocity(data, z, s.text_tau, TAU_FLOOR)
    squares = (prediction.velocity - target).square().flatten(1)
    parts = {"text_mse": squares.mean(1)}
    if config.form == "literal":
        patch = model.config.patch_size
        video_tokens = s.latents[0, 0].numel() // (patch[0] * patch[1] * patch[2])
        loss = squares.sum(1) * (video_tokens / s.ids.shape[1])
    else:
        loss = config.text_weight * parts["text_mse"]
    if prediction.logits is not None:
        ce = cross_entropy(prediction.logits, s.ids)
        parts["text_ce"] = ce.mean(1)
        if config.form == "weighted":
            weights = torch.ones_like(ce) if token_weights is None else token_weights[s.ids]
            loss = loss + config.ce_weight * (ce * weights).sum(1) / weights.sum(1)
    parts["token_accuracy"] = token_accuracy(prediction, s.ids, table, model)
    return loss, parts


def drop_negligible_gradient(hidden: Tensor) -> None:
    """Register a hook that sets entries below `NEGLIGIBLE` to zero in the gradient of `hidden`.

    Near tau = 1 a token can be read from z_tau alone. Its loss is nearly zero, and its gradient becomes denormal in
    float32: a CPU multiplies such matrices a hundred times slower.
    """
    if hidden.requires_grad:
        # pyrefly: ignore[implicit-any-lambda]
        hidden.register_hook(lambda grad: grad.masked_fill(grad.abs() < NEGLIGIBLE, 0.0))


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """-log p of each token: logits (B, N, V), ids (B, N) to (B, N)."""
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").unflatten(0, ids.shape)


@torch.no_grad()
def token_accuracy(prediction: TextPrediction, ids: Tensor, table: Tensor, model: UniViGUTransformer3DModel) -> Tensor:
    """Share of each sample's tokens, PAD left out, that are predicted correctly: (B,)."""
    if prediction.logits is None:
        predicted = text_space.nearest(prediction.data, table, model.config.tokenizer_length)
    else:
        predicted = prediction.logits.argmax(-1)
    counted = ids != model.config.pad_token_id
    return ((predicted == ids) & counted).sum(1) / counted.sum(1).clamp_min(1)


def training_loss(
    model: UniViGUTransformer3DModel,
    batch: Batch,
    config: ObjectiveConfig,
    step: int,
    token_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """One batch's ``loss`` (eq 11, or its weighted form) with gradient, and its parts as detached scalars.

    ``step`` decides, identically on all ranks, whether this step is self-conditioned. ``token_weights`` (V,) weight the
    cross-entropy; without them all tokens weigh the same. ``loss`` is the mean over all B samples; a modality without
    loss counts as zero. ``video_mse``, ``text_mse``, ``text_ce`` (unweighted) and ``token_accuracy`` are means over the
    ``video_samples`` and ``text_samples`` of this batch, or zero where there are none. Samples are grouped by attention
    policy, with one forward pass per group.

    Every batch runs both passes through all weights, and every output enters ``loss``, even if multiplied by zero.
    Ranks that partition weights or gradients (ZeRO) would deadlock where one uses a weight and another does not. For a
    policy without samples the pass has a single patch and token, which costs next to nothing.
    """
    table = model.text_space()
    samples = prepare(batch, table, config)
    draw = torch.rand((), generator=flow.keyed_generator(config.seed, step, "guess"))
    guessing = bool(draw < config.self_conditioning)
    loss, parts = table.new_zeros(()), {}
    for policy in (True, False):
        rows = (samples.is_prefix == policy).nonzero()[:, 0]
        group = samples[rows] if len(rows) else samples.smallest(model.config.patch_size)
        if policy:
            hidden = predict_prefix(model, group, table, guessing)
            drop_negligible_gradient(hidden)
            loss = loss + 0 * hidden.sum()
        else:
            video, hidden = predict_joint(model, group, table, guessing)
            drop_negligible_gradient(hidden)
            loss = loss + 0 * (video.float().sum() + hidden.sum())
        if not len(rows):
            continue
        if not policy:
            video_loss, mse = video_losses(video, group, config)
            loss = loss + video_loss.sum()
            parts.setdefault("video_mse", []).append(mse)
        texts = group.has_text_loss.nonzero()[:, 0]
        if len(texts):
            text_loss, values = text_losses(hidden[texts], group[texts], table, model, config, token_weights)
            loss = loss + text_loss.sum()
            for name, value in values.items():
                parts.setdefault(name, []).append(value)
    out = {"loss": loss / len(samples)}
    for name in ("video_mse", "text_mse", "text_ce", "token_accuracy"):
        values = torch.cat(parts[name]).detach() if name in parts else table.new_zeros(0)
        out[name] = values.sum() / max(1, len(values))
        if name.endswith("_mse"):
            out[name.replace("_mse", "_samples")] = torch.tensor(len(values), device=table.device)
    return out


class TrainingObjective(nn.Module):
    """:func:`training_loss` as a module, for engines that need one root ``forward``: ``objective(batch, step)``."""

    def __init__(
        self, transformer: UniViGUTransformer3DModel, config: ObjectiveConfig, token_weights: Tensor | None = None
    ):
        super().__init__()
        self.transformer = transformer
        self.config = config
        self.register_buffer("token_weights", token_weights, persistent=False)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return training_loss(self.transformer, batch, self.config, step, self.token_weights)
