"""Two registered versions on the same prompts and seeds, shown without their names until there is a vote."""

import secrets
from collections.abc import Callable, Sequence
from typing import NamedTuple

from components.cli import chosen_model
from components.cli.studio.sampling import LARGEST_SEED, LONGEST_PROMPT
from components.cli.studio.videos import pair_video, write_mp4
from components.cli.studio.work import Studio
from components.registry import votes
from components.registry.votes import Pair
from components.tracking import actor
from univigu.errors import BadInputError

MOST_PROMPTS = 12


class Shown(NamedTuple):
    """A pair, and the names of its videos, which say nothing about the versions."""

    pair: Pair
    left: str
    right: str


def make_pairs(
    studio: Studio, name: str, first: int, second: int, prompts: str, seed: int, progress: Callable[[int], object]
) -> list[Shown]:
    """A pair of videos for each line of `prompts`; one version at a time is in memory."""
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if first == second:
        raise BadInputError("Both are the same version; choose two.")
    if not 1 <= len(lines) <= MOST_PROMPTS:
        raise BadInputError(f"There are {len(lines)} prompts; write 1 to {MOST_PROMPTS}, each on a line of its own.")
    if max(map(len, lines)) > LONGEST_PROMPT:
        raise BadInputError(f"A prompt has at most {LONGEST_PROMPT} characters; shorten it.")
    if not 0 <= seed <= LARGEST_SEED - len(lines):
        raise BadInputError(f"The seed is {seed}; give a whole number from 0 to {LARGEST_SEED - len(lines)}.")
    videos = {}
    for turn, version in enumerate((first, second)):
        done = turn * len(lines)
        videos[version] = _generate(studio, name, version, lines, seed, lambda n, done=done: progress(done + n))
    pairs = [Pair(first, second, line, seed + n, secrets.randbits(32)) for n, line in enumerate(lines)]
    return [Shown(pair, *(videos[version][n] for version in pair.sides())) for n, pair in enumerate(pairs)]


def _generate(
    studio: Studio, name: str, version: int, prompts: Sequence[str], seed: int, progress: Callable[[int], object]
) -> list[str]:
    """The names of a version's videos of some prompts, with seeds that count up."""
    from components.pipeline.lean_imports import import_models

    with studio.store:  # both change global variables
        import_models()
        folder = chosen_model.find_model(f"models:/{name}/{version}", name, studio.root)
    pipeline, names = chosen_model.load(folder), []
    for number, prompt in enumerate(prompts):
        (frames,) = pipeline.generate(prompt, seed=[seed + number])
        progress(number + 1)
        names.append(secrets.token_hex(16))
        path = pair_video(studio, names[-1])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(path, frames, pipeline.config.fps)
    return names


def vote(studio: Studio, name: str, pair: Pair, choice: str) -> str:
    """Record a vote; returns which version was on which side, and what was chosen, in a sentence."""
    with studio.store:
        chosen = votes.record(name, pair, choice, actor(), studio.root)
    left, right = pair.sides()
    said = f"You chose version {chosen}" if chosen else "You chose neither"
    return f"{said}: version {left} was on the left, version {right} on the right. The vote is recorded."
