"""What is seen of a result on the way: its text, and its video as the autoencoder's latents tell without decoding them.

The clean video that is predicted after a step is z + (1 - tau) u, with the mean velocity u of the step (eq 3); of a
straight path it is exact. Its colours come from an affine map of each 3 x 3 latents to RGB, which is fitted once per
autoencoder.
"""

import base64
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from univigu.errors import BadInputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MOST = 200  # moments that are kept of one result
TRACED = 64  # text steps whose tokens are kept
# Against the weights' squares: what a model generates has other latents than the clips that the map is fitted to. With
# the bundled model, the mean error on generated videos is 33 of 255 without it, and 22 with it.
RIDGE = 0.01
LARGEST_TRACE = 1 << 26  # similarities (tokens x vocabulary) up to which tokens are traced: 256 MiB


class Token(NamedTuple):
    """A token of a text on the way: its characters, and the probability of this token given its noisy embedding."""

    text: str
    share: float


class Moment(NamedTuple):
    """The end of a step: the times that text and video have reached (0 before they start), and what they are there."""

    text_tau: float
    video_tau: float
    tokens: list[Token]
    frames: "np.ndarray | None"  # the predicted clean video, uint8 (T, H, W, 3), small


# Called with the number of steps that are done, and what is seen then; the run ends if it returns true.
Progress = Callable[[int, Moment], object]


class Stopped(Exception):  # noqa: N818 (it ends a run early and is no error)
    """The user has stopped the run."""


class LatentColours(NamedTuple):
    """An affine map of normalised latents to RGB in 0..1: of each place and its 8 neighbours to a patch of pixels."""

    weight: "Tensor"  # (9 C + 1, patch x patch x 3); the last row is the bias
    patch: int  # pixels of a place, in both directions
    explained: float  # the share of the colours' variance that it explains, where it was fitted

    def show(self, latents: "Tensor") -> "np.ndarray":
        """Latents (C, T, H', W') as frames uint8 (T, patch H', patch W', 3)."""
        weight = self.weight.to(latents.device)
        colours = _neighbourhoods(latents[None])[0] @ weight[:-1] + weight[-1]
        moments, height, width, _ = colours.shape
        parts = colours.clamp(0, 1).mul(255).round().byte().reshape(moments, height, width, self.patch, self.patch, 3)
        return parts.transpose(2, 3).reshape(moments, height * self.patch, width * self.patch, 3).cpu().numpy()


def _neighbourhoods(latents: "Tensor") -> "Tensor":
    """Each place of latents (B, C, T, H', W') with its neighbours, (B, T, H', W', 9 C); borders are repeated."""
    import torch
    from torch.nn import functional

    *_, height, width = latents.shape
    padded = functional.pad(latents.float(), (1, 1, 1, 1, 0, 0), mode="replicate")
    parts = [padded[..., y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return torch.cat(parts, 1).movedim(1, -1)


def fit_colours(vae: Any, clips: Sequence["np.ndarray"] = ()) -> LatentColours:
    """The map with the least squares of errors on some clips (F, H, W, 3), F = 4k + 1, and on drawn shapes (ridge).

    Each place of the latents is compared with the pixels that it stands for, in as many parts as its channels can tell
    apart. Clips that the autoencoder knows make the colours better; without any, those of a small one are rough.
    """
    import torch

    videos = [torch.from_numpy(clip)[None] for clip in clips]
    pairs = [_pairs(vae, video) for video in (_draw_shapes(), *videos)]
    given, target = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
    given = torch.cat([given, given.new_ones(len(given), 1)], 1)
    penalty = RIDGE * len(given) * torch.ones(given.shape[1], dtype=given.dtype)
    penalty[-1] = 0  # of the bias
    weight = torch.linalg.solve(given.T @ given + penalty.diag(), given.T @ target)
    left = (given @ weight - target).square().sum() / (target - target.mean(0)).square().sum()
    return LatentColours(weight.float(), math.isqrt(target.shape[1] // 3), 1 - float(left))


def _pairs(vae: Any, videos: "Tensor") -> tuple["Tensor", "Tensor"]:
    """The neighbourhoods (N, 9 C) of all places of uint8 videos (B, F, H, W, 3), and their colours.

    The colours are (N, patch x patch x 3).
    """
    import torch
    from torch.nn import functional

    from univigu import wan

    latents, pixels = wan.encode_frames(vae, videos).cpu(), videos.movedim(-1, 1).float() / 255
    count, channels, moments, height, width = latents.shape
    patch = max(1, min(math.isqrt(channels // 3), videos.shape[2] // height))
    size = (height * patch, width * patch)
    means = functional.adaptive_avg_pool3d(pixels[:, :, :1], (1, *size))  # the first frame has its own latents
    if moments > 1:
        after = functional.adaptive_avg_pool3d(pixels[:, :, 1:], (moments - 1, *size))
        means = torch.cat([means, after], 2)
    target = means.reshape(count, 3, moments, height, patch, width, patch).permute(0, 2, 3, 5, 4, 6, 1)
    return _neighbourhoods(latents).reshape(-1, 9 * channels), target.reshape(-1, patch * patch * 3)


def _draw_shapes(side: int = 64, count: int = 24) -> "Tensor":
    """Videos uint8 (B, 9, side, side, 3) of two plain shapes that move over a plain background; the same each time."""
    import torch

    generator = torch.Generator().manual_seed(0)
    videos = torch.rand(count, 1, 1, 1, 3, generator=generator).repeat(1, 9, side, side, 1)
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    for video in videos:
        for is_round in (True, False):
            start, end, colour = torch.rand(3, 3, generator=generator)
            radius = 0.03 + 0.12 * float(torch.rand(1, generator=generator))
            for number, frame in enumerate(video):
                across, down = x - start[0].lerp(end[0], number / 8), y - start[1].lerp(end[1], number / 8)
                away = torch.hypot(across, down) if is_round else torch.maximum(across.abs(), down.abs())
                frame[away < radius] = colour
    return (videos * 255).round().byte()


class Tracer:
    """A callback of the pipeline that keeps what is seen after each step, and ends the run when it is stopped.

    video_steps, text_steps: how many each takes. The text is at tau = i / n after its step i of n.
    """

    inputs = ("latents", "text_latents")

    def __init__(
        self, pipeline: Any, seed: int, progress: Progress, colours: LatentColours, video_steps: int, text_steps: int
    ) -> None:
        from univigu.sampling import seeded_noise, token_table
        from univigu.schedules import video_steps as make_steps
        from univigu.wan import latent_shape

        config, own, device = pipeline.transformer.config, pipeline.config, pipeline._execution_device
        self.trace: list[Moment] = []
        self.seconds = 0.0  # that the previews took
        self.predicted: Tensor | None = None  # the clean video (1, C, T, H', W')
        self._progress, self._colours, self.done = progress, colours, 0
        self._small = text_steps <= TRACED and config.tokenizer_length * config.text_length <= LARGEST_TRACE
        self._every = -(-(video_steps + text_steps) // MOST)
        self._text_steps, self._texts, self._videos = text_steps, 0, 0
        self._text, self._video = None, None
        self._ids: list[int] = []
        self._taus: list[float] = []
        self._table: Any = None
        if text_steps and self._small:
            self._text = seeded_noise([seed], "text", (config.text_length, config.text_latent_dim), device)
            self._table = token_table(pipeline.transformer, device)
        if video_steps:
            shape = latent_shape(pipeline.vae, own.num_frames, own.height, own.width)
            self._video = seeded_noise([seed], "video", shape, device)
            self._taus = make_steps(pipeline.scheduler, video_steps, None, own.shift, device).taus.tolist()

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        self.done += 1
        before = self.trace[-1] if self.trace else Moment(0.0, 0.0, [], None)
        now = self._watch_video(tensors.get("latents"), self._watch_text(pipeline, tensors.get("text_latents"), before))
        if now is not before:
            self.trace.append(now)
        self.seconds += time.perf_counter() - began
        if self._progress(self.done, now):
            raise Stopped
        return {}

    def _watch_video(self, z: Any, now: Moment) -> Moment:
        # in a step of the text alone the video stays as it is
        if self._video is None or z is None or z.shape != self._video.shape or bool((z == self._video).all()):
            return now
        tau, reached = self._taus[self._videos : self._videos + 2]
        self._videos += 1
        velocity = (z - self._video) / (reached - tau)
        self._video, self.predicted = z, z + (1 - reached) * velocity
        shown = self._videos % self._every == 0 or reached == 1
        frames = self._colours.show(self.predicted[0]) if shown else now.frames
        return now._replace(video_tau=reached, frames=frames)

    def _watch_text(self, pipeline: Any, z: Any, now: Moment) -> Moment:
        # in a step of the video alone the text stays as it is; after its last step it only becomes clean
        left = self._texts < self._text_steps
        if self._text is None or z is None or not left or bool((z == self._text).all()):
            return now
        self._text = z
        self._texts += 1
        tau = self._texts / self._text_steps
        return now._replace(text_tau=tau, tokens=self._read(pipeline, z, tau))

    def _read(self, pipeline: Any, z: Any, tau: float) -> list[Token]:
        """The most likely token at each place up to the first EOS, given its noisy embedding alone (eq 8)."""
        import torch

        from univigu import text_space

        weight = text_space.confidence(torch.tensor(tau))
        length = pipeline.transformer.config.tokenizer_length
        shares, ids = (weight * text_space.similarity(z[0], self._table, length)).softmax(-1).max(-1)
        found = ids.tolist()
        end = pipeline.tokenizer.eos_token_id
        self._ids = found[: found.index(end)] if end in found else found
        pairs = zip(self._ids, shares.tolist(), strict=False)  # up to EOS
        return [Token(pipeline.tokenizer.decode([token]), share) for token, share in pairs]

    def text(self, pipeline: Any) -> str:
        """The text as far as it was written, for a run that was stopped."""
        return pipeline.tokenizer.decode(self._ids)

    def video(self, pipeline: Any) -> "np.ndarray":
        """The predicted clean video as frames uint8 (F, H, W, 3), for a run that was stopped.

        Raises `BadInputError` if there is none yet.
        """
        from univigu.outputs import to_frames

        if self.predicted is None:
            raise BadInputError("It was stopped before anything of the video was made, so nothing is kept.")
        return to_frames(pipeline.vae, self.predicted, "uint8")[0]


def picture(frames: "np.ndarray") -> str:
    """Frames uint8 (T, H, W, 3), side by side, as the address of a PNG."""
    import numpy as np
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
