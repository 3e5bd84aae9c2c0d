"""Where pretrained weights come from that a profile names and nobody has fetched yet."""

import re
from pathlib import Path

_WAN = re.compile(r"Wan2\.\d-[\w.-]+")


def how_to_fetch(folder: Path) -> str:
    """The command that fetches a model's folder, where its name says which it is; otherwise, what else to do."""
    if _WAN.fullmatch(folder.name):
        name = folder.name if folder.name.endswith("-Diffusers") else f"{folder.name}-Diffusers"
        return f"fetch it with `hf download Wan-AI/{name} --local-dir {folder}`"
    return "check --root and the profile, and fetch it (after `hf auth login`, where its repository is gated)"
