"""Measure the facts of a clip from its frames alone, with a confidence for each; no learned video network.

The two colours with the most pixels are the digits. Every pixel is split into ground and these two inks; the path of
each ink's centre is compared with all movements that exist, and its shape with the training scans, as `digits.measure`
does for larger digits.
"""

from collections.abc import Mapping
from functools import cache

import numpy as np

from components.digits import measure as first_world
from components.digits import world
from components.digits.measure import Measurement
from components.digits.stories import scenes
from univigu.errors import BadInputError

SOLID = 70.0  # RGB distance within which a pixel is of a colour
VISIBLE = 0.08  # of a digit's most ink in a frame; with less it is outside
HIDDEN_COST = 2.0  # squared cells, for ink where a movement shows none, or the reverse
PARTLY = 0.2  # weight of frames in which a digit is only partly in the frame
SETTLED = 0.08  # squared cells: by this much the best movement must beat the next one for full confidence

Facts = dict[str, Measurement]


def measure(frames: np.ndarray) -> list[Facts]:
    """Clips uint8 (B, F, H, W, 3) -> for each, the facts of `scenes` but for relations, of the two colours seen most.

    An action that is not there (a digit that is outside) has the value "". Raises `BadInputError` for another shape.
    """
    if frames.dtype != np.uint8 or frames.shape[1:] != (world.FRAMES, world.SIZE, world.SIZE, 3):
        raise BadInputError(f"Clips to measure are uint8 (B, 9, 32, 32, 3), not {frames.dtype} {frames.shape}.")
    return [_measure(clip) for clip in frames.astype(np.float32)]


def facts_of(seen: Mapping[str, Measurement]) -> dict[str, str]:
    """The measured scene, with the relations that follow."""
    facts = {name: found.value for name, found in seen.items() if found.value}
    return facts | scenes.relations(facts)


def _measure(clip: np.ndarray) -> Facts:
    border = np.concatenate([clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]], axis=1).reshape(-1, 3)
    ground = np.median(border, axis=0)
    names = tuple(world.BACKGROUNDS)
    away = np.linalg.norm(ground - np.array(list(world.BACKGROUNDS.values()), np.float32), axis=1)
    facts = {"background": Measurement(names[away.argmin()], _margin(away))}

    palette = np.array([world.COLOURS[colour] for colour in scenes.COLOURS], np.float32)
    distance = np.linalg.norm(clip[..., None, :] - palette, axis=-1)
    nearest = distance.argmin(-1)
    mine = distance.min(-1) < np.minimum(SOLID, np.linalg.norm(clip - ground, axis=-1))
    counts = np.bincount(nearest[mine], minlength=len(palette))
    chosen = np.argsort(-counts, kind="stable")[:2]
    third = np.sort(counts)[-3]
    inks = _split(clip, ground, palette[chosen])
    for index, ink in zip(chosen, inks, strict=True):
        sure = float(counts[index] > 0) * (1 - third / max(1, counts[index]))
        facts |= _follow(ink, scenes.COLOURS[index], max(0.0, sure))
    return facts


def _margin(costs: np.ndarray) -> float:
    best, second = np.sort(costs)[:2]
    return float(1 - best / max(second, 1e-6))


def _split(clip: np.ndarray, ground: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Ink (2, F, H, W) of the two colours, 0 to 1: the least-squares mixture of ground and both."""
    base = (colours - ground).T  # (3, 2)
    shares = (clip - ground) @ np.linalg.pinv(base).T.astype(np.float32)
    shares = np.clip(shares, 0, 1)
    return np.where(shares > 0.25, shares, 0).transpose(3, 0, 1, 2)


@cache
def _movements() -> tuple[tuple[scenes.Track, ...], np.ndarray]:
    every = tuple(track for kind in scenes.tracks().values() for track in kind)
    return every, scenes.positions(np.array([track.path for track in every], np.float32))


def _follow(ink: np.ndarray, colour: str, sure: float) -> Facts:
    """What the digit of a colour is and does, from its ink (F, H, W); sure: that there is a digit of this colour."""
    mass = ink.sum((1, 2))
    seen = mass > VISIBLE * max(mass.max(), 1e-6)
    centres = first_world._centres(ink[None])[0]
    at = (centres - world.SIZE / 2) / scenes.CELL  # (F, 2) in cells
    every, where = _movements()
    depth = np.abs(where).max(-1)  # (T, F)
    shown = depth < scenes.OUTSIDE - 0.25
    weight = np.where(depth <= 1.05, 1.0, PARTLY)
    away = ((where - at) ** 2).sum(-1) * weight
    cost = np.where(shown & seen, away, np.where(shown == seen, 0.0, HIDDEN_COST * weight)).mean(1)
    best = int(cost.argmin())

    def movement(part: str) -> Measurement:
        value = getattr(every[best], part)
        other = np.array([getattr(track, part) != value for track in every])
        gap = min(1.0, float(cost[other].min() - cost[best]) / SETTLED)
        return Measurement(value or "", gap * min(1.0, sure * 2))

    digit = _read_digit(ink, centres, seen & (depth[best] <= 1.05))
    return {
        f"digit:{colour}": Measurement(digit.value, digit.confidence * min(1.0, sure * 2)),
        **{f"{part}:{colour}": movement(part) for part in ("place", "first", "then")},
    }


def _read_digit(ink: np.ndarray, centres: np.ndarray, whole: np.ndarray) -> Measurement:
    """The vote of the nearest training scans, on frames in which the digit is whole."""
    import torch
    import torch.nn.functional as F

    if not whole.any():
        return Measurement(world.DIGITS[0], 0.0)
    scale = world.DIGIT_SIZE / scenes.DIGIT_SIZE
    large = F.interpolate(torch.from_numpy(ink[whole].astype(np.float32))[None], scale_factor=scale, mode="bilinear")
    cut = first_world._cut_out(large.numpy(), (centres[whole] * scale)[None].astype(np.float32))
    templates, labels, _ = first_world._templates()
    gaps, near = torch.cdist(torch.from_numpy(cut).double(), templates).topk(first_world.NEIGHBOURS, largest=False)
    votes = np.zeros(10)
    np.add.at(votes, labels[near[0].numpy()], 1 / np.maximum(gaps[0].numpy(), 1e-3))
    return Measurement(world.DIGITS[votes.argmax()], float(votes.max() / votes.sum()))
