"""The commands that the trials break, in the order in which a user would give them."""

import shutil
from pathlib import Path
from typing import NamedTuple

import yaml

from components.pipeline.profiles import load_profile
from components.pipeline.stages import STAGES

REPO = Path(__file__).parents[2]
PROMPTS = 24


class Plan(NamedTuple):
    """A command, and the state of a work root that it starts from: what the plan called `after` left."""

    name: str
    arguments: tuple[str, ...]
    after: str  # another plan's name; empty: nothing but sources
    step: str = ""  # whose output it makes
    light: bool = True  # so that every call can be broken

    @property
    def chained(self) -> bool:
        """Whether it is one of the steps in their order, each after the one before it."""
        return self.name == self.step

    @property
    def weight(self) -> int:
        """How often it comes, against others: quick ones come more often, so that all take about as much time."""
        return 4 if self.step in _QUICK else 1


_HEAVY = ("synthesize-videos", "train-stage-1", "train-stage-2", "evaluate-model", "register-model")


_QUICK = ("curate-prompts", "caption-videos", "encode-latents", "synthesize-videos")


def plans(profile: Path) -> list[Plan]:
    """The steps one after another; each of them once more where its output is there; then commands about models."""
    found: list[Plan] = []
    for stage in STAGES:
        run = ("run", stage.name, "--profile", str(profile))
        after = found[-1].name if found else ""
        found.append(Plan(stage.name, run, after, stage.name, stage.name not in _HEAVY))
    again = [plan._replace(name=f"{plan.name} again", after=plan.name) for plan in found]
    why = ("--why", "a trial")
    models = [Plan("promote", ("model", "promote", "1", "--force", *why), "register-model", light=False)]
    return [*found, *again, *models]


def make_sources(root: Path, profile: Path) -> None:
    """Write what the first step reads, and the profile."""
    values = load_profile("smoke")
    for section, more in yaml.safe_load(Path(__file__).with_name("profile.yaml").read_text()).items():
        values[section].update(more)
    profile.write_text(yaml.safe_dump(values, sort_keys=False))
    (root / "data/prompts").mkdir(parents=True)
    lines = (REPO / "data/prompts/digits.jsonl").read_text().splitlines(keepends=True)
    (root / "data/prompts/digits.jsonl").write_text("".join(lines[:PROMPTS]))
    for name in ("model/tiny-wan", "data/heldout.json"):
        _copy(REPO / name, root / name)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)
