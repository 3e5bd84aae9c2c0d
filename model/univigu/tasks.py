"""What a training sample is: its task, its times and its noise (eq 6, 7, 9).

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
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import flow, text_space
from .errors import ConfigError

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
    coupled_times: float = 0.0  # of joint samples: share whose two times are shifted from one draw, see `draw_plan`
    video_weight: float = 0.3
    text_weight: float = 0.1
    ce_weight: float = 1.0
    self_conditioning: float = 0.5  # share of steps in which the text is given its own first estimate of z_1
    text_draws: int = 1  # of the understand task: noises and times of the text for one pass over the video
    task_draw: str = "sample"  # draw a task for each sample, or for each step: all of its samples have the same one
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
        if not 0 <= self.coupled_times <= 1 or (self.coupled_times and not self.shares.get("joint")):
            raise ConfigError(
                f"coupled_times is {self.coupled_times}: give a number from 0 to 1, and above 0 also a share to joint."
            )
        if self.text_draws < 1 or (self.text_draws > 1 and not self.shares.get("understand")):
            raise ConfigError(
                f"text_draws is {self.text_draws}: give 1 or more, and above 1 also a share to the task understand."
            )
        if self.task_draw not in ("sample", "step"):
            raise ConfigError(f"Unknown task_draw {self.task_draw!r}: use sample or step.")
        if self.form not in ("weighted", "literal"):
            raise ConfigError(f"Unknown form {self.form!r}: use weighted or literal.")
        if self.form == "literal" and any(self.shares.get(name) for name in TASKS if name != "joint"):
            raise ConfigError("The literal objective has the joint task alone: set shares to {joint: 1}.")
        if self.form == "literal" and not self.video_shift == self.text_shift == 1:
            raise ConfigError("The literal objective draws its times uniformly: set both timestep shifts to 1.")
        if self.form == "literal" and self.coupled_times:
            raise ConfigError("The literal objective draws its times independently (eq 9): set coupled_times to 0.")


class StepDraw(NamedTuple):
    """What is drawn once for a step: it is the same for all samples, micro-batches and ranks."""

    task: str | None  # None: each sample has its own, see `draw_plan`
    self_conditioned: bool


BLOCK = 20  # steps in which the drawn tasks have their shares, up to one step each


def draw_step(step: int, config: ObjectiveConfig) -> StepDraw:
    """What step 1, 2, ... of a run draws; it depends on the seed and the step alone.

    With ``task_draw: step`` a block of 20 steps is a systematic sample of all pairs of a task and of whether the step
    is self-conditioned, in random order: a pair of share p has 20 p steps, rounded up or down, and 20 p on average. One
    task a step keeps ranks alike: they wait for no slower one, and run the weights in the same order.
    """
    if config.task_draw == "sample":
        draw = torch.rand((), generator=flow.keyed_generator(config.seed, step, "guess"))
        return StepDraw(None, bool(draw < config.self_conditioning))
    block, place = divmod(step - 1, BLOCK)
    generator = flow.keyed_generator(config.seed, block, "steps")
    guess = config.self_conditioning
    pairs = {
        StepDraw(name, guessing): config.shares.get(name, 0) * (guess if guessing else 1 - guess)
        for name in TASKS
        for guessing in (True, False)
    }
    borders = torch.tensor(list(pairs.values()), dtype=torch.float64).cumsum(0)
    points = (torch.arange(BLOCK) + torch.rand((), generator=generator)) / BLOCK
    drawn = torch.searchsorted(borders / borders[-1], points.double(), right=True)
    return list(pairs)[int(drawn[torch.randperm(BLOCK, generator=generator)[place]])]


@dataclass(frozen=True)
class Plan:
    """The random choices for each of B samples in this epoch: all tensors (B,)."""

    task: Tensor  # index into TASKS
    video_tau: Tensor
    text_tau: Tensor
    drop_condition: Tensor
    text_is_prompt: Tensor  # bool: the text stream holds prompt_ids, otherwise target_ids


def draw_plan(keys: Sequence[tuple[Hashable, ...]], config: ObjectiveConfig, step_task: str | None = None) -> Plan:
    """Task, times and dropouts of the samples with these keys, on the CPU; a sample depends on its own key alone.

    ``step_task`` is the task of all of them, where the step has drawn one (`draw_step`).

    The two times of a joint sample are independent (eq 9), so few samples are near a line along which eq 18 integrates.
    With probability ``coupled_times`` both are shifts of one draw u, tau_m = shift_tau(u, s_m), and so on the line
    tau_t = shift_tau(tau_v, s_t / s_v). Each time alone keeps its distribution, and no other choice of any sample
    changes.
    """
    draws = torch.stack([torch.rand(6, generator=flow.keyed_generator(*key, "plan")) for key in keys])
    names, tasks = list(TASKS), list(TASKS.values())
    shares = torch.tensor([float(config.shares.get(name, 0)) for name in names])
    task = torch.searchsorted(shares.cumsum(0) / shares.sum(), draws[:, 0].contiguous(), right=True)
    if step_task is not None:
        task = torch.full_like(task, names.index(step_task))

    def column(values: Iterable[float | None]) -> Tensor:
        return torch.tensor([float("nan") if v is None else v for v in values])[task]

    absent = draws[:, 1] < column(t.absent for t in tasks)
    fixed_times = column(t.video_tau for t in tasks), column(t.text_tau for t in tasks)
    text_draw = draws[:, 3]
    if config.coupled_times:
        # from a generator of its own, so that a share of 0 draws what it always drew
        coins = torch.stack([torch.rand((), generator=flow.keyed_generator(*key, "coupled")) for key in keys])
        coupled = (coins < config.coupled_times) & (task == names.index("joint"))
        text_draw = torch.where(coupled, draws[:, 2], text_draw)
    drawn_times = flow.shift_tau(draws[:, 2], config.video_shift), flow.shift_tau(text_draw, config.text_shift)
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


def sample_keys(batch: Batch, config: ObjectiveConfig) -> list[tuple[int, int, int]]:
    """The key of each sample's random numbers: (seed, epoch, sample id)."""
    ids, epochs = batch["sample_ids"].tolist(), batch["epochs"].tolist()
    return [(config.seed, epoch, sample) for sample, epoch in zip(ids, epochs, strict=True)]


def prepare(batch: Batch, table: Tensor, config: ObjectiveConfig, step_task: str | None = None) -> Samples:
    """Draw each sample's task, noise and times, and place it on its paths (eq 6, 7, 9); ``table`` is E, (V, d).

    ``step_task`` is the task of all samples, where the step has drawn one (`draw_step`).
    """
    device, latents, keys = batch["latents"].device, batch["latents"].float(), sample_keys(batch, config)
    plan = draw_plan(keys, config, step_task)
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


def redraw_texts(s: Samples, keys: Sequence[tuple[Hashable, ...]], draw: int, config: ObjectiveConfig) -> Samples:
    """The same samples with other noise and another time of the text; ``keys`` are theirs, see :func:`sample_keys`.

    ``draw`` is 1, 2, ...: the samples' own noise and time are draw 0. The video's tensors are shared, not copied.
    """
    uniform = torch.stack([torch.rand((), generator=flow.keyed_generator(*key, "text time", draw)) for key in keys])
    tau = flow.shift_tau(uniform, config.text_shift).to(s.text_tau)
    noise = flow.keyed_noise([(*key, "text", draw) for key in keys], s.text_noise.shape[1:], s.text_noise.device)
    return replace(s, text_noise=noise, text_tau=tau, z_text=flow.interpolate(noise, s.text_data, tau))
