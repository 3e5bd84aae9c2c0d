"""The training loop of all pretrained networks: resumable, with a moving average of the weights.

Every step draws its data from its own number, so a run that was killed and resumed sees what an uninterrupted one sees.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from components.pipeline.progress import progress


@dataclass
class Fit:
    """The training settings of one network.

    The learning rate and the decay of the average are functions of the step, so a checkpoint holds no state of theirs.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    final_lr: float = 0.05  # share of `lr` at the end of the cosine
    weight_decay: float = 0.01
    ema: float = 0.998
    clip: float = 1.0
    bf16: bool = False
    save_seconds: float = 60.0
    report_steps: int = 500


def learning_rate(fit: Fit, step: int) -> float:
    """Linear warm-up, then a cosine down to `final_lr * lr`."""
    if step < fit.warmup:
        return fit.lr * (step + 1) / fit.warmup
    progress = min(1.0, (step - fit.warmup) / max(1, fit.steps - fit.warmup))
    return fit.lr * (fit.final_lr + (1 - fit.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def save_atomically(tensors: dict[str, torch.Tensor], path: Path, note: dict) -> None:
    """One safetensors file, `note` as JSON in its metadata; readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({name: t.contiguous() for name, t in tensors.items()}, part, metadata={"note": json.dumps(note)})
    os.replace(part, path)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and the note that `save_atomically` wrote."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["note"])  # noqa: SIM118


def train(
    name: str,
    module: nn.Module,
    loss_at: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    fit: Fit,
    path: Path,
    report: Callable[[int], dict[str, float]] | None = None,
) -> dict:
    """Train `module` in place for `fit.steps` steps and leave its averaged weights in it.

    `loss_at(step)` returns the loss and numbers to show; `report(step)` is called with the averaged weights in place,
    every `report_steps`. State is saved to `path` about once a minute; training resumes from it if it exists.
    Returns {"step", "seconds", "log"}.
    """
    averaged = _Averaged(module, fit, path)
    module.train()
    state = averaged.state
    began, saved = time.monotonic() - state["seconds"], time.monotonic()
    shown: dict[str, float] = {}
    for step in progress(range(state["step"], fit.steps), name, unit="step"):
        with torch.autocast("cpu", torch.bfloat16, enabled=fit.bf16):
            loss, numbers = loss_at(step)
        averaged.update(step, loss)
        for key, value in ({"loss": loss.item()} | numbers).items():
            shown[key] = 0.95 * shown.get(key, value) + 0.05 * value
        done = step + 1
        if done % fit.report_steps == 0 or done == fit.steps:
            line = {"step": done, "seconds": round(time.monotonic() - began)} | shown
            if report:
                with averaged.in_place():
                    line |= report(done)
            state["log"].append(line)
            print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in line.items()), file=sys.stderr)
        if done == fit.steps or time.monotonic() - saved > fit.save_seconds:
            averaged.save(done, time.monotonic() - began)
            saved = time.monotonic()
    averaged.leave()
    return state


class _Averaged:
    """A network in training: its weights, their moving average, and AdamW's moments, all saved in `path`."""

    def __init__(self, module: nn.Module, fit: Fit, path: Path) -> None:
        self.module, self.fit, self.path = module, fit, path
        self.named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.named.values(), lr=fit.lr, betas=(0.9, 0.99), weight_decay=fit.weight_decay
        )
        self.average = {n: p.detach().clone() for n, p in self.named.items()}
        self.state: dict[str, Any] = {"step": 0, "seconds": 0.0, "log": []}
        if path.exists():
            self._load()

    @torch.no_grad()
    def _load(self) -> None:
        tensors, self.state = load_tensors(self.path)
        for n, p in self.named.items():
            p.copy_(tensors[f"weight.{n}"])
            self.average[n].copy_(tensors[f"average.{n}"])
            if f"exp_avg.{n}" in tensors:
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(self.state["step"])),
                    "exp_avg": tensors[f"exp_avg.{n}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq.{n}"],
                }

    def save(self, step: int, seconds: float) -> None:
        self.state.update(step=step, seconds=seconds)
        tensors = {f"weight.{n}": p.detach() for n, p in self.named.items()}
        tensors |= {f"average.{n}": a for n, a in self.average.items()}
        for n, p in self.named.items():
            for key in ("exp_avg", "exp_avg_sq"):
                if p in self.optimizer.state:
                    tensors[f"{key}.{n}"] = self.optimizer.state[p][key]
        save_atomically(tensors, self.path, self.state)

    def update(self, step: int, loss: torch.Tensor) -> None:
        """Take an optimizer step, unless a gradient isn't finite, and move the average along."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.fit, step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.named.values(), self.fit.clip)
        if torch.isfinite(norm):
            self.optimizer.step()
        decay = min(self.fit.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            # pyrefly: ignore[no-matching-overload]
            torch._foreach_lerp_(list(self.average.values()), list(self.named.values()), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Use the averaged weights, in evaluation mode, until the context ends."""
        kept = {n: p.detach().clone() for n, p in self.named.items()}
        self.module.eval()
        with torch.no_grad():
            self._put(self.average)
            yield
            self._put(kept)
        self.module.train()

    def leave(self) -> None:
        """Leave the averaged weights in the module, in evaluation mode."""
        with torch.no_grad():
            self._put(self.average)
        self.module.eval()

    def _put(self, weights: Mapping[str, torch.Tensor]) -> None:
        for n, p in self.named.items():
            p.copy_(weights[n])
