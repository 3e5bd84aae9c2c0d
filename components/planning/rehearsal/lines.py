"""What a rehearsal checks, and its results."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Profile = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """The result of one check."""

    subject: str
    state: str  # ok | to do | failed
    detail: str
    exit_code: int = 0


@dataclass(frozen=True)
class Scene:
    """What is rehearsed: a profile and its name, the work root, the weights if any, and the GPUs."""

    name: str
    profile: Profile
    root: Path
    weights: Path | None
    gpus: int
    gpu: str


class ToDo(Exception):  # noqa: N818 (it ends a check early and is no error)
    """Something that the user must provide before the real run."""
