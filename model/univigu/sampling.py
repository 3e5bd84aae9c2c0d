"""The velocity fields of the three ways to sample (eq 16-18), for :func:`flow.integrate`.

A field is a function of the state z and the time tau. Guidance moves a velocity away from that of a branch without
condition: u = u_without + scale * (u_with - u_without). What is absent in that branch is noise at tau = 0, as in
training (see ``tasks.TASKS``); at a scale of 1 the branch is not computed.

All noise of a sample comes from its own seed and a name, so a result does not depend on the rest of the batch.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import flow
from .transformer import UniViGUTransformer3DModel

Field = Callable[[Tensor, Tensor | float], Tensor]  # (z, tau) to a velocity of z's shape
JointField = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Sequence[Tensor]]  # the same for several states


def text_field(
    model: UniViGUTransformer3DModel,
    latents: Tensor,
    seeds: list[int],
    condition: Tensor,
    empty: Tensor,
    scale: float,
    temperature: float,
    video_tau: float = 1.0,
) -> Field:
    """The text's velocity beside a fixed video: z_t (B, N, d) and tau_t to u_t (eq 16).

    ``latents`` (B, C, T, H, W) are the clean video, seen at ``video_tau``. ``condition`` and ``empty`` (B or 1, L,
    text_dim) are the encoded prompt beside the video and the encoded empty string, which is the guidance's condition.
    """
    no_video = seeded_noise(seeds, "no video", latents.shape[1:], latents.device)
    # The video's keys and values don't depend on the text, so both are computed once for all steps.
    seen = model.prefill_video(flow.interpolate(no_video, latents, video_tau), batch_tau(video_tau, latents), condition)
    unseen = None if scale == 1 else model.prefill_video(no_video, batch_tau(0.0, latents), empty)
    table = model.text_space()
    guess: Tensor | None = None

    def field(z: Tensor, tau: Tensor | float) -> Tensor:
        nonlocal guess
        tau = batch_tau(tau, z)
        hidden = model.denoise_text(z, tau, seen, guess)
        if unseen is not None:
            without = model.denoise_text(z, tau, unseen, guess)
            hidden = without + scale * (hidden - without)
        prediction = model.read_text(hidden, z, tau, table, temperature=temperature)
        guess = prediction.data
        return prediction.velocity

    return field


def video_field(
    model: UniViGUTransformer3DModel,
    text: Tensor,
    text_tau: float,
    seeds: list[int],
    condition: Tensor,
    empty: Tensor,
    scale: float,
) -> Field:
    """The video's velocity beside a fixed text: z_v (B, C, T, H, W) and tau_v to u_v (eq 17).

    ``text`` (B, N, d) is at the time ``text_tau``. Guidance moves away from the empty condition without text.
    """
    no_text = seeded_noise(seeds, "no text", text.shape[1:], condition.device)

    def field(z: Tensor, tau: Tensor | float) -> Tensor:
        tau = batch_tau(tau, z)
        velocity = model(z, tau, condition, text, batch_tau(text_tau, z)).video.float()
        if scale != 1:
            without = model(z, tau, empty, no_text, batch_tau(0.0, z)).video.float()
            velocity = without + scale * (velocity - without)
        return velocity

    return field


def joint_field(
    model: UniViGUTransformer3DModel,
    video_shape: Sequence[int],
    text_shape: Sequence[int],
    seeds: list[int],
    condition: Tensor,
    empty: Tensor,
    scales: tuple[float, float],
    temperature: float,
) -> JointField:
    """Both velocities, for video and text in lockstep: (z_v, z_t) and (tau_v, tau_t) to (u_v, u_t) (eq 18).

    ``scales`` are the guidance of the video, away from the empty condition without text, and that of the text, away
    from the text without video.
    """
    scale, text_scale = scales
    no_text = seeded_noise(seeds, "no text", text_shape, condition.device)
    no_video = seeded_noise(seeds, "no video", video_shape, condition.device)
    table = model.text_space()
    guess: Tensor | None = None

    def field(states: tuple[Tensor, ...], taus: tuple[Tensor, ...]) -> Sequence[Tensor]:
        nonlocal guess
        video, text = states
        video_tau, text_tau = (batch_tau(tau, video) for tau in taus)
        out = model(video, video_tau, condition, text, text_tau, guess)
        velocity, hidden = out.video.float(), out.text
        if scale != 1:
            without = model(video, video_tau, empty, no_text, batch_tau(0.0, video)).video.float()
            velocity = without + scale * (velocity - without)
        if text_scale != 1:
            without = model(no_video, batch_tau(0.0, video), condition, text, text_tau, guess).text
            hidden = without + text_scale * (hidden - without)
        prediction = model.read_text(hidden, text, text_tau, table, temperature=temperature)
        guess = prediction.data
        return velocity, prediction.velocity

    return field


def integrate_one(
    field: Field, z: Tensor, grid: Tensor, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> Tensor:
    """Carry one modality along the times ``grid`` (steps + 1,) with Euler steps (eq 16, 17)."""
    (z,) = flow.integrate(lambda states, taus: (field(*states, *taus),), [z], [grid], progress)
    return z


def seeded_noise(seeds: Sequence[int], name: str, shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal noise (len(seeds), *shape), float32; ``name`` tells the noises of one sample apart."""
    return flow.keyed_noise([(seed, name) for seed in seeds], shape, device)


def batch_tau(tau: Tensor | float, like: Tensor) -> Tensor:
    """One time for the whole batch, in the form the model takes: (B,), float32."""
    return torch.as_tensor(tau, dtype=torch.float32, device=like.device).expand(len(like))
