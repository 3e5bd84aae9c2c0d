"""Checks of clips and captions: one module per check, named in the profile.

A module has ``check(frames, rows, settings) -> list[Finding]`` for clips (frames uint8 (B, F, H, W, 3), each with its
row of the table `clips`; ``DEFAULTS`` has all settings and their defaults), or ``check_caption(prompt, caption,
**settings) -> str | None`` for captions (the fault, or None), or both. Captions are quarantined with the slug `REASON`,
or ``misses_prompt`` if the module has none. ``REQUIRES`` names modules of optional packages that a check needs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from inspect import signature
from types import ModuleType

from univigu.errors import ConfigError
from univigu.extras import import_extra


@dataclass(frozen=True)
class Finding:
    """The result of a check for one clip. `reason` is the slug to quarantine it with, or None if it passes."""

    scores: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class CaptionCheck:
    """A check of captions with its settings: `find(prompt, caption)` returns the fault, or None."""

    find: Callable[[str, str], str | None]
    reason: str


def load_caption_checks(entries: Sequence[str | Mapping[str, Mapping]]) -> list[CaptionCheck]:
    """The caption checks that a profile lists, each by its name or as ``{name: {setting: value}}``.

    Raises `ConfigError` for an unknown check, and for unknown or missing settings.
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
                f"The settings of the check '{name}' are wrong ({error}); correct them in the profile."
            ) from error
        checks.append(CaptionCheck(partial(check, **settings), getattr(module, "REASON", "misses_prompt")))
    return checks


def load_checks(names: list[str], kind: str) -> list[ModuleType]:
    """The modules of the checks `names`, which must have the function `kind`; raises `ConfigError` otherwise."""
    modules = []
    for name in names:
        try:
            module = import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise ConfigError(f"There is no check '{name}'; choose a module of components/checks.") from error
        if not hasattr(module, kind):
            raise ConfigError(f"The check '{name}' has no '{kind}'; remove it from that list in the profile.")
        modules.append(module)
    return modules


def require_packages(modules: Iterable[ModuleType]) -> None:
    """Raise `ConfigError`, with the command that installs it, for the first package that is missing for a check."""
    for module in modules:
        for name in getattr(module, "REQUIRES", ()):
            import_extra(name)
