"""What a rehearsal is about, and what it finds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Profile = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """What one check found."""

    subject: str
    state: str  # ok | to do | failed
    detail: str
    exit_code: int = 0


@dataclass(frozen=True)
class Scene:
    """What is rehearsed: a profile (and how it is called), its work root, the weights if any, and the GPUs."""

    name: str
    profile: Profile
    root: Path
    weights: Path | None
    gpus: int
    gpu: str


class ToDo(Exception):  # noqa: N818 (it is no error, and it ends a check early)
    """Something that has to be put there before the real run."""
