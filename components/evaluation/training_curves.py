"""The training steps' loss curves and held-out losses, for the evaluation's metrics, plots and page."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.evaluation.report import line_chart

LOSSES = {"video": "video_mse", "text": "text_mse", "cross-entropy": "text_ce"}
ACCURACIES = {"with the video": "token_accuracy", "without it": "token_accuracy_without_video"}

Figures = Mapping[str, Any]


def read_training(folder: Path) -> dict[str, Any]:
    """A training step's figures: ``curves`` (columns by name), ``heldout`` (of the last evaluation) and ``summary``.

    Figures that the step didn't write are empty.
    """
    curves: dict[str, list[float]] = {}
    heldout: dict[str, Any] = {}
    if (folder / "curves.csv").is_file():
        with (folder / "curves.csv").open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                for name, value in row.items():
                    curves.setdefault(name, []).append(float(value or "nan"))
    if (folder / "heldout.json").is_file():
        heldout = json.loads((folder / "heldout.json").read_text(encoding="utf-8"))
    summary = {f"heldout_{name}": round(sum(values) / len(values), 6) for name, values in by_tau(heldout).items()}
    summary |= {name: round(heldout[name], 6) for name in ("video_gain",) if name in heldout}
    return {"curves": curves, "heldout": heldout, "summary": summary}


def by_tau(heldout: Figures) -> dict[str, list[float]]:
    """The held-out figures that have one value per bin of tau."""
    return {name: values for name, values in heldout.items() if name != "tau" and isinstance(values, list) and values}


def training_charts(training: Mapping[str, Figures]) -> dict[str, list[Mapping[str, Any]]]:
    """The page's charts of both stages: ``training`` by step, ``heldout`` and ``gain`` by tau."""
    charts: dict[str, list[Mapping[str, Any]]] = {"training": [], "heldout": [], "gain": []}
    for stage, figures in training.items():
        title = stage.replace("stage", "Stage ")
        curves, heldout = figures["curves"], figures["heldout"]
        smoothed = {label: smooth(curves["step"], curves[name]) for label, name in LOSSES.items() if name in curves}
        if smoothed:
            lines = {label: [(x, y) for x, y, _, _ in points] for label, points in smoothed.items()}
            bands = {label: [(x, low, high) for x, _, low, high in points] for label, points in smoothed.items()}
            charts["training"].append(line_chart(title, "step", lines, bands))
        binned = {name: list(zip(heldout["tau"], values, strict=True)) for name, values in by_tau(heldout).items()}
        losses = {label: binned[name] for label, name in LOSSES.items() if name in binned}
        if losses:
            charts["heldout"].append(line_chart(title, "τ", losses))
        accuracies = {label: binned[name] for label, name in ACCURACIES.items() if name in binned}
        if accuracies and "video_gain" in heldout:
            gain = f"{title}: {100 * heldout['video_gain']:+.1f} points"
            charts["gain"].append(line_chart(gain, "τ", accuracies))
    return charts


def smooth(
    steps: Sequence[float], values: Sequence[float], points: int = 60
) -> list[tuple[float, float, float, float]]:
    """At most `points` means over consecutive steps, each (step, mean, low, high); steps without a value are left out.

    low, high: the 10 % and 90 % quantiles of the values, by the nearest rank.
    """
    pairs = [(x, y) for x, y in zip(steps, values, strict=True) if math.isfinite(y)]
    size = max(1, -(-len(pairs) // points))
    smoothed = []
    for start in range(0, len(pairs), size):
        xs, ys = zip(*pairs[start : start + size], strict=True)
        ranked = sorted(ys)
        low, high = (ranked[round(share * (len(ranked) - 1))] for share in (0.1, 0.9))
        smoothed.append((sum(xs) / len(xs), sum(ys) / len(ys), low, high))
    return smoothed
