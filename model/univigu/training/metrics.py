"""Records of a training run: curves, held-out evaluations, and a progress line every few seconds."""

import csv
import io
import math
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from univigu.files import read_json, replaced, write_json
from univigu.training.engine import TrainingConfig

LINE_EVERY_S = 5.0
# The files that each checkpoint has a copy of; the run's other files are made from these.
RECORDS = ("curves.csv", "evaluations.json", "threads.json")
_MEAN_OVER = {  # the number of samples behind each mean, where it is not that of all samples
    "video_mse": "video_samples",
    "text_mse": "text_samples",
    "text_ce": "text_samples",
    "token_accuracy": "text_samples",
}


class StepSums:
    """A step's metrics over micro-batches and processes: each is a mean over the samples that have this metric."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, out: Mapping[str, Tensor], samples: int) -> None:
        for name, value in out.items():
            value = value.detach().double()
            if not name.endswith("_samples"):
                value = value * (out[_MEAN_OVER[name]] if name in _MEAN_OVER else samples)
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.sums["samples"] = self.sums.get("samples", 0.0) + torch.tensor(samples, dtype=torch.float64)

    def means(self, device: torch.device) -> dict[str, float]:
        names = sorted(self.sums)
        values = torch.stack([self.sums[name].cpu() for name in names]).to(device)
        if dist.get_world_size() > 1:
            dist.all_reduce(values)
        totals = dict(zip(names, values.tolist(), strict=True))
        counts = {name: totals[_MEAN_OVER.get(name, "samples")] for name in names if not name.endswith("samples")}
        return {name: totals[name] / count for name, count in counts.items() if count}


class Curves:
    """A CSV with one row of metrics per step, appended row by row; rows after the resumed step are dropped."""

    FIELDS = ("step", "loss", *_MEAN_OVER, "grad_norm", "learning_rate")

    def __init__(self, path: Path, resumed: int) -> None:
        self.path, self.resumed = path, resumed

    def add(self, step: int, row: Mapping[str, float]) -> None:
        if step == self.resumed + 1:
            self._begin()
        with self.path.open("a", encoding="utf-8", newline="") as stream:
            self._write(stream, [{"step": step, **{name: f"{row[name]:.6g}" for name in self.FIELDS if name in row}}])

    def past(self) -> list[tuple[int, dict[str, float]]]:
        """Each step up to the resumed one, with its metrics."""
        return [
            (int(row["step"]), {name: float(value) for name, value in row.items() if name != "step" and value})
            for row in self._kept()
        ]

    def _kept(self) -> list[dict[str, str]]:
        return [row for row in _read_rows(self.path) if int(row["step"]) <= self.resumed] if self.resumed else []

    def _begin(self) -> None:
        """Replace the file atomically by the rows up to the resumed step: a kill at this point loses none of them."""
        kept = self._kept()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        text.write(",".join(self.FIELDS) + "\n")
        self._write(text, kept)
        with replaced(self.path) as stream:
            stream.write(text.getvalue().encode())

    def _write(self, stream: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        csv.DictWriter(stream, self.FIELDS, lineterminator="\n").writerows(rows)


def _read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV of `Curves`, without a last row that was cut off by a kill."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        return [
            row for row in csv.DictReader(stream) if (row.get("step") or "").isdecimal() and None not in row.values()
        ]


class Evaluations:
    """The results of held-out evaluations: ``evaluations.json`` has all, ``heldout.json`` the newest, ``heldout.csv``
    one row per (step, bin of tau). Those after the resumed step are dropped."""

    def __init__(self, folder: Path, resumed: int) -> None:
        self.folder = folder
        past = folder / "evaluations.json"
        done = read_json(past) if resumed and past.is_file() else []
        self.all = [scores for scores in done if scores["step"] <= resumed]

    def add(self, step: int, scores: Mapping[str, Any]) -> None:
        self.all.append({"step": step, **scores})
        self.write()

    def write(self) -> None:
        """Write all three files; nothing where there was no evaluation yet."""
        if not self.all:
            return
        write_json(self.folder / "evaluations.json", self.all)
        write_json(self.folder / "heldout.json", self.all[-1])
        names = sorted(name for name, value in self.all[-1].items() if isinstance(value, list))  # as if read from JSON
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["step", *names])
        for past in self.all:
            for values in zip(*(past[name] for name in names), strict=True):
                writer.writerow([past["step"], *(f"{value:.6g}" for value in values)])
        with replaced(self.folder / "heldout.csv") as stream:
            stream.write(text.getvalue().encode())


def heldout_summary(scores: Mapping[str, Any]) -> dict[str, float]:
    """One number per held-out metric: the mean over bins of tau."""
    means = {
        name: sum(value) / len(value) for name, value in scores.items() if isinstance(value, list) and name != "tau"
    }
    return {**means, "video_gain": scores["video_gain"]}


class ProgressLine:
    """One line every few seconds: the step, its metrics, the speed and the remaining time."""

    def __init__(self, first: int, config: TrainingConfig) -> None:
        self.first, self.config = first, config
        self.started = time.monotonic()
        self.shown = -math.inf

    def show(self, step: int, row: Mapping[str, float], figures: Mapping[str, float]) -> None:
        """`figures`: `Throughput.figures`. The remaining time includes evaluations and checkpoints."""
        now = time.monotonic()
        if now - self.shown < LINE_EVERY_S and step < self.config.steps:
            return
        self.shown = now
        left = timedelta(seconds=round((self.config.steps - step) * (now - self.started) / (step - self.first)))
        parts = " ".join(f"{name} {value:.4g}" for name, value in row.items())
        speed = f"{figures['samples_per_second']:.3g} samples/s {figures['tokens_per_second']:.4g} tokens/s"
        speed += f" {figures['tflops_per_process']:.3g} TFLOP/s"
        if "mfu" in figures:
            speed += f" MFU {figures['mfu']:.1%}"
        if figures["loading_share"] >= 0.005:
            speed += f" waiting for data {figures['loading_share']:.1%}"
        print(f"step {step}/{self.config.steps} {parts} {speed} {left} left", file=sys.stderr)
