"""The recogniser of stories: one small network that looks for a colour, and reads that digit's look and movement.

It is asked about each colour in turn, with how close every pixel is to that colour as a fourth channel, so what it
learns about one colour holds for all. Like the first world's, it shares nothing with what writes captions.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from components.digits import world
from components.digits.autoencoder import to_tensor
from components.digits.recogniser import convolutions
from components.digits.stories import scenes
from univigu.errors import MissingInputError

BUNDLED = Path(__file__).parent / "recogniser-weights"
WATCHED = slice(0, world.FRAMES, 2)
LOOKED_FOR = 3  # colours per step of training
NEAR = 0.35  # distance in RGB (-1..1) at which a pixel is 1/e as close
PARTS = {name.partition(":")[0]: values for name, values in scenes.questions().items() if name != "background"}


class StoryRecogniser(nn.Module):
    """Clip (B, 3, 9, 32, 32) in -1..1 -> logits per question; the last of a colour's classes is "none".

    In training it answers for some colours only, drawn from torch's generator.
    """

    def __init__(self, widths: list[int], place_width: int, hidden: int) -> None:
        super().__init__()
        fourth = widths[-1]
        watched = len(range(world.FRAMES)[WATCHED])
        self.maps = convolutions(4, widths)
        self.place = nn.Conv2d(fourth, place_width, 1)
        path = watched * place_width * (world.SIZE // 4) ** 2
        self.look = nn.Sequential(nn.Linear(2 * fourth, hidden), nn.SiLU(), nn.Dropout(0.1))
        self.path = nn.Sequential(nn.Linear(path, hidden), nn.SiLU(), nn.Dropout(0.1))
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, len(values) + 1) for name, values in PARTS.items()})
        self.background = nn.Linear(2 * fourth, len(world.BACKGROUNDS))
        palette = torch.tensor([world.COLOURS[colour] for colour in scenes.COLOURS], dtype=torch.float32)
        self.register_buffer("palette", palette / 127.5 - 1, persistent=False)

    def forward(self, clips: torch.Tensor) -> dict[str, torch.Tensor]:
        count = len(scenes.COLOURS)
        chosen = torch.randperm(count)[:LOOKED_FOR].tolist() if self.training else range(count)
        frames = clips[:, :, WATCHED].transpose(1, 2)  # (B, W, 3, H, W)
        found = {}
        for index in chosen:
            away = (frames - self.palette[index].view(3, 1, 1)).pow(2).sum(2, keepdim=True)
            seen = torch.cat([frames, torch.exp(-away / NEAR**2)], dim=2)
            maps = self.maps(seen.flatten(0, 1))
            pooled = torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], dim=1).unflatten(0, frames.shape[:2])
            look = self.look(pooled.mean(1))
            path = self.path(self.place(maps).unflatten(0, frames.shape[:2]).flatten(1))
            found.setdefault("background", self.background(pooled.mean(1)))
            for name, head in self.heads.items():
                found[f"{name}:{scenes.COLOURS[index]}"] = head(look if name == "digit" else path)
        return found


@cache
def load_recogniser(folder: Path = BUNDLED) -> StoryRecogniser:
    """Load a recogniser; raises `MissingInputError` if it is missing."""
    if not (folder / "model.safetensors").exists():
        raise MissingInputError(
            f"There is no recogniser in {folder}; run `univigu pretrain --world stories` to make it."
        )
    network = StoryRecogniser(**json.loads((folder / "config.json").read_text()))
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network.eval()


@torch.no_grad()
def read(network: StoryRecogniser, frames: np.ndarray, batch: int = 64) -> list[dict[str, str]]:
    """Clips uint8 (B, 9, 32, 32, 3) -> the facts that the network sees in each, and what follows from them.

    Relations are added where it sees exactly two digits whose movements exist.
    """
    questions = scenes.questions()
    seen: list[dict[str, str]] = [{} for _ in frames]
    for i in range(0, len(frames), batch):
        for name, logits in network(to_tensor(frames[i : i + batch])).items():
            for row, best in enumerate(logits.argmax(1).tolist()):
                if best < len(questions[name]):
                    seen[i + row][name] = questions[name][best]
    for facts in seen:
        for colour in set(scenes.COLOURS) - set(scenes.colours_of(facts)):
            for part in PARTS:
                facts.pop(f"{part}:{colour}", None)
        facts |= scenes.relations(facts)
    return seen
