"""Checks of made clips and captions: one module a check, named in the profile.

A module has ``check(frames, rows, settings) -> list[Finding]`` for clips (frames uint8 (B, F, H, W, 3), one row of the
clips table each; its ``DEFAULTS`` are the settings there are), or ``check_caption(prompt, caption, **settings) -> str |
None`` for captions (what is wrong, or None), or both. `REASON` is the slug that captions are quarantined by,
``misses_prompt`` where there is none.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from inspect import signature
from types import ModuleType

from univigu.errors import ConfigError


@dataclass(frozen=True)
class Finding:
    """What a check saw in one clip. `reason` is the slug to quarantine it by, or None where the clip may stay."""

    scores: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class CaptionCheck:
    """A check of captions with its settings: `find(prompt, caption)` says what is wrong, or None."""

    find: Callable[[str, str], str | None]
    reason: str


def load_caption_checks(entries: Sequence[str | Mapping[str, Mapping]]) -> list[CaptionCheck]:
    """The caption checks that a profile lists, each by its name or as ``{name: {setting: value}}``.

    Raises `ConfigError` for another name, and for settings that the check doesn't have or needs.
    """
    checks = []
    for entry in entries:
        ((name, settings),) = entry.items() if isinstance(entry, Mapping) else [(entry, {})]
        (module,) = load_checks([name], "check_caption")
        check = module.check_caption
        try:
            signature(check).bind("", "", **settings)
        except TypeError as error:
            raise ConfigError(
                f"The check '{name}' has other settings ({error}); correct them in the profile."
            ) from error
        checks.append(CaptionCheck(partial(check, **settings), getattr(module, "REASON", "misses_prompt")))
    return checks


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
