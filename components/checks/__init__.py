"""Checks of made clips and captions: one module a check, named in the profile.

A module has ``check(frames, rows, settings) -> list[Finding]`` for clips (frames uint8 (B, F, H, W, 3), one row of the
clips table each; its ``DEFAULTS`` are the settings there are), or ``check_caption(prompt, caption) -> str | None`` for
captions (what is wrong, or None), or both.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType

from univigu.errors import ConfigError


@dataclass(frozen=True)
class Finding:
    """What a check saw in one clip. `reason` is the slug to quarantine it by, or None where the clip may stay."""

    scores: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None
    detail: str = ""


def repeats_prompt(prompt: str, caption: str) -> bool:
    """Whether a caption is its prompt again: the same words, whatever their case and punctuation."""
    return re.findall(r"\w+", prompt.casefold()) == re.findall(r"\w+", caption.casefold())


def load_checks(names: list[str], kind: str) -> list[ModuleType]:
    """The modules of the checks called `names` that have the function `kind`; raises `ConfigError` for another name."""
    modules = []
    for name in names:
        try:
            module = import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise ConfigError(f"There is no check '{name}'; name a module of components/checks.") from error
        if not hasattr(module, kind):
            raise ConfigError(f"The check '{name}' has no '{kind}'; take it out of that list of the profile.")
        modules.append(module)
    return modules
