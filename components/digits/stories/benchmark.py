"""Stories as a benchmark: held-out clips whose facts are known, and prompts that can be checked.

``data/heldout-stories.json`` is to this world what ``data/heldout.json`` is to the first one, in the same form:
``python -m components.digits.stories.benchmark data/heldout-stories.json`` writes it again, byte for byte. What a
benchmark must offer is this module's public functions; facts are scored by their kind (``digit:red`` as ``digit``).
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.digits import benchmark, world
from components.digits.stories.reader import read
from components.digits.stories.scenes import colours_of, sample_scene
from components.digits.stories.scenes import render as render_scenes
from components.digits.stories.writer import write_prompt
from components.pipeline.digests import json_digest
from univigu.evaluation.claims import majority_values, single_values

if TYPE_CHECKING:
    from components.pipeline.step import Step

SEED = 20_261_130  # no training uses it
LEAST_STATED = 7  # facts, in a prompt that videos are generated from
LEAST_OPEN = 4  # facts, in a joint prompt
ATTRIBUTES = ("digit", "place", "first", "then", "background", "side", "passes")
HAS_RECOGNISER = True  # that is no part of the model
WORDS = {
    **benchmark.WORDS,
    "majority": "what is right most often when it is said of every clip with a digit of that colour.",
    "generation": f"prompts that state at least {LEAST_STATED} facts",
    "joint": "prompts that leave facts open. What the recogniser sees in the video is compared with what the caption "
    "says, on those facts alone.",
}

Item = Mapping[str, Any]


def build_heldout() -> dict[str, Any]:
    """The whole specification: ``captions`` (id, scans, seed, scene), ``generations`` and ``joint``.

    The last two have (id, prompt, seed); ``scans`` are two indices into `world.heldout_scans`.
    """
    rng = np.random.default_rng(SEED)

    def states_much(scene: Mapping[str, str], prompt: str) -> bool:
        return len(asked(prompt)) >= LEAST_STATED

    def leaves_open(scene: Mapping[str, str], prompt: str) -> bool:
        return len(left_open(prompt, scene)) >= LEAST_OPEN

    counts = benchmark.COUNTS
    items = {
        "captions": [_heldout_clip(rng, number) for number in range(counts["captions"])],
        "generations": [
            {"id": f"generation-{number:03d}", "prompt": _prompt(rng, states_much), "seed": _seed(rng)}
            for number in range(counts["generations"])
        ],
        "joint": [
            {
                "id": f"joint-{number:03d}",
                "prompt": "" if number % benchmark.EMPTY_PROMPT_EVERY == 5 else _prompt(rng, leaves_open),
                "seed": _seed(rng),
            }
            for number in range(counts["joint"])
        ],
    }
    return {"world": "stories", "sha256": json_digest(items), **items}


def _heldout_clip(rng: np.random.Generator, number: int) -> dict[str, Any]:
    scene, (_, digits) = sample_scene(rng), world.heldout_scans()
    wanted = [world.DIGITS.index(scene[f"digit:{colour}"]) for colour in colours_of(scene)]
    scans = [int(rng.choice(np.flatnonzero(digits == digit))) for digit in wanted]
    return {"id": f"heldout-{number:03d}", "scans": scans, "seed": _seed(rng), "scene": scene}


def _prompt(rng: np.random.Generator, accepts: Callable[[Mapping[str, str], str], bool]) -> str:
    while True:
        scene = sample_scene(rng)
        prompt = write_prompt(scene, rng)
        if accepts(scene, prompt):
            return prompt


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def write_heldout(path: Path) -> None:
    """Write the specification again."""
    benchmark.save_heldout(path, build_heldout())


def open_heldout(step: "Step") -> dict[str, Any]:
    """A step's held-out set: the first items of each kind, as many as its profile states."""
    return benchmark.open_heldout(step)


def truth(item: Item) -> dict[str, str]:
    """The facts of a held-out clip."""
    return dict(item["scene"])


def render(items: Sequence[Item], clips: Path | None = None) -> np.ndarray:
    """Held-out clips as uint8 (B, F, H, W, 3); an item's pixels don't depend on other items."""
    scans, _ = world.heldout_scans()
    return np.concatenate([render_scenes([item["scene"]], scans[[item["scans"]]], item["seed"]) for item in items])


def read_text(text: str) -> dict[str, str]:
    """The facts to which a text gives exactly one value."""
    return single_values(read(text).claims)


asked = read_text
majority = majority_values


def left_open(prompt: str, seen: Mapping[str, str]) -> list[str]:
    """The facts of a video that its prompt doesn't state."""
    return sorted(seen.keys() - asked(prompt).keys())


def reader(pipeline: Any) -> Callable[[np.ndarray, Any], list[dict[str, str]]]:
    """Load the recogniser, which reads clips independently of the model and its texts."""
    return lambda frames, texts: recognise(frames)


def recognise(frames: np.ndarray) -> list[dict[str, str]]:
    """What the recogniser sees in uint8 clips (B, F, H, W, 3); it is trained on other scans than the held-out ones."""
    from components.digits.stories import recogniser

    return recogniser.read(recogniser.load_recogniser(), frames)


if __name__ == "__main__":
    write_heldout(Path(sys.argv[1]))
