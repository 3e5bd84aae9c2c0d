"""The velocity fields of the three ways to sample (eq 16-18).

A field is a function of the state z and the time tau. Guidance moves a velocity away from that of a branch without
condition: u = u_without + scale * (u_with - u_without). What is absent in that branch is noise at tau = 0, as in
training (see ``tasks.TASKS``); at a scale of 1 or less the branch is not computed.

All noise of a sample comes from its own seed and a name, so a result does not depend on the rest of the batch. The
model is only called, because hooks that offload its weights to another device act on a call.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from . import flow, inputs
from .bases import ImageCondition
from .errors import BadInputError
from .inputs import Generators, Seeds
from .layers import Condition
from .transformer import UniViGUOutput, UniViGUTransformer3DModel, VideoCache

TOGETHER = 8192  # video tokens of both branches of guidance up to which they are one batch

Field = Callable[[Tensor, Tensor | float], Tensor]  # (z, tau) to a velocity of z's shape
JointField = Callable[[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]  # (video, text) likewise


@dataclass
class Guide:
    """What a video is guided by; a field reads it in each step, so it may be changed between steps.

    ``condition`` (B or 1, L, text_dim) is the encoded prompt, ``negative`` what guidance moves away from: the encoded
    empty string, or a negative prompt. It may be None where ``scale`` is 1 or less. ``image`` is the first image of the
    videos, where one is given; both branches see it.
    """

    condition: Tensor
    negative: Tensor | None
    scale: float
    image: ImageCondition | None = None

    def show(self, z: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the transformer takes for videos z (B, C, T, H', W') at tau (B,): both, and ``image_states``."""
        return (z, tau, None) if self.image is None else (*self.image.show(z, tau), self.image.states)

    def finish(self, z: Tensor) -> Tensor:
        """Videos z (B, C, T, H', W') with what they were given in its place."""
        return z if self.image is None else self.image.finish(z)


class Conditions:
    """The conditions of a sampling run, whose keys and values are computed once; a callback may give others."""

    def __init__(self) -> None:
        self._kept: deque[tuple[tuple[Tensor, ...], list[int | None], Condition]] = deque(maxlen=2)  # of two branches

    def __call__(self, *states: Tensor, rows: int = 1) -> Condition:
        """One condition (B or 1, L, text_dim), or several of equal length with ``rows`` rows each, one after another.

        It is computed again where the tensors are others than in earlier steps, or have been changed.
        """
        versions = [None if x.is_inference() else x._version for x in states]
        for given, before, condition in self._kept:
            same = len(given) == len(states) and all(a is b for a, b in zip(given, states, strict=True))
            if same and before == versions:
                return condition
        joined = states[0] if len(states) == 1 else torch.cat([x.expand(rows, *x.shape[1:]) for x in states])
        self._kept.append((states, versions, Condition(joined, [])))
        return self._kept[-1][-1]


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

    def look(video: Tensor, tau: float, context: Tensor) -> VideoCache:
        return model(video, batch_tau(tau, video), context, attention="kv_only").cache

    no_video = seeded_noise(seeds, "no video", latents.shape[1:], latents.device)
    # The video's keys and values don't depend on the text, so both are computed once for all steps.
    seen = look(flow.interpolate(no_video, latents, video_tau), video_tau, condition)
    unseen = None if scale <= 1 else look(no_video, 0.0, empty)
    table = token_table(model, latents.device)
    guess: Tensor | None = None

    def field(z: Tensor, tau: Tensor | float) -> Tensor:
        nonlocal guess
        tau = batch_tau(tau, z)
        hidden = model(seen, text=z, text_tau=tau, guess=guess).text
        if unseen is not None:
            without = model(unseen, text=z, text_tau=tau, guess=guess).text
            hidden = without + scale * (hidden - without)
        prediction = model.read_text(hidden, z, tau, table, temperature=temperature)
        guess = prediction.data
        return prediction.velocity

    return field


def video_field(
    model: UniViGUTransformer3DModel, text: Tensor | None, text_tau: float, seeds: list[int], guide: Guide
) -> Field:
    """The video's velocity beside a fixed text: z_v (B, C, T, H, W) and tau_v to u_v (eq 17).

    ``text`` (B, N, d) is at the time ``text_tau``. Guidance moves away from ``guide.negative`` without text. With no
    text at all, this is Wan's velocity.
    """
    no_text = None if text is None else seeded_noise(seeds, "no text", text.shape[1:], text.device)
    conditions = Conditions()
    model.begin_cache()

    def field(z: Tensor, tau: Tensor | float) -> Tensor:
        beside = () if text is None else (text, batch_tau(text_tau, z))
        beside_without = () if no_text is None else (no_text, batch_tau(0.0, z))
        z, tau, states = guide.show(z, batch_tau(tau, z))
        settings = {"attention": "video_only", "image_states": states}
        if guide.scale <= 1:
            with model.in_cache("cond"):
                return model(z, tau, conditions(guide.condition), *beside, **settings).video.float()
        branches = (guide.condition, *beside), (guide.negative, *beside_without)
        # pyrefly: ignore[bad-argument-type]
        seen, without = two_branches(model, z, tau, *branches, conditions=conditions, **settings)
        return guided(seen.video, without.video, guide.scale)

    return field


def joint_field(
    model: UniViGUTransformer3DModel,
    video_shape: Sequence[int],
    text_shape: Sequence[int],
    seeds: list[int],
    guide: Guide,
    text_scale: float,
    temperature: float,
) -> JointField:
    """Both velocities, for video and text in lockstep: (z_v, z_t) and (tau_v, tau_t) to (u_v, u_t) (eq 18).

    ``guide.scale`` is the guidance of the video, away from ``guide.negative`` without text, and ``text_scale`` that of
    the text, away from the text without video.
    """
    device = guide.condition.device
    no_text = seeded_noise(seeds, "no text", text_shape, device)
    no_video = seeded_noise(seeds, "no video", video_shape, device)
    table, conditions = token_table(model, device), Conditions()
    guess: Tensor | None = None

    def field(states: tuple[Tensor, Tensor], taus: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal guess
        video, text = states
        video_tau, text_tau = (batch_tau(tau, video) for tau in taus)
        beside = text, text_tau, *(() if guess is None else (guess,))
        shown, shown_tau, image_states = guide.show(video, video_tau)
        if guide.scale > 1:
            # a guess of zeros is none
            beside_without = no_text, batch_tau(0.0, video), *(0 * given for given in beside[2:])
            branches = (guide.condition, *beside), (guide.negative, *beside_without)
            settings = {"conditions": conditions, "image_states": image_states}
            # pyrefly: ignore[bad-argument-type]
            out, without = two_branches(model, shown, shown_tau, *branches, **settings)
            velocity = guided(out.video, without.video, guide.scale)
        else:
            out = model(shown, shown_tau, conditions(guide.condition), *beside, image_states=image_states)
            velocity = out.video.float()
        hidden = out.text
        if text_scale > 1:
            unseen = no_video, batch_tau(0.0, video), conditions(guide.condition)
            without = model(*unseen, text, text_tau, guess).text
            hidden = without + text_scale * (hidden - without)
        # pyrefly: ignore[bad-argument-type]
        prediction = model.read_text(hidden, text, text_tau, table, temperature=temperature)
        guess = prediction.data
        return velocity, prediction.velocity

    return field


def two_branches(
    model: UniViGUTransformer3DModel,
    z: Tensor,
    tau: Tensor,
    *branches: Sequence[Tensor],
    conditions: Conditions,
    attention: str = "joint",
    image_states: Tensor | None = None,
) -> list[UniViGUOutput]:
    """The model's outputs for the video z (B, C, T, H, W) at tau and the condition and further arguments of branches.

    ``tau`` and ``image_states``, which both branches see, are as the model takes them.

    Small videos are one batch, which costs less than two calls: both branches share what the first block computes of
    the video alone. From `TOGETHER` tokens on, each branch fills a device by itself, and one batch would only need more
    memory.
    """
    shapes = [[argument.shape[1:] for argument in branch] for branch in branches]
    tokens = len(branches) * len(z) * math.prod(model.grid(z.shape[2:]))
    settings = {"attention": attention, "image_states": image_states}
    cached = model.is_cache_enabled and attention == "video_only"
    if tokens > TOGETHER or shapes[0] != shapes[1] or cached:
        outputs = []
        for name, (c, *beside) in zip(("cond", "uncond"), branches, strict=True):
            with model.in_cache(name):
                outputs.append(model(z, tau, conditions(c), *beside, **settings))
        return outputs
    (c, *beside), (c_without, *without) = branches
    both = [torch.cat([x.expand(len(z), *x.shape[1:]) for x in pair]) for pair in zip(beside, without, strict=True)]
    out = model(z, tau, conditions(c, c_without, rows=len(z)), *both, **settings)
    texts = (None, None) if out.text is None else out.text.chunk(2)
    return [UniViGUOutput(video, text) for video, text in zip(out.video.chunk(2), texts, strict=True)]


def guided(seen: Tensor, without: Tensor, scale: float) -> Tensor:
    """A velocity moved away from that of the branch without condition."""
    seen, without = seen.float(), without.float()
    return without + scale * (seen - without)


def token_table(model: UniViGUTransformer3DModel, device: torch.device) -> Tensor:
    """E (V, d) on the device where sampling runs, also if the model's weights wait on another; none if `discrete`."""
    return torch.empty(0, device=device) if model.text_space is None else model.text_space().to(device)


def video_noise(
    count: int, shape: Sequence[int], seed: Seeds | None, generator: Generators, given: Tensor | None, device: Any
) -> tuple[Tensor, list[int]]:
    """The noise (count, *shape) of videos, and a seed for all other noise of each; ``given`` noise is taken as it is.

    Raises BadInputError for both a seed and a generator, and for another number of either, or of noises.
    """
    if seed is not None and generator is not None:
        raise BadInputError("Both a seed and a generator were given: give one of them.")
    if isinstance(generator, Sequence) and len(generator) != count:
        raise BadInputError(f"There are {len(generator)} generators for {count} videos: give one for each.")
    if seed is not None:
        seeds = inputs.list_seeds(seed, count)
        noise = seeded_noise(seeds, "video", shape, device) if given is None else given
    else:
        noise = randn_tensor((count, *shape), generator, device, torch.float32) if given is None else given
        seeds = inputs.draw_seeds(generator, count)
    if len(noise) != count:
        raise BadInputError(f"There are latents of {len(noise)} videos for {count} prompts: give one for each.")
    return noise.to(device, torch.float32), seeds


def seeded_noise(seeds: Sequence[int], name: str, shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal noise (len(seeds), *shape), float32; ``name`` tells the noises of one sample apart."""
    return flow.keyed_noise([(seed, name) for seed in seeds], shape, device)


def batch_tau(tau: Tensor | float, like: Tensor) -> Tensor:
    """One time for the whole batch, in the form the model takes: (B,), float32."""
    return torch.as_tensor(tau, dtype=torch.float32, device=like.device).expand(len(like))
