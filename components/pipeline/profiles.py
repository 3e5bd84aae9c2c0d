"""Profiles: one YAML file of parameters each; code never asks which one it is in."""

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from univigu.errors import ConfigError

PARAMS = "params.yaml"


def profile_names() -> list[str]:
    """The profiles that come with the project."""
    folder = resources.files("components") / "profiles"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def load_profile(name: str) -> dict[str, Any]:
    """Read a profile by its name, or by the path of a YAML file; raises `ConfigError` where there is none."""
    import yaml

    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        if name not in profile_names():
            raise ConfigError(
                f"There is no profile '{name}'; choose one of {', '.join(profile_names())}, or give a YAML file's path."
            )
        path = _bundled(name)
    try:
        profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no profile file {path}; check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The profile {path} is not readable YAML ({str(error).splitlines()[0]}); mend it."
        ) from error
    if not isinstance(profile, dict):
        raise ConfigError(f"The profile {path} is not a table of parameters; see {profile_names()} for examples.")
    missing = sorted(_keys(yaml.safe_load(_bundled("tiny").read_text(encoding="utf-8"))) - _keys(profile))
    if missing:
        raise ConfigError(f"The profile {path} lacks {', '.join(missing)}; the bundled profile 'tiny' shows them.")
    return profile


def watched(profile: Mapping[str, Any]) -> dict[str, str]:
    """The paths of a profile that ``dvc.yaml`` watches, by their keys: DVC can't look them up in the profile itself."""
    from components.pipeline.stages import STAGES

    return {key: profile[key] for key in sorted({key for stage in STAGES for key in stage.sources.values()})}


def use_profile(name: str, root: Path) -> dict[str, str]:
    """Make `name` what ``dvc repro`` below `root` runs: writes ``params.yaml``, if it says something else.

    Returns what DVC watches of it. Raises `ConfigError` for a profile that is not among those of the project.
    """
    if name not in profile_names():
        raise ConfigError(
            f"There is no profile '{name}' in components/profiles; choose one of {', '.join(profile_names())}."
        )
    paths = watched(load_profile(name))
    lines = [f"profile: {name}", "# What dvc.yaml watches of it; `univigu use NAME` writes this file."]
    text = "\n".join([*lines, *(f"{key}: {path}" for key, path in paths.items())]) + "\n"
    path = root / PARAMS
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return paths


def check_watched(name: str, profile: Mapping[str, Any], root: Path) -> None:
    """In a stage of DVC's, refuse a profile of which ``params.yaml`` has DVC watch other paths than it reads.

    As after ``dvc exp run -S profile=NAME`` between profiles whose bases differ. Raises `ConfigError`.
    """
    import yaml

    if "DVC_STAGE" not in os.environ or not (root / PARAMS).is_file():
        return
    said = yaml.safe_load((root / PARAMS).read_text(encoding="utf-8"))
    differing = [key for key, path in watched(profile).items() if said.get(key) != path]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"The profile '{name}' has the {key} {profile[key]}, and {PARAMS} has DVC watch {said.get(key)}; run"
            f" `univigu use {name}` first, or give -S {key}={profile[key]} too."
        )


def _bundled(name: str) -> Path:
    return Path(str(resources.files("components") / "profiles" / f"{name}.yaml"))


def _keys(profile: dict[str, Any]) -> set[str]:
    """Every section, and every ``section.key``."""
    sections = {name: values for name, values in profile.items() if isinstance(values, dict)}
    return set(profile) | {f"{name}.{key}" for name, values in sections.items() for key in values}
