"""The steps of a sampler: our own times with Euler steps (eq 3), or a scheduler of diffusers.

Both have the times ``taus`` from 0 (noise) to 1 (data), one more than there are steps, and ``step(i, z, u)``, which
carries a state from time ``i`` to the next along the velocity u = data - noise.
"""

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
