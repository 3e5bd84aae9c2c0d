"""The pretrained weights that a profile names: the hub repository that has them, and how to download them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.pipeline.manifests import inside
from univigu.errors import BadInputError, ConfigError

_BUNDLED = ("model/tiny-wan", "model/tiny-univigu")
_WAN = re.compile(r"Wan2\.\d-[\w.-]+")
KEYS = ("base", "generator")  # of a profile, whose values are folders of weights


def repository_of(folder: Path) -> str | None:
    """The hub repository whose download the folder is by its name, in diffusers' layout; None for other names."""
    if not _WAN.fullmatch(folder.name):
        return None
    return f"Wan-AI/{folder.name if folder.name.endswith('-Diffusers') else f'{folder.name}-Diffusers'}"


def how_to_fetch(folder: Path) -> str:
    """What to do about a missing model folder: the command that downloads it, if its name identifies the model."""
    if repository := repository_of(folder):
        return f"fetch it with `univigu fetch {repository} --to {folder}`"
    if folder.as_posix().endswith(_BUNDLED):
        return f"it comes with the project: check --root, or restore it with `git checkout HEAD -- {folder}`"
    return "check --root and the profile, or fetch it: `univigu fetch OWNER/NAME --to FOLDER`"


def missing_weights(profile: Mapping[str, Any], root: Path) -> dict[Path, str]:
    """The folders of a profile's weights that don't exist, with the hub repository of each.

    Raises `ConfigError` for one whose repository is not known.
    """
    found = {}
    for key in KEYS:
        folder = inside(root, profile[key])
        if folder.exists():
            continue
        repository = repository_of(folder)
        if repository is None:
            raise ConfigError(
                f"The profile's '{key}' is {profile[key]}, whose name is no known repository's; name one: "
                f"`univigu fetch OWNER/NAME --to {profile[key]}`."
            )
        found[folder] = repository
    return found


def fetch(repository: str, folder: Path, revision: str | None = None) -> Path:
    """Download what is missing of a hub repository's model into `folder`, which may hold a part of it.

    Only weights in safetensors, configurations, tokenizers and the README are downloaded. Raises like
    `univigu.wan.local_folder`, and `BadInputError` for a name that is no repository's.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repository):
        raise BadInputError(f"'{repository}' is no hub repository; give OWNER/NAME, such as {_EXAMPLE}.")
    from univigu.wan import download

    return download(repository, local_dir=folder, revision=revision)


_EXAMPLE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
