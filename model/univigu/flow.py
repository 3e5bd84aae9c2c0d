"""Straight paths between noise and data, in the paper's time: tau = 0 is noise, tau = 1 is data (eq 6-10, 16-18).

All functions are pure, and work on video and text latents alike. Shapes: a latent is (B, ...), tau is (B,) or a scalar.
A path is z_tau = (1 - tau) z_0 + tau z_1, its velocity is u = z_1 - z_0. At a given tau, any two of z_tau, u, z_0 and
z_1 determine the others; the conversions below are named after their input and output.
"""

import hashlib
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def expand_tau(tau: Tensor | float, like: Tensor) -> Tensor:
    """Reshape tau, (B,) or scalar, so that it broadcasts against ``like`` (B, ...)."""
    tau = torch.as_tensor(tau, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    return tau.reshape(-1, *[1] * (like.ndim - 1)) if tau.ndim else tau


def interpolate(noise: Tensor, data: Tensor, tau: Tensor | float) -> Tensor:
    """z_tau = (1 - tau) z_0 + tau z_1 (eq 6, 7, 9)."""
    tau = expand_tau(tau, data)
    return (1 - tau) * noise + tau * data


def velocity(noise: Tensor, data: Tensor) -> Tensor:
    """u = z_1 - z_0, constant along the path (eq 6)."""
    return data - noise


def velocity_to_data(velocity: Tensor, z: Tensor, tau: Tensor | float) -> Tensor:
    """z_1 = z_tau + (1 - tau) u."""
    return z + (1 - expand_tau(tau, z)) * velocity


def data_to_velocity(data: Tensor, z: Tensor, tau: Tensor | float, floor: float = 0.0) -> Tensor:
    """u = (z_1 - z_tau) / (1 - tau); 1 - tau is at least ``floor``, so that a loss near tau = 1 stays finite."""
    return (data - z) / (1 - expand_tau(tau, z)).clamp_min(floor)


def velocity_to_noise(velocity: Tensor, z: Tensor, tau: Tensor | float) -> Tensor:
    """z_0 = z_tau - tau u."""
    return z - expand_tau(tau, z) * velocity


def noise_to_velocity(noise: Tensor, z: Tensor, tau: Tensor | float) -> Tensor:
    """u = (z_tau - z_0) / tau, for tau > 0."""
    return (z - noise) / expand_tau(tau, z)


def data_to_noise(data: Tensor, z: Tensor, tau: Tensor | float) -> Tensor:
    """z_0 = (z_tau - tau z_1) / (1 - tau), for tau < 1."""
    tau = expand_tau(tau, z)
    return (z - tau * data) / (1 - tau)


def noise_to_data(noise: Tensor, z: Tensor, tau: Tensor | float) -> Tensor:
    """z_1 = (z_tau - (1 - tau) z_0) / tau, for tau > 0."""
    tau = expand_tau(tau, z)
    return (z - (1 - tau) * noise) / tau


def shift_tau(tau: Tensor, shift: float) -> Tensor:
    """tau' = tau / (tau + s (1 - tau)): Wan's timestep shift in the paper's time; s > 1 moves tau towards noise."""
    return tau / (tau + shift * (1 - tau))


def tau_grid(steps: int, shift: float = 1.0, device: torch.device | str | None = None) -> Tensor:
    """The times from 0 to 1 of a sampler, (steps + 1,) float32, shifted by :func:`shift_tau`."""
    tau = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return shift_tau(tau, shift).to(device=device, dtype=torch.float32)


def euler_step(z: Tensor, velocity: Tensor, tau: Tensor | float, tau_next: Tensor | float) -> Tensor:
    """z at ``tau_next`` = z + (tau_next - tau) u (eq 3)."""
    return z + (expand_tau(tau_next, z) - expand_tau(tau, z)) * velocity


def integrate(
    field: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Sequence[Tensor]],
    states: Sequence[Tensor],
    grids: Sequence[Tensor],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[Tensor, ...]:
    """Integrate one or several coupled states from noise to data with Euler steps (eq 16-18).

    ``field(states, taus)`` returns one velocity per state; ``taus`` has one scalar tensor per state. ``grids`` has the
    times (steps + 1,) of each state, all of the same length. ``progress`` wraps the loop over steps.
    """
    states, times = tuple(states), torch.stack(list(grids), dim=1)
    for taus, tau_nexts in progress(list(itertools.pairwise(times))):
        steps = zip(states, field(states, taus.unbind()), taus, tau_nexts, strict=True)
        states = tuple(euler_step(*step) for step in steps)
    return states


def keyed_generator(*key: Hashable) -> torch.Generator:
    """A CPU generator that depends on ``key`` alone: the same numbers in every process, batch and order of calls."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def keyed_noise(
    keys: Sequence[tuple[Hashable, ...]], shape: Sequence[int], device: torch.device | str | None = None
) -> Tensor:
    """Standard normal float32 (len(keys), *shape); sample i depends on keys[i] alone, not on its neighbours."""
    return torch.stack([torch.randn(*shape, generator=keyed_generator(*key)) for key in keys]).to(device)
