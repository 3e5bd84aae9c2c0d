"""How to download the pretrained weights that a profile names."""

import re
from pathlib import Path

_BUNDLED = ("model/tiny-wan", "model/tiny-univigu")
_WAN = re.compile(r"Wan2\.\d-[\w.-]+")


def how_to_fetch(folder: Path) -> str:
    """What to do about a missing model folder: the command that downloads it, if its name identifies the model."""
    if _WAN.fullmatch(folder.name):
        name = folder.name if folder.name.endswith("-Diffusers") else f"{folder.name}-Diffusers"
        return f"fetch it with `hf download Wan-AI/{name} --local-dir {folder}`"
    if folder.as_posix().endswith(_BUNDLED):
        return f"it comes with the project: check --root, or restore it with `git checkout HEAD -- {folder}`"
    return "check --root and the profile, or fetch it (after `hf auth login` if its repository is gated)"
