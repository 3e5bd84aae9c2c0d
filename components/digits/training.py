"""The training loop of all pretrained networks: resumable, with a moving average of the weights.

Every step draws its data from its own number, so a run that was killed and resumed sees what an uninterrupted one sees.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
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
    """The training settings of one network."""

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
    """One safetensors file, `note` as JSON in its metadata; readers find the old file or the new one, never a part."""
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
    """Trains `module` in place for `fit.steps` steps and leaves its averaged weights in it.

    `loss_at(step)` returns the loss and numbers to show; `report(step)` is called with the averaged weights in place,
    every `report_steps`. State goes to `path` about once a minute; when it is there, training goes on from it.
    Returns {"step", "seconds", "log"}.
    """
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=fit.lr, betas=(0.9, 0.99), weight_decay=fit.weight_decay)
    average = {n: p.detach().clone() for n, p in named.items()}
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "log": []}
    if path.exists():
        tensors, state = load_tensors(path)
        with torch.no_grad():
            for n, p in named.items():
                p.copy_(tensors[f"weight.{n}"])
                average[n].copy_(tensors[f"average.{n}"])
                if f"exp_avg.{n}" in tensors:
                    optimizer.state[p] = {
                        "step": torch.tensor(float(state["step"])),
                        "exp_avg": tensors[f"exp_avg.{n}"],
                        "exp_avg_sq": tensors[f"exp_avg_sq.{n}"],
                    }

    def save(step: int, seconds: float) -> None:
        state.update(step=step, seconds=seconds)
        tensors = {f"weight.{n}": p.detach() for n, p in named.items()} | {
            f"average.{n}": a for n, a in average.items()
        }
        for n, p in named.items():
            for key in ("exp_avg", "exp_avg_sq"):
                if p in optimizer.state:
                    tensors[f"{key}.{n}"] = optimizer.state[p][key]
        save_atomically(tensors, path, state)

    def averaged_report(step: int) -> dict[str, float]:
        kept = {n: p.detach().clone() for n, p in named.items()}
        module.eval()
        with torch.no_grad():
            for n, p in named.items():
                p.copy_(average[n])
            # pyrefly: ignore[not-callable]
            numbers = report(step)
            for n, p in named.items():
                p.copy_(kept[n])
        module.train()
        return numbers

    module.train()
    began, saved = time.monotonic() - state["seconds"], time.monotonic()
    shown: dict[str, float] = {}
    for step in progress(range(state["step"], fit.steps), name, unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(fit, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=fit.bf16):
            loss, numbers = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(named.values(), fit.clip)
        if torch.isfinite(norm):
            optimizer.step()
        decay = min(fit.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            # pyrefly: ignore[no-matching-overload]
            torch._foreach_lerp_(list(average.values()), list(named.values()), 1 - decay)
        for key, value in ({"loss": loss.item()} | numbers).items():
            shown[key] = 0.95 * shown.get(key, value) + 0.05 * value
        done = step + 1
        if done % fit.report_steps == 0 or done == fit.steps:
            line = {"step": done, "seconds": round(time.monotonic() - began)} | shown
            line |= averaged_report(done) if report else {}
            state["log"].append(line)
            print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in line.items()), file=sys.stderr)
        if done == fit.steps or time.monotonic() - saved > fit.save_seconds:
            save(done, time.monotonic() - began)
            saved = time.monotonic()
    with torch.no_grad():
        for n, p in named.items():
            p.copy_(average[n])
    module.eval()
    return state
