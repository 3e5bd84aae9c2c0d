"""The two worlds behind one interface: what pretraining needs to know of each."""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

import numpy as np

from components.digits import world
from components.digits.stories import scenes, writer
from components.digits.stories.reader import read
from univigu.errors import ConfigError

Facts = dict[str, str]


@dataclass(frozen=True)
class World:
    """How a world's scenes are drawn, rendered and worded. A scene is a mapping from facts to their values.

    `questions` are the facts that networks are trained on, with their possible values; a scene need not have each.
    `complete` adds the facts that follow from these.
    """

    name: str
    shows: str  # completes "clips of ..."
    questions: Mapping[str, tuple[str, ...]]
    sample: Callable[[np.random.Generator], Facts]
    complete: Callable[[Facts], Facts]
    draw_scans: Callable[[list[Facts], tuple[np.ndarray, np.ndarray], int], np.ndarray]
    render: Callable[..., np.ndarray]
    write_prompt: Callable[[Facts, np.random.Generator], str]
    write_caption: Callable[[Facts, np.random.Generator], str]
    read_text: Callable[[str], Mapping[str, Set[str]]]

    def draw_clips(
        self, count: int, seed: int, source: tuple[np.ndarray, np.ndarray] | None = None, frames: slice = slice(None)
    ) -> tuple[np.ndarray, list[dict[str, str]]]:
        """Clips of random scenes from the training scans (or `source`): uint8 (B, F, H, W, 3) and the scenes."""
        rng = np.random.default_rng(seed)
        drawn = [self.sample(rng) for _ in range(count)]
        scans = self.draw_scans(drawn, source or world.train_scans(), seed)
        return self.render(drawn, scans, seed, frames), drawn


DIGITS = World(
    name="digits",
    shows="a coloured handwritten digit that moves over a plain background",
    questions=world.ATTRIBUTES,
    sample=world.sample_attributes,
    complete=lambda facts: facts,
    draw_scans=world.draw_scans,
    render=world.render,
    write_prompt=world.write_prompt,
    write_caption=world.write_caption,
    read_text=world.read_text,
)
STORIES = World(
    name="stories",
    shows="two coloured handwritten digits that move, wait, enter, leave and pass each other on a plain background",
    questions=scenes.questions(),
    sample=scenes.sample_scene,
    complete=lambda facts: facts | scenes.relations(facts),
    draw_scans=scenes.draw_scans,
    render=scenes.render,
    write_prompt=writer.write_prompt,
    write_caption=writer.write_caption,
    read_text=lambda text: read(text).claims,
)
WORLDS = {one.name: one for one in (DIGITS, STORIES)}


def find_world(name: str) -> World:
    """The world called `name`; raises `ConfigError` for another name."""
    if name not in WORLDS:
        raise ConfigError(f"There is no world '{name}'; choose from {', '.join(WORLDS)}.")
    return WORLDS[name]
