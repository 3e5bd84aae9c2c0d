"""The commands that the trials break, in the order in which a user would give them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from components.pipeline.profiles import load_profile
from components.pipeline.stages import STAGES
from univigu.video import encode_mp4

REPO = Path(__file__).parents[2]
PROMPTS, VIDEOS = 24, "videos"


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
        return 8 if self.step in _QUICK else 1


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
    own = ("--licence", "CC0-1.0", "--source", "a trial", "--profile", str(profile))
    imported = Plan("data import", ("data", "import", VIDEOS, *own), "", "synthesize-videos")
    return [*found, *again, imported, *_about_models(found[-3:], profile)]


def _about_models(last: Sequence[Plan], profile: Path) -> list[Plan]:
    """Promotion; and rollback, which needs a second model: trained a step longer, and made champion."""
    why = ("--why", "a trial")
    promote = Plan("promote", ("model", "promote", "1", "--force", *why), last[-1].name, light=False)
    found, longer = [promote], str(longer_profile(profile))
    for plan in last:
        run = ("run", plan.step, "--profile", longer)
        found.append(plan._replace(name=f"{plan.step} a step longer", arguments=run, after=found[-1].name))
    second = Plan("promote another", ("model", "promote", "2", "--force", *why), found[-1].name, light=False)
    return [*found, second, Plan("rollback", ("model", "rollback", *why), second.name, light=False)]


def longer_profile(profile: Path) -> Path:
    """Where the profile lies by which stage 2 is trained a step longer."""
    return profile.with_stem(f"{profile.stem}-longer")


def make_sources(root: Path, profile: Path) -> None:
    """Write what the first step reads, videos to import, and the profiles."""
    values = load_profile("smoke")
    for section, more in yaml.safe_load(Path(__file__).with_name("profile.yaml").read_text()).items():
        values[section].update(more)
    profile.write_text(yaml.safe_dump(values, sort_keys=False))
    values["train_stage_2"]["steps"] += 1
    longer_profile(profile).write_text(yaml.safe_dump(values, sort_keys=False))
    _make_videos(root / VIDEOS)
    (root / "data/prompts").mkdir(parents=True)
    lines = (REPO / "data/prompts/digits.jsonl").read_text().splitlines(keepends=True)
    (root / "data/prompts/digits.jsonl").write_text("".join(lines[:PROMPTS]))
    for name in ("model/tiny-wan", "data/heldout.json"):
        _copy(REPO / name, root / name)


def _make_videos(folder: Path) -> None:
    """A few clips with captions, and a file that is no video."""
    folder.mkdir(parents=True)
    for number in range(4):
        frames = np.full((9, 16, 16, 3), 40 * number, np.uint8)
        frames[:, 4:9, 2:7] = 200
        (folder / f"{number}.mp4").write_bytes(encode_mp4(frames, 8))
        (folder / f"{number}.txt").write_text(f"A bright square rests on the left, in take {number}.")
    (folder / "no-video.mp4").write_bytes(b"no video")


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)
