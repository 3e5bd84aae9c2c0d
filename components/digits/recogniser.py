"""The recogniser, an independent judge for evaluation: a small convolutional network that reads a clip's attributes.

It shares nothing with the measuring captioner (`measure.py`), so a caption can't be scored by what wrote it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import nn

from components.digits import world
from components.digits.autoencoder import decode, encode, to_frames, to_tensor
from components.digits.training import Fit, train
from components.digits.worlds import DIGITS, World
from univigu.errors import BadInputError, MissingInputError

BUNDLED = Path(__file__).parent / "recogniser"
WATCHED = slice(0, world.FRAMES, 2)
PLACED = ("direction", "speed", "start", "end")


@dataclass
class RecogniserConfig:
    """Widths of the network and its training."""

    widths: list[int] = field(default_factory=lambda: [16, 32, 64, 96])
    place_width: int = 4
    hidden: int = 160
    rebuilt_clips: int = 2048
    fit: Fit = field(default_factory=lambda: Fit(steps=800, batch=64, lr=2e-3, weight_decay=0.02, ema=0.99))


def convolutions(channels: int, widths: list[int]) -> nn.Sequential:
    """Frames (N, channels, H, W) to maps (N, the last of four widths, H / 4, W / 4)."""
    first, second, third, fourth = widths

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()]

    return nn.Sequential(
        *block(channels, first),
        nn.MaxPool2d(2),
        *block(first, second),
        nn.MaxPool2d(2),
        *block(second, third),
        *block(third, fourth),
    )


class Recogniser(nn.Module):
    """Clip (B, 3, 9, 32, 32) in -1..1 -> logits per attribute. Maps are pooled, so the digit may be anywhere."""

    def __init__(self, widths: list[int], place_width: int, hidden: int) -> None:
        super().__init__()
        fourth = widths[-1]
        watched = len(range(world.FRAMES)[WATCHED])
        self.maps = convolutions(3, widths)
        self.place = nn.Conv2d(fourth, place_width, 1)
        look, path = 2 * fourth, watched * place_width * (world.SIZE // 4) ** 2
        self.look = nn.Sequential(nn.Linear(look, hidden), nn.SiLU(), nn.Dropout(0.1))
        self.path = nn.Sequential(nn.Linear(path, hidden), nn.SiLU(), nn.Dropout(0.1))
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, len(v)) for name, v in world.ATTRIBUTES.items()})

    def forward(self, clips: torch.Tensor) -> dict[str, torch.Tensor]:
        frames = clips[:, :, WATCHED].transpose(1, 2)
        maps = self.maps(frames.flatten(0, 1))
        pooled = torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], dim=1)
        look = self.look(pooled.unflatten(0, frames.shape[:2]).mean(1))
        path = self.path(self.place(maps).unflatten(0, frames.shape[:2]).flatten(1))
        return {name: head(path if name in PLACED else look) for name, head in self.heads.items()}


def _bend(scans: np.ndarray, seed: int) -> np.ndarray:
    """Rotate, stretch and shift scans (B, 8, 8) slightly, to augment a small data set."""
    rng = torch.Generator().manual_seed(seed)
    count = len(scans)
    matrix = torch.eye(2).repeat(count, 1, 1) + 0.11 * torch.randn(count, 2, 2, generator=rng)
    shift = 0.09 * torch.randn(count, 2, 1, generator=rng)
    grid = F.affine_grid(torch.cat([matrix, shift], dim=2), [count, 1, 16, 16], align_corners=False)
    ink = F.interpolate(torch.from_numpy(scans)[:, None], size=(16, 16), mode="bicubic", align_corners=False)
    return F.interpolate(F.grid_sample(ink, grid, align_corners=False), size=(8, 8), mode="area")[:, 0].numpy()


def rebuild(vae: AutoencoderKLWan, frames: np.ndarray, batch: int = 64) -> np.ndarray:
    """Frames encoded and decoded by the autoencoder, uint8 to uint8."""
    with torch.no_grad():
        parts = [to_tensor(frames[i : i + batch]) for i in range(0, len(frames), batch)]
        return np.concatenate([to_frames(decode(vae, encode(vae, part).mode())) for part in parts])


def fit_recogniser(
    vae: AutoencoderKLWan,
    config: RecogniserConfig,
    work: Path,
    seed: int,
    kind: World = DIGITS,
    build: Callable[[list[int], int, int], nn.Module] = Recogniser,
    look: Callable[[Any, np.ndarray], list[dict[str, str]]] | None = None,
) -> tuple[Any, dict]:
    """Train on clips of augmented training scans, a quarter of them encoded and decoded by the autoencoder first.

    build: makes the network from its sizes; look: what it sees in clips (`read`, for the first world's).
    """
    torch.manual_seed(seed)
    network: Any = build(config.widths, config.place_width, config.hidden)
    held_out, truth = kind.draw_clips(512, 11, world.heldout_scans())
    pool, pool_scenes = kind.draw_clips(config.rebuilt_clips, seed + 77)
    pool = rebuild(vae, pool)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng((seed, step))
        fresh = config.fit.batch - config.fit.batch // 4
        scenes = [kind.sample(rng) for _ in range(fresh)]
        scans = kind.draw_scans(scenes, world.train_scans(), step)
        scans = _bend(scans.reshape(-1, 8, 8), step).reshape(scans.shape)
        chosen = rng.integers(len(pool), size=config.fit.batch - fresh)
        clips = to_tensor(np.concatenate([kind.render(scenes, scans, step), pool[chosen]]))
        scenes += [pool_scenes[i] for i in chosen]
        torch.manual_seed(seed * 1_000_003 + step)
        clips = clips + 0.08 * torch.rand(len(clips), 1, 1, 1, 1) * torch.randn_like(clips)
        logits = network(clips)
        losses = {
            name: F.cross_entropy(found, _classes(kind.questions[name], [scene.get(name) for scene in scenes]))
            for name, found in logits.items()
        }
        # the digit is the hardest to read, so it counts twice
        return torch.stack(list(losses.values())).sum() + sum(
            loss for name, loss in losses.items() if name.startswith("digit")
        ), {}

    def report(_: int) -> dict[str, float]:
        return share_right(look(network, held_out) if look else read(network, held_out), truth)

    state = train("recogniser", network, loss_at, config.fit, work / "recogniser.safetensors", report)
    return network, state


def _classes(values: tuple[str, ...], given: Sequence[str | None]) -> torch.Tensor:
    """The class of each value; the one behind the last value for none."""
    return torch.tensor([len(values) if value is None else values.index(value) for value in given])


def share_right(seen: Sequence[Mapping[str, str]], truth: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """For each kind of fact of the true scenes, the share that was seen right, and the ``mean`` of these shares."""
    right: dict[str, list[bool]] = {}
    for found, facts in zip(seen, truth, strict=True):
        for name, value in facts.items():
            right.setdefault(name.partition(":")[0], []).append(found.get(name) == value)
    shares = {name: float(np.mean(hits)) for name, hits in right.items()}
    return {"mean": float(np.mean(list(shares.values())))} | shares


def save_recogniser(network: nn.Module, config: RecogniserConfig, folder: Path) -> None:
    """Weights as safetensors, sizes as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)
    sizes = {key: asdict(config)[key] for key in ("widths", "place_width", "hidden")}
    (folder / "config.json").write_text(json.dumps(sizes, indent=2) + "\n")


@cache
def load_recogniser(folder: Path = BUNDLED) -> Recogniser:
    """Load a recogniser, by default the bundled one; raises `MissingInputError` if it is missing."""
    if not (folder / "model.safetensors").exists():
        raise MissingInputError(f"The recogniser is not in {folder}; run `univigu pretrain` to make it.")
    network = Recogniser(**json.loads((folder / "config.json").read_text()))
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network.eval()


@torch.no_grad()
def read(network: Recogniser, frames: np.ndarray, batch: int = 128) -> list[dict[str, str]]:
    """Like `recognise`, with a given network."""
    seen: list[dict[str, str]] = [{} for _ in frames]
    for i in range(0, len(frames), batch):
        for name, logits in network(to_tensor(frames[i : i + batch])).items():
            for row, best in enumerate(logits.argmax(1).tolist()):
                seen[i + row][name] = world.ATTRIBUTES[name][best]
    return seen


def recognise(frames: np.ndarray) -> list[dict[str, str]]:
    """Clips uint8 (B, 9, 32, 32, 3) -> the seven attributes of each, as the bundled network reads them."""
    shape = (world.FRAMES, world.SIZE, world.SIZE, 3)
    if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[1:] != shape:
        raise BadInputError(f"The recogniser reads uint8 clips of {shape}, not {frames.dtype} {frames.shape}.")
    return read(load_recogniser(), frames)
