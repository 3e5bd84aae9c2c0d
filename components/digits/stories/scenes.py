"""The scenes: two digits of different colours, each with a start and an action in each half of the clip.

A scene is a mapping of facts: ``background``, for each of the two colours ``digit:COLOUR``, ``place:COLOUR`` (where it
starts, or where it arrives if it comes in from outside), ``first:COLOUR`` and ``then:COLOUR`` (its actions in frames 0
to 4 and 4 to 8; none while it is outside), and where they hold ``passes`` ("red above blue", while one moves) and
``side`` ("red left of blue", at the start, in one row or column). The last two follow from the others.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from components.digits import world

CELL = 10.0  # pixels between neighbouring places
DIGIT_SIZE = 11
JITTER = 0.5
OUTSIDE = 2.2  # cells from the grid's middle: out of the frame, ink and jitter included
LEAST_GAP = 0.9  # cells between two digits, along one axis, in every frame
PASSING_SHARE = 0.35
COLOURS = tuple(world.COLOURS)
EDGES = {"left": "left", "right": "right", "up": "top", "down": "bottom"}  # where a direction leads out
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
KIND_WEIGHTS = {"inside": 0.5, "leaves": 0.25, "enters": 0.25}

Scene = Mapping[str, str]


class Track(NamedTuple):
    """The facts about one digit's movement, and its position at frames 0, 4 and 8 in cells from the grid's middle."""

    place: str
    first: str | None
    then: str | None
    path: tuple[tuple[float, float], ...]


@cache
def tracks() -> Mapping[str, tuple[Track, ...]]:
    """All movements of one digit, by kind: it stays in the frame, leaves it, or enters it."""
    inside, leaves, enters = [], [], []
    for place in world.PLACES:
        start = _cell(place)
        for first, middle in _actions(start):
            inside += [Track(place, first, then, (start, middle, end)) for then, end in _actions(middle)]
            leaves += [Track(place, first, then, (start, middle, end)) for then, end in _exits(middle)]
        leaves += [Track(place, first, None, (start, end, end)) for first, end in _exits(start)]
        for enter, outside in _entries(start):
            enters += [Track(place, enter, then, (outside, start, end)) for then, end in _actions(start)]
            enters.append(Track(place, None, enter, (outside, outside, start)))
    return {"inside": tuple(inside), "leaves": tuple(leaves), "enters": tuple(enters)}


Point = tuple[float, float]


def _cell(place: str) -> Point:
    row, column = divmod(world.PLACES.index(place), 3)
    return float(column - 1), float(row - 1)


def _actions(at: Point) -> list[tuple[str, Point]]:
    """What a digit at a cell can do for half of the clip without leaving the grid, and where it is then."""
    found = [("stands", at)]
    for direction, (dx, dy) in world.STEPS.items():
        for speed, cells in world.CELLS.items():
            to = (at[0] + dx * cells, at[1] + dy * cells)
            if max(map(abs, to)) <= 1:
                found.append((f"goes {direction} {speed}", to))
    return found


def _exits(at: Point) -> list[tuple[str, Point]]:
    """The ways out of the frame from a cell that are at most two cells long."""
    found = []
    for direction, (dx, dy) in world.STEPS.items():
        if at[0] * dx + at[1] * dy >= 0:
            found.append((f"leaves {EDGES[direction]}", (OUTSIDE * dx if dx else at[0], OUTSIDE * dy if dy else at[1])))
    return found


def _entries(at: Point) -> list[tuple[str, Point]]:
    """The ways into the frame that end at a cell: each is an exit in reverse."""
    return [(f"enters {action.removeprefix('leaves ')}", outside) for action, outside in _exits(at)]


# --- pairs of movements ----------------------------------------------------------------------------------------------


class _Pairs(NamedTuple):
    tracks: tuple[Track, ...]
    kinds: np.ndarray  # (T) index into KIND_WEIGHTS
    apart: np.ndarray  # (T, T) whether the two never touch, and anything moves
    passing: np.ndarray  # (T, T) whether one passes the other, once


@cache
def _pairs() -> _Pairs:
    every = tuple(track for kind in KIND_WEIGHTS for track in tracks()[kind])
    kinds = np.repeat(np.arange(len(KIND_WEIGHTS)), [len(tracks()[kind]) for kind in KIND_WEIGHTS])
    paths = np.array([track.path for track in every], np.float32)  # (T, 3, 2)
    frames = positions(paths)
    apart = np.ones((len(every), len(every)), bool)
    for at in range(world.FRAMES):
        gap = np.abs(frames[:, None, at] - frames[None, :, at]).max(-1)
        seen = np.abs(frames[:, at]).max(-1) < OUTSIDE - 0.01
        apart &= (gap >= LEAST_GAP) | ~(seen[:, None] & seen[None])
    still = np.array([track.first == track.then == "stands" for track in every])
    apart &= ~(still[:, None] & still[None])
    for half in ("first", "then"):  # a half without any digit shows nothing
        away = np.array([getattr(track, half) is None for track in every])
        apart &= ~(away[:, None] & away[None])
    count = sum(_passes(paths[:, None], paths[None], half, axis) for half in (0, 1) for axis in (0, 1))
    return _Pairs(every, kinds, apart & (count < 2), apart & (count == 1))


@cache
def _fitting(kinds: tuple[int, int] | None) -> np.ndarray:
    """The flat indices of the pairs of two kinds of movement; None: of those that pass each other."""
    pairs = _pairs()
    if kinds is None:
        return np.flatnonzero(pairs.passing)
    return np.flatnonzero(pairs.apart & (pairs.kinds == kinds[0])[:, None] & (pairs.kinds == kinds[1])[None])


def _passes(ours: np.ndarray, theirs: np.ndarray, half: int, axis: int) -> np.ndarray:
    """Whether two paths (..., 3, 2) pass each other along an axis in a half of the clip, both in the frame for it."""
    before, after = ours[..., half, :] - theirs[..., half, :], ours[..., half + 1, :] - theirs[..., half + 1, :]
    moves = [np.abs(path[..., half, :] - path[..., half + 1, :]).max(-1) > 0 for path in (ours, theirs)]
    # one that waits outside, or has left, is not passed
    seen = [np.abs(path[..., half, :]).max(-1) < OUTSIDE - 0.01 for path in (ours, theirs)]
    shown = (moves[0] | seen[0]) & (moves[1] | seen[1])
    return (before[..., axis] * after[..., axis] < 0) & (before[..., 1 - axis] * after[..., 1 - axis] > 0) & shown


def positions(paths: np.ndarray) -> np.ndarray:
    """Paths (..., 3, 2) -> the position in each frame (..., F, 2), at constant speed in each half."""
    times = np.linspace(0, 2, world.FRAMES, dtype=np.float32)[:, None]
    early, late = np.clip(times, 0, 1), np.clip(times - 1, 0, 1)
    start, middle, end = (paths[..., i : i + 1, :] for i in range(3))
    return start + (middle - start) * early + (end - middle) * late


def sample_scene(rng: np.random.Generator) -> dict[str, str]:
    """Draw a scene: looks are uniform; a good third of the scenes have one digit pass the other."""
    passing = rng.random() < PASSING_SHARE
    kinds = None if passing else tuple(rng.choice(len(KIND_WEIGHTS), 2, p=list(KIND_WEIGHTS.values())).tolist())
    fits, every = _fitting(kinds), _pairs().tracks
    moving = [every[i] for i in divmod(int(fits[rng.integers(len(fits))]), len(every))]
    scene = {"background": str(rng.choice(tuple(world.BACKGROUNDS)))}
    for colour, track in zip(rng.permutation(COLOURS)[:2], moving, strict=True):
        scene |= {f"digit:{colour}": str(rng.choice(world.DIGITS)), f"place:{colour}": track.place}
        scene |= {f"{name}:{colour}": action for name in ("first", "then") if (action := getattr(track, name))}
    return scene | relations(scene)


# --- what follows from a scene ---------------------------------------------------------------------------------------


def colours_of(scene: Scene) -> list[str]:
    """The colours of a scene's digits, in its order."""
    return [name.partition(":")[2] for name in scene if name.startswith("digit:")]


@cache
def questions() -> Mapping[str, tuple[str, ...]]:
    """The facts that don't follow from others, for every colour, and their possible values."""
    found = {"background": tuple(world.BACKGROUNDS)}
    every = [track for kind in tracks().values() for track in kind]
    for colour in COLOURS:
        found |= {f"digit:{colour}": world.DIGITS, f"place:{colour}": world.PLACES}
        for name in ("first", "then"):
            found[f"{name}:{colour}"] = tuple(sorted({getattr(track, name) for track in every} - {None}))
    return found


@cache
def _paths() -> Mapping[tuple[str | None, ...], tuple[Point, ...]]:
    return {track[:3]: track.path for kind in tracks().values() for track in kind}


def path_of(scene: Scene, colour: str) -> tuple[Point, ...]:
    """The positions of a digit at frames 0, 4 and 8, in cells from the grid's middle."""
    return _paths()[_movement(scene, colour)]


def _movement(scene: Scene, colour: str) -> tuple[str | None, ...]:
    return tuple(scene.get(f"{name}:{colour}") for name in ("place", "first", "then"))


def passing_half(scene: Scene) -> int | None:
    """The half of the clip, 0 or 1, in which one digit passes the other; None if none does."""
    ours, theirs = (np.array(path_of(scene, colour)) for colour in colours_of(scene))
    return next((half for half in (0, 1) for axis in (0, 1) if _passes(ours, theirs, half, axis)), None)


def exists(scene: Scene) -> bool:
    """Whether there are two digits, and each moves as a digit can."""
    colours = colours_of(scene)
    return len(colours) == 2 and all(_movement(scene, colour) in _paths() for colour in colours)


def relations(scene: Scene) -> dict[str, str]:
    """The facts ``passes`` and ``side`` of a scene, where they hold; none without two digits that move as they can."""
    found, colours = {}, colours_of(scene)
    if not exists(scene):
        return found
    one, other = colours
    ours, theirs = (np.array(path_of(scene, colour)) for colour in colours)
    if max(np.abs(ours[0]).max(), np.abs(theirs[0]).max()) <= 1 and (ours[0] == theirs[0]).any():
        axis = int(ours[0][0] == theirs[0][0])  # the axis along which they differ
        found["side"] = relation(one, "left of" if axis == 0 else "above", other, ours[0][axis] > theirs[0][axis])
    if (half := passing_half(scene)) is not None:
        axis = next(axis for axis in (0, 1) if _passes(ours, theirs, half, axis))  # along which they pass
        swapped = ours[half][1 - axis] > theirs[half][1 - axis]
        found["passes"] = relation(one, "above" if axis == 0 else "left of", other, swapped)
    return found


def relation(one: str, word: str, other: str, swapped: bool = False) -> str:
    """A relation as the value of a fact: only ``above`` and ``left of``, their opposites by exchanging the two."""
    turned = {"below": "above", "right of": "left of"}
    first, second = (other, one) if swapped != (word in turned) else (one, other)
    return f"{first} {turned.get(word, word)} {second}"


# --- pixels ----------------------------------------------------------------------------------------------------------


def draw_scans(scenes: Sequence[Scene], source: tuple[np.ndarray, np.ndarray], seed: int) -> np.ndarray:
    """Scans (B, 2, 8, 8) of each scene's digits, drawn from `source` = (scans, digits)."""
    wanted = [{"digit": scene[f"digit:{colour}"]} for scene in scenes for colour in colours_of(scene)]
    return world.draw_scans(wanted, source, seed).reshape(len(scenes), 2, 8, 8)


def render(scenes: Sequence[Scene], scans: np.ndarray, seed: int, frames: slice = slice(None)) -> np.ndarray:
    """Render clips: scenes (B), scans (B, 2, 8, 8) with values 0..16 -> uint8 (B, F, H, W, 3), as `world.render`."""
    import torch
    import torch.nn.functional as F

    count, size = len(scenes), world.SIZE
    rng = np.random.default_rng(seed)
    shift = rng.uniform(-JITTER, JITTER, (count, 2, 1, 2)).astype(np.float32)
    paths = np.array([[path_of(scene, colour) for colour in colours_of(scene)] for scene in scenes], np.float32)
    centres = (size / 2 + CELL * positions(paths) + shift)[:, :, frames]  # (B, 2, F, 2)
    pixels = np.arange(size, dtype=np.float32) + 0.5
    grid = torch.from_numpy((pixels[:, None] - centres[..., None, :]) / (DIGIT_SIZE / 2))  # (B, 2, F, SIZE, 2)
    shape = (*grid.shape[:3], size, size)
    xy = torch.stack([grid[..., None, :, 0].expand(shape), grid[..., :, None, 1].expand(shape)], dim=-1)
    ink = torch.from_numpy(np.ascontiguousarray(scans, np.float32) / 16.0).flatten(0, 1)[:, None]
    ink = F.interpolate(ink, size=(16, 16), mode="bicubic", align_corners=False)
    ink = ink.repeat_interleave(shape[2], 0)
    alpha = F.grid_sample(ink, xy.flatten(0, 2), mode="bilinear", padding_mode="zeros", align_corners=False)
    alpha = (alpha * 1.3 - 0.1).clamp(0, 1).reshape(*shape, 1)
    clips = torch.tensor([world.BACKGROUNDS[s["background"]] for s in scenes], dtype=torch.float32)
    clips = clips[:, None, None, None].expand(count, shape[2], size, size, 3)
    for index in (0, 1):
        colour = torch.tensor([world.COLOURS[colours_of(s)[index]] for s in scenes], dtype=torch.float32)
        clips = clips + (colour[:, None, None, None] - clips) * alpha[:, index]
    return clips.round().to(torch.uint8).numpy()
