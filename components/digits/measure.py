"""Measure every attribute of a clip from its frames alone, with a confidence for each.

No learned video network: border colour, distance from it, the path of the ink's centre, and for the digit a nearest
neighbour vote among the training scans.
"""

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from components.digits import world
from univigu.errors import BadInputError

if TYPE_CHECKING:
    import torch

NEIGHBOURS = 5
CROP = 18  # pixels: a digit's box with room for jitter


class Measurement(NamedTuple):
    """The measured value of an attribute, and its confidence from 0 to 1."""

    value: str
    confidence: float


def _margin(distances: np.ndarray) -> np.ndarray:
    """Confidence (B) from distances to the candidates (B, n): 0 if the two nearest are equally far, 1 at distance 0."""
    nearest = np.sort(distances, axis=1)[:, :2]
    return 1 - nearest[:, 0] / np.maximum(nearest[:, 1], 1e-6)


def _named(names: tuple[str, ...], distances: np.ndarray) -> list[Measurement]:
    best, sure = distances.argmin(1), _margin(distances)
    return [Measurement(names[i], float(c)) for i, c in zip(best, sure, strict=True)]


def _cut_out(ink: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Ink (B, F, H, W) around centres (B, F, 2), averaged over frames and drawn on 8x8 cells: (B, 64), unit norm."""
    import torch
    import torch.nn.functional as F

    pixels = (np.arange(CROP, dtype=np.float32) + 0.5 - CROP / 2)[None, None]
    x = (centres[..., :1] + pixels) / (ink.shape[-1] / 2) - 1
    y = (centres[..., 1:] + pixels) / (ink.shape[-2] / 2) - 1
    shape = (*centres.shape[:2], CROP, CROP)
    grid = np.stack([np.broadcast_to(x[:, :, None, :], shape), np.broadcast_to(y[:, :, :, None], shape)], axis=-1)
    cut = F.grid_sample(
        torch.from_numpy(ink).flatten(0, 1)[:, None], torch.from_numpy(grid).flatten(0, 1), align_corners=False
    )
    cut = cut.reshape(*shape).mean(1)
    cells = F.interpolate(cut[:, None], size=(9, 9), mode="area").flatten(1).numpy()
    return cells / np.maximum(np.linalg.norm(cells, axis=1, keepdims=True), 1e-6)


def _centres(ink: np.ndarray) -> np.ndarray:
    """Centres of mass (B, F, 2) in pixels of ink (B, F, H, W)."""
    mass = np.maximum(ink.sum((2, 3)), 1e-6)
    along = np.arange(ink.shape[-1], dtype=np.float32) + 0.5
    down = np.arange(ink.shape[-2], dtype=np.float32) + 0.5
    return np.stack([(ink.sum(2) * along).sum(2) / mass, (ink.sum(3) * down).sum(2) / mass], axis=-1)


@cache
def _templates() -> tuple["torch.Tensor", np.ndarray, np.ndarray]:
    """Training scans as cut-outs, their digits, and each digit's mean offset of the box's centre from the ink's."""
    import torch

    scans, digits = world.train_scans()
    sample = {"colour": "red", "background": "black", "start": "centre", "end": "centre"}
    clips = world.render([sample] * len(scans), scans, 0, slice(0, 1))
    ink = _ink(clips.astype(np.float32))[0]
    centres = _centres(ink)
    offset = world.SIZE / 2 - centres[:, 0]
    means = np.stack([offset[digits == d].mean(0) for d in range(10)])
    return torch.from_numpy(_cut_out(ink, centres)).double(), digits, means


def _ink(clips: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames (B, F, H, W, 3) -> ink 0..1 (B, F, H, W), background colour (B, 3), ink colour (B, 3)."""
    import torch
    import torch.nn.functional as F

    border = np.concatenate(
        [clips[:, :, 0], clips[:, :, -1], clips[:, :, :, 0], clips[:, :, :, -1]], axis=2
    )  # (B, F, 4*SIZE, 3)
    ground = np.median(border.reshape(len(clips), -1, 3), axis=1)
    away = np.linalg.norm(clips - ground[:, None, None, None], axis=-1)
    # Strokes are wider than noise and smudges: what counts as ink must stand out together with its neighbours.
    around = F.avg_pool2d(torch.from_numpy(away), 3, 1, 1).numpy()
    strong = np.maximum(np.quantile(around.reshape(len(clips), -1), 0.99, axis=1), 24.0)[:, None, None, None]
    ink = np.where(around < 0.3 * strong, 0, np.clip(away / strong, 0, 1)).astype(np.float32)
    solid = (ink > 0.85)[..., None]
    colour = (clips * solid).sum((1, 2, 3)) / np.maximum(solid.sum((1, 2, 3)), 1)
    return ink, ground, colour


def measure(frames: np.ndarray) -> list[dict[str, Measurement]]:
    """Clips uint8 (B, F, H, W, 3) -> for each, every attribute's value and confidence.

    A clip without ink gets confidence 0 for all that needs ink. Raises `BadInputError` for another shape or type.
    """
    if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[-1] != 3 or frames.shape[1] < 2:
        raise BadInputError(f"Clips to measure are uint8 (B, F > 1, H, W, 3), not {frames.dtype} {frames.shape}.")
    return [row for i in range(0, len(frames), 64) for row in _measure(frames[i : i + 64].astype(np.float32))]


def _measure(clips: np.ndarray) -> list[dict[str, Measurement]]:
    import torch

    ink, ground, colour = _ink(clips)
    centres = _centres(ink)
    visible = (ink.sum((2, 3)) > 4.0).all(1)

    def distances(points: np.ndarray, targets: list) -> np.ndarray:
        return np.linalg.norm(points[:, None] - np.array(targets, np.float32)[None], axis=-1)

    backgrounds = _named(world.ATTRIBUTES["background"], distances(ground, list(world.BACKGROUNDS.values())))
    # What the colour is relative to the ground matters less than which ink it is: thin strokes are mixed with ground.
    colours = _named(world.ATTRIBUTES["colour"], distances(colour, list(world.COLOURS.values())))
    templates, labels, offsets = _templates()
    distances_to_scans = torch.cdist(torch.from_numpy(_cut_out(ink, centres)).double(), templates)
    gaps, neighbours = (found.numpy() for found in distances_to_scans.topk(NEIGHBOURS, largest=False))
    votes = np.zeros((len(clips), 10))
    for digit in range(10):
        votes[:, digit] = ((labels[neighbours] == digit) / np.maximum(gaps, 1e-3)).sum(1)
    votes /= votes.sum(1, keepdims=True)
    digits = [Measurement(world.DIGITS[row.argmax()], float(row.max())) for row in votes]
    # A straight line through the path is steadier than its two ends; the box's centre is what the places are about.
    times = np.linspace(-0.5, 0.5, clips.shape[1], dtype=np.float32)
    slope = (centres * times[None, :, None]).sum(1) / (times**2).sum()
    middle = centres.mean(1) + offsets[votes.argmax(1)]
    scale = world.SIZE / clips.shape[3]
    path = slope * scale
    targets = {
        (direction, speed): np.array(step) * world.CELL * world.CELLS[speed]
        for direction, step in world.STEPS.items()
        for speed in world.CELLS
    }
    to_motion = distances(path, list(targets.values()))
    best = [list(targets)[i] for i in to_motion.argmin(1)]
    by_direction = to_motion.reshape(len(clips), len(world.STEPS), len(world.CELLS)).min(2)
    directions = _named(tuple(world.STEPS), by_direction)
    speeds = _named(
        tuple(world.CELLS),
        np.abs(np.linalg.norm(path, axis=1)[:, None] - world.CELL * np.array(list(world.CELLS.values()))[None]),
    )
    # Start and end are read together: among the motions of this direction and speed, the one whose middle is nearest.
    rows = []
    for i, (direction, speed) in enumerate(best):
        options = [m for m in world.motions() if m["direction"] == direction and m["speed"] == speed]
        middles = [(np.add(world.place_centre(m["start"]), world.place_centre(m["end"])) / 2) for m in options]
        gap = np.linalg.norm(np.array(middles) - middle[i] * scale, axis=1)[None]
        chosen, sure = options[int(gap.argmin())], float(_margin(gap)[0])
        row = {
            "digit": digits[i],
            "colour": colours[i],
            "background": backgrounds[i],
            "direction": Measurement(direction, directions[i].confidence),
            "speed": Measurement(speed, speeds[i].confidence),
            "start": Measurement(chosen["start"], sure),
            "end": Measurement(chosen["end"], sure),
        }
        if not visible[i]:
            row = {n: m if n == "background" else Measurement(m.value, 0.0) for n, m in row.items()}
        rows.append(row)
    return rows
