"""Where one run of a step works, on which part of it, and the recipe that decides what it makes."""

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
    root: Path  # the work root; a step needs it only to find what all steps share, such as the tracking store
    parameters: Mapping[str, Any]  # the profile's sections that the stage declares
    inputs: Mapping[str, Path]  # earlier steps' folders and the profile's sources, by name
    input_digests: Mapping[str, str]
    input_stamps: Mapping[str, Mapping[str, Any]]  # by input, of each of its files when it was verified (`stamps`)
    out: Path  # the staging folder: everything in it is committed when the function returns
    scratch: Path  # survives a killed run until the commit: checkpoints are here; never part of the output
    previous: Path  # where the last committed output is, if there is one
    records: Path  # what is known of each finished shard: under the work root, never part of the output
    docs: Path  # pages for people that may carry times: under the work root, never part of the output
    code: Mapping[str, str]  # `fingerprint` of what this profile uses

    @cached_property
    def recipe(self) -> Recipe:
        """All that decides the output: parameters, inputs and code."""
        return Recipe(self.parameters, self.input_digests, self.code)

    @cached_property
    def key(self) -> str:
        """A digest of the recipe."""
        return self.recipe.key()


class Part(NamedTuple):
    """A share of a step's shards: every `of`-th of them, the first part beginning with the first shard."""

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
            raise ConfigError(f"'{text}' is no part of a step; write 2/8 for the second of eight parts.") from error
        return part


class PartEnded(Exception):  # noqa: N818 (it is how a step function is left early, and no error)
    """The shards of a part are there; the step function has nothing more to do."""

    def __init__(self, made: int, kept: int) -> None:
        self.made, self.kept = made, kept
