"""The steps of a sampler: our own times with Euler steps (eq 3), or a scheduler of diffusers.

Both have the times ``taus`` from 0 (noise) to 1 (data), one more than there are steps, and ``step(i, z, u)``, which
carries a state from time ``i`` to the next along the velocity u = data - noise.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import flow, inputs, wan
from .errors import BadInputError


class Steps(Protocol):
    """What both kinds of steps have; ``taus`` is (steps + 1,), float32."""

    taus: Tensor

    def __len__(self) -> int: ...

    def step(self, i: int, z: Tensor, velocity: Tensor) -> Tensor:
        """The state at time ``i + 1`` from the state and its velocity at time ``i``."""
        ...


class EulerSteps:
    """Euler steps along :func:`flow.tau_grid`, in ``steps`` steps with Wan's timestep ``shift``."""

    def __init__(self, steps: int, shift: float = 1.0, device: torch.device | None = None):
        self.taus = flow.tau_grid(steps, shift, device)

    def __len__(self) -> int:
        return len(self.taus) - 1

    def step(self, i: int, z: Tensor, velocity: Tensor) -> Tensor:
        """z at the next time = z + (tau' - tau) u (eq 3)."""
        return flow.euler_step(z, velocity, self.taus[i], self.taus[i + 1])


class SchedulerSteps:
    """The steps of a flow-matching scheduler of diffusers, whose timesteps are t = 1000 (1 - tau)."""

    def __init__(self, scheduler: Any, steps: int, device: torch.device | None = None):
        check_scheduler(scheduler)
        try:
            scheduler.set_timesteps(steps, device=device)
        except (ValueError, TypeError) as error:
            raise BadInputError(
                f"The scheduler {type(scheduler).__name__} can't make {steps} steps ({error}): correct its config."
            ) from error
        scheduler.set_begin_index(0)
        self._scheduler = scheduler
        times = 1 - scheduler.timesteps.float() / wan.NUM_TRAIN_TIMESTEPS
        self.taus = torch.cat([times, times.new_ones(1)])

    def __len__(self) -> int:
        return len(self.taus) - 1

    def step(self, i: int, z: Tensor, velocity: Tensor) -> Tensor:
        """The scheduler's own step; it takes Wan's sign, noise - data."""
        scheduler = self._scheduler
        return scheduler.step(-velocity, scheduler.timesteps[i], z, return_dict=False)[0]


@dataclass(frozen=True)
class JointPath:
    """How the times of a joint sample go from (tau_v, tau_t) = (0, 0) to (1, 1), in up to three parts.

    First tau_v moves alone. Then both move, while tau_v crosses an interval as long as ``in_step``, from
    ``text_at`` (1 - in_step) on. Then tau_v moves alone again, beside a finished text. An ``in_step`` of 1 leaves the
    middle part alone, which is eq 18. At 0 the interval is the point tau_v = ``text_at``, where the text is written in
    turn. In between, the text leads the video where ``text_at`` is small, and lags where it is large.

    In the middle part tau_t has steps of its own shift ``text_shift`` (see :func:`flow.shift_tau`): above 1 the text
    lags the video there. From tau_t = ``prompt_until`` on, what the text says so far is the condition c in place of the
    prompt; at 1 only a finished text is.
    """

    text_at: float
    in_step: float
    text_shift: float
    prompt_until: float

    def span(self, taus: Tensor) -> range:
        """The steps whose times, of the video's (steps + 1,), are in the interval in which both times move.

        An empty range starts at the step before which the text is written: the first one from ``text_at`` on.
        """
        if self.in_step == 1:
            return range(len(taus) - 1)
        start = self.text_at * (1 - self.in_step)
        return range(*(int(torch.searchsorted(taus, min(at, 1.0))) for at in (start, start + self.in_step)))


def check_scheduler(scheduler: Any) -> None:
    """Raise BadInputError unless a scheduler of diffusers integrates the flow that this model was trained on."""
    config = getattr(scheduler, "config", {})
    name = type(scheduler).__name__
    flows = name.startswith("FlowMatch") or config.get("use_flow_sigmas", False)
    predicts = config.get("prediction_type", "flow_prediction")
    if not flows or predicts != "flow_prediction" or config.get("num_train_timesteps", 1000) != wan.NUM_TRAIN_TIMESTEPS:
        raise BadInputError(
            f"The scheduler {name} is not set to integrate a flow of {wan.NUM_TRAIN_TIMESTEPS} timesteps, which this"
            " model predicts: use FlowMatchEulerDiscreteScheduler, or UniPCMultistepScheduler with"
            ' prediction_type="flow_prediction" and use_flow_sigmas=True.'
        )


def video_steps(scheduler: Any, steps: int, shift: float | None, default_shift: float, device: torch.device) -> Steps:
    """The steps of a video: the scheduler's, or ours where there is none. A scheduler has its own shift."""
    if scheduler is None:
        shift = inputs.valid_shift(default_shift if shift is None else shift)
        return EulerSteps(inputs.positive(steps), shift, device)
    if shift is not None:
        raise BadInputError(
            f"A shift of {shift} was given, but the steps are those of {type(scheduler).__name__}: set its shift"
            " (`shift` or `flow_shift` in its config), or set the pipeline's scheduler to None."
        )
    return SchedulerSteps(scheduler, inputs.positive(steps), device)
