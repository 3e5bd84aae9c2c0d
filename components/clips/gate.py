"""The quality gate of clips: the checks that a profile turns on, and their verdict on each clip.

The profile's `synthesize_videos.checks` names modules of `components/checks`, each with a mode and its own settings.
`off` doesn't run a check, `score` keeps its scores in the table `clips`, and `enforce` also quarantines failing clips.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from components.checks import Finding, load_checks
from components.pipeline.digests import tree_digest
from components.pipeline.manifests import inside
from univigu.errors import ConfigError, MissingInputError

if TYPE_CHECKING:
    import numpy as np


class ClipCheck(NamedTuple):
    """One check of the gate, with all its settings."""

    module: ModuleType
    mode: str
    settings: Mapping[str, Any]


def load_gate(checks: Mapping[str, Mapping[str, Any]], root: Path) -> list[ClipCheck]:
    """The checks that are on, in the profile's order.

    checks: the profile's `synthesize_videos.checks`. A setting called `model` is a folder under the work root, and is
    made absolute. Raises `ConfigError` for an unknown check or setting, and `MissingInputError` if there is no such
    folder.
    """
    gate = []
    for name, given in checks.items():
        # pyrefly: ignore[no-matching-overload]
        mode = {False: "off"}.get(given.get("mode"), given.get("mode"))  # YAML reads a bare off as false
        (module,) = load_checks([name], "check")
        defaults = getattr(module, "DEFAULTS", {})
        settings = {key: value for key, value in given.items() if key != "mode"}
        if unknown := sorted(settings.keys() - defaults.keys()):
            known = ", ".join(sorted(defaults)) or "none"
            raise ConfigError(f"The check '{name}' has no setting '{unknown[0]}'; its settings: {known}.")
        if mode != "off":
            gate.append(ClipCheck(module, mode, _with_model(name, {**defaults, **settings}, root)))
    return gate


def _with_model(name: str, settings: dict[str, Any], root: Path) -> dict[str, Any]:
    if "model" not in settings:
        return settings
    folder = inside(root, settings["model"] or ".")
    if not settings["model"] or not folder.is_dir():
        raise MissingInputError(
            f"The check '{name}' needs a model, and there is no folder '{settings['model']}' under {root}; put it "
            "there and name it in the profile, or set the check's mode to off."
        )
    return {**settings, "model": str(folder)}


def gate_digests(gate: Sequence[ClipCheck]) -> dict[str, str]:
    """Digests of the models of the gate by folder name; like the profile, the models decide the output."""
    folders = {check.settings["model"] for check in gate if "model" in check.settings}
    return {Path(folder).name: tree_digest([Path(folder)], relative_to=Path(folder)) for folder in sorted(folders)}


def examine(videos: "np.ndarray", rows: Sequence[Mapping[str, Any]], gate: Sequence[ClipCheck]) -> list[tuple]:
    """(row, frames uint8, finding) for each clip of float videos (B, F, H, W, 3) in [0, 1].

    The finding is that of `judge`, or `broken` if values are not finite.
    """
    import numpy as np

    finite = np.isfinite(videos).all(axis=(1, 2, 3, 4))
    frames = (np.nan_to_num(videos) * 255).round().clip(0, 255).astype(np.uint8)
    findings = judge(frames, rows, gate)
    for index in np.flatnonzero(~finite):
        detail = "the generator's output holds values that are not finite"
        findings[index] = Finding(findings[index].scores, "broken", detail)
    return list(zip(rows, frames, findings, strict=True))


def judge(frames: "np.ndarray", rows: Sequence[Mapping[str, Any]], gate: Sequence[ClipCheck]) -> list[Finding]:
    """The gate's verdict on each clip of frames uint8 (B, F, H, W, 3).

    It has the scores of all checks, and the first reason that a check with mode `enforce` found.
    """
    findings = [(check.mode, check.module.check(frames, rows, check.settings)) for check in gate]
    results = []
    for index in range(len(rows)):
        scores = {name: score for _, found in findings for name, score in found[index].scores.items()}
        failures = (found[index] for mode, found in findings if mode == "enforce" and found[index].reason)
        first = next(failures, Finding())
        results.append(Finding(scores, first.reason, first.detail))
    return results
