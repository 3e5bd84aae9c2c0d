"""The clips of a probe: the evaluation's own, other handwriting or scenes, and other lengths and sizes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from components.bench.study.arms import Block, Probe
from univigu.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

SEED = 20_270_101  # of redrawn scenes; neither training nor the held-out set uses it

Item = Mapping[str, Any]


def draw_items(probe: Probe, heldout: Sequence[Item]) -> list[Item]:
    """The items whose clips a probe captions, as many as the held-out ones.

    Those of redrawn scenes are the same for equal `only`, whatever else the probe changes. Raises `ConfigError` where
    the held-out items are not the toy dataset's, of which alone other clips can be drawn.
    """
    if probe.clips == "heldout":
        return list(heldout)
    if not all({"attributes", "scan", "seed"} <= item.keys() for item in heldout):
        raise ConfigError(f"The probe '{probe.name}' has `clips: {probe.clips}`, which needs the benchmark digits.")
    return [dict(item) for item in heldout] if probe.clips == "seen" else redraw(probe.only, len(heldout))


def redraw(only: Block, count: int) -> list[Item]:
    """Scenes of a seed of their own, in held-out handwriting; `only` states the values that an attribute may have.

    Raises `BadInputError` for a value that the world doesn't have.
    """
    import numpy as np

    from components.digits import world

    rng = np.random.default_rng(SEED)
    _, digits = world.heldout_scans()
    items: list[Item] = []
    for number in range(count):
        fixed = {name: str(rng.choice(values)) for name, values in sorted(only.items())}
        attributes = world.sample_attributes(rng, **fixed)
        scan = int(rng.choice(np.flatnonzero(digits == world.DIGITS.index(attributes["digit"]))))
        seed = int(rng.integers(2**31))
        items.append({"id": f"redrawn-{number:03d}", "scan": scan, "seed": seed, "attributes": attributes})
    return items


def render_clips(probe: Probe, items: Sequence[Item], benchmark: ModuleType, clips: Path) -> "np.ndarray":
    """The clips of a probe's items, uint8 (B, F, H, W, 3). clips: the output of synthesize-videos."""
    if probe.clips == "seen":
        from components.digits import world

        source = world.train_scans()
        shown = [
            world.render(
                [item["attributes"]], world.draw_scans([item["attributes"]], source, item["seed"]), item["seed"]
            )
            for item in items
        ]
        return resample(_joined(shown), probe.frames, probe.size)
    return resample(benchmark.render(items, clips), probe.frames, probe.size)


def resample(frames: "np.ndarray", count: int | None, size: int | None) -> "np.ndarray":
    """Clips uint8 (B, F, H, W, 3) with `count` frames, and sides of `size` pixels; None leaves them.

    Fewer frames are taken evenly, the first and the last among them; of one, the middle one. For more, the last frame
    stays. Sides are averaged or interpolated (torch's antialiased bicubic filter).
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    length = frames.shape[1]
    if count and count < length:
        at = np.linspace(0, length - 1, count).round().astype(int) if count > 1 else np.array([length // 2])
        frames = frames[:, at]
    elif count:
        frames = np.concatenate([frames, np.repeat(frames[:, -1:], count - length, axis=1)], axis=1)
    if size and frames.shape[2:4] != (size, size):
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).flatten(0, 1).movedim(-1, 1).float()
        pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
        pixels = pixels.round().clamp(0, 255).to(torch.uint8).movedim(1, -1)
        frames = pixels.unflatten(0, frames.shape[:2]).numpy()
    return frames


def _joined(clips: Sequence["np.ndarray"]) -> "np.ndarray":
    import numpy as np

    return np.concatenate(clips)
