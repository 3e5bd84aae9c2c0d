"""The digits dataset as a benchmark: held-out clips with known attributes, and prompts that can be checked.

``data/heldout.json`` lists every item and carries its own SHA-256, so a score names exactly what it was measured on.
It is committed; ``python -m components.digits.benchmark data/heldout.json`` writes it again, byte for byte. An
evaluation takes the first items of each kind. What a benchmark must offer is this module's public functions.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.digits import world
from components.pipeline.digests import json_digest
from univigu.errors import ConfigError, CorruptDataError, MissingInputError
from univigu.evaluation.claims import majority_values, single_values

if TYPE_CHECKING:
    from components.pipeline.step import Step

SEED = 20_260_412  # no training uses it
COUNTS = {"captions": 512, "generations": 256, "joint": 256}
EMPTY_PROMPT_EVERY = 16  # of the joint prompts: all attributes are open
ATTRIBUTES = tuple(world.ATTRIBUTES)
HAS_RECOGNISER = True  # that is no part of the model
WORDS = {  # of the page
    "captions": "clips rendered from handwriting that no model was trained on",
    "majority": "what is right most often when it is said of every clip.",
    "generation": "prompts that state every attribute",
    "reader": "What a video shows is read by the recogniser, a network that has no part in the training captions. Its "
    "own accuracy is measured on clips rendered from a known truth; generated clips are less clean, and it may err "
    "more often on those.",
    "joint": "prompts that leave attributes open. What the recogniser sees in the video is compared with what the "
    "caption says, on those attributes alone.",
}

Item = Mapping[str, Any]


# --- the held-out set ------------------------------------------------------------------------------------------------


def build_heldout() -> dict[str, Any]:
    """The whole specification: ``captions`` (id, scan, seed, attributes), ``generations`` and ``joint``.

    The last two have (id, prompt, seed); ``scan`` is an index into `world.heldout_scans`. A generation's prompt states
    every attribute; a joint prompt leaves at least two open, and some of them are empty.
    """
    rng = np.random.default_rng(SEED)

    def states_everything(prompt: str) -> bool:
        return len(asked(prompt)) == len(ATTRIBUTES)

    def leaves_two_open(prompt: str) -> bool:
        return len(left_open(prompt)) >= 2

    items = {
        "captions": _heldout_clips(rng, COUNTS["captions"]),
        "generations": [
            {"id": f"generation-{i:03d}", "prompt": _prompt(rng, states_everything), "seed": _seed(rng)}
            for i in range(COUNTS["generations"])
        ],
        "joint": [
            {
                "id": f"joint-{i:03d}",
                "prompt": "" if i % EMPTY_PROMPT_EVERY == 5 else _prompt(rng, leaves_two_open),
                "seed": _seed(rng),
            }
            for i in range(COUNTS["joint"])
        ],
    }
    return {"world": "digits", "sha256": json_digest(items), **items}


def _heldout_clips(rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    scans, digits = world.heldout_scans()
    rounds = -(-count // len(scans))  # every held-out scan once before any of them twice
    order = np.concatenate([rng.permutation(len(scans)) for _ in range(rounds)])[:count]
    return [
        {
            "id": f"heldout-{i:03d}",
            "scan": int(scan),
            "seed": _seed(rng),
            "attributes": world.sample_attributes(rng, digit=world.DIGITS[digits[scan]]),
        }
        for i, scan in enumerate(order)
    ]


def _prompt(rng: np.random.Generator, accepts: Callable[[str], bool]) -> str:
    """A prompt in the dataset's wording that `accepts` takes, and that is true of the clip it was written for."""
    while True:
        attributes = world.sample_attributes(rng)
        prompt = world.write_prompt(attributes, rng)
        if accepts(prompt) and asked(prompt).items() <= attributes.items():
            return prompt


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def write_heldout(path: Path) -> None:
    """Write the specification again."""
    save_heldout(path, build_heldout())


def save_heldout(path: Path, heldout: Mapping[str, Any]) -> None:
    """Write a specification, as `build_heldout` returns it, one item per line."""
    lines = [f' "world": {json.dumps(heldout["world"])},', f' "sha256": {json.dumps(heldout["sha256"])}']
    for kind in COUNTS:
        lines[-1] += "," * (not lines[-1].endswith(","))
        lines.append(f' "{kind}": [')
        lines.append(",\n".join("  " + json.dumps(item) for item in heldout[kind]))
        lines.append(" ]")
    path.write_text("{\n" + "\n".join(lines) + "\n}\n", encoding="utf-8")


def load_heldout(path: Path) -> dict[str, Any]:
    """Read the specification; raises if it is missing or doesn't match its SHA-256."""
    try:
        heldout = json.loads(path.read_text(encoding="utf-8"))
        intact = json_digest({kind: heldout[kind] for kind in COUNTS}) == heldout["sha256"]
    except FileNotFoundError as error:
        raise MissingInputError(f"There is no held-out set at {path}; check the profile's 'heldout'.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptDataError(f"The held-out set {path} is not readable; restore it from the repository.") from error
    if not intact:
        raise CorruptDataError(
            f"The held-out set {path} is not what its SHA-256 says; restore it from the repository, or write it again "
            "with `python -m components.digits.benchmark`."
        )
    return heldout


def open_heldout(step: "Step") -> dict[str, Any]:
    """A step's held-out set: the first items of each kind, as many as its profile states."""
    heldout = load_heldout(step.inputs["heldout"])
    settings = step.settings.evaluate_model
    return {**heldout, **{kind: first_items(heldout, kind, getattr(settings, kind)) for kind in COUNTS}}


def first_items(heldout: Mapping[str, Any], kind: str, count: int) -> list[Item]:
    """The first `count` held-out items of a kind; raises `ConfigError` if it is 0, or more than there are."""
    if not 1 <= count <= len(heldout[kind]):
        raise ConfigError(
            f"The profile asks for {count} held-out items of '{kind}', and there are {len(heldout[kind])}; "
            "choose a number from 1 to that."
        )
    return heldout[kind][:count]


# --- attributes: true, prompted, recognised ---------------------------------------------------------------------------


def truth(item: Item) -> dict[str, str]:
    """The attributes of a held-out clip."""
    return dict(item["attributes"])


def render(items: Sequence[Item], clips: Path | None = None) -> np.ndarray:
    """Held-out clips as uint8 (B, F, H, W, 3); an item's pixels don't depend on other items."""
    scans, _ = world.heldout_scans()
    return np.concatenate([world.render([i["attributes"]], scans[[i["scan"]]], i["seed"]) for i in items])


def read_text(text: str) -> dict[str, str]:
    """The attributes to which a text gives exactly one value."""
    return single_values(world.read_text(text))


asked = read_text
majority = majority_values


def left_open(prompt: str, seen: Mapping[str, str] | None = None) -> list[str]:
    """The attributes that a prompt neither states nor implies (start, direction and speed imply the end)."""
    said = asked(prompt)
    possible = [m for m in world.motions() if all(m[name] == value for name, value in said.items() if name in m)]
    settled = {name for name in (possible[0] if possible else {}) if len({m[name] for m in possible}) == 1}
    return [name for name in ATTRIBUTES if name not in said and name not in settled]


def reader(pipeline: Any) -> Callable[[np.ndarray, Any], list[dict[str, str]]]:
    """Load the recogniser, which reads clips independently of the model and its texts."""
    return lambda frames, texts: recognise(frames)


def recognise(frames: np.ndarray) -> list[dict[str, str]]:
    """What the recogniser sees in uint8 clips (B, F, H, W, 3); it is trained on other scans than the held-out ones."""
    from components.digits import recogniser

    return recogniser.recognise(frames)


if __name__ == "__main__":
    write_heldout(Path(sys.argv[1]))
