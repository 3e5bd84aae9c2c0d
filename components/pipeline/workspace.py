"""The folders that one run of a step works in, the part that it makes, and the recipe that decides its output."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from components.pipeline.manifests import Recipe
from components.pipeline.stages import Stage
from univigu.errors import ConfigError


@dataclass
class Workspace:
    """The folders of a step's run, and the parameters, inputs and code that it works with."""

    stage: Stage
    root: Path  # the work root; a step needs it only for what all steps share, such as the tracking store
    parameters: Mapping[str, Any]  # the profile's sections that the stage declares
    inputs: Mapping[str, Path]  # earlier steps' folders and the profile's sources, by name
    input_digests: Mapping[str, str]
    input_stamps: Mapping[str, Mapping[str, Any]]  # `stamps` of each input when it was verified
    out: Path  # the staging folder: everything in it is committed when the function returns
    scratch: Path  # survives a killed run until the commit, such as checkpoints; never part of the output
    previous: Path  # the last committed output, if there is one
    records: Path  # a record of each finished shard; never part of the output
    docs: Path  # pages for people, which may contain times; never part of the output
    code: Mapping[str, str]  # `fingerprint` of what this profile uses

    @cached_property
    def recipe(self) -> Recipe:
        """Everything that decides the output: parameters, inputs and code."""
        return Recipe(self.parameters, self.input_digests, self.code)

    @cached_property
    def key(self) -> str:
        """A digest of the recipe."""
        return self.recipe.key()


class Part(NamedTuple):
    """A part of a step's shards: every `of`-th shard, beginning with shard number `number`."""

    number: int  # from 1
    of: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read ``2/8``, the second of eight parts; raises `ConfigError` for anything else."""
        try:
            part = cls(*(int(number) for number in text.split("/")))
            if not 1 <= part.number <= part.of:
                raise ValueError(text)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"'{text}' is not a part of a step; write 2/8 for the second of eight parts.") from error
        return part


class PartEnded(Exception):  # noqa: N818 (it ends a step function early and is no error)
    """The shards of a part are finished; the step function has nothing more to do."""

    def __init__(self, made: int, kept: int) -> None:
        self.made, self.kept = made, kept
