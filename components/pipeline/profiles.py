"""Profiles: one YAML file of parameters each; code never asks which one it is in."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from components.pipeline.stages import STAGES
from univigu.errors import ConfigError
from univigu.files import read_yaml

PARAMS = "params.yaml"


def profile_names() -> list[str]:
    """The profiles that come with the project."""
    folder = resources.files("components") / "profiles"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def load_profile(name: str) -> dict[str, Any]:
    """Read a profile by its name, or by the path of a YAML file; raises `ConfigError` where there is none."""
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        if name not in profile_names():
            raise ConfigError(
                f"There is no profile '{name}'; choose one of {', '.join(profile_names())}, or give a YAML file's path."
            )
        path = _bundled(name)
    try:
        profile = read_yaml(path)
    except FileNotFoundError as error:
        raise ConfigError(f"There is no profile file {path}; check the path.") from error
    except ValueError as error:
        raise ConfigError(f"The profile {path} is not readable YAML ({error}); correct it.") from error
    if not isinstance(profile, dict):
        raise ConfigError(f"The profile {path} is not a table of parameters; see {profile_names()} for examples.")
    missing = sorted(_keys(_examples()["tiny"]) - _keys(profile))
    if missing:
        raise ConfigError(f"The profile {path} lacks {', '.join(missing)}; the bundled profile 'tiny' shows them.")
    _check_kinds(profile, list(_examples().values()), str(path), "")
    return profile


def watched(profile: Mapping[str, Any]) -> dict[str, str]:
    """The paths of a profile that ``dvc.yaml`` watches, by their keys: DVC can't look them up in the profile itself."""

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
    if "DVC_STAGE" not in os.environ or not (root / PARAMS).is_file():
        return
    said = read_yaml(root / PARAMS)
    differing = [key for key, path in watched(profile).items() if said.get(key) != path]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"The profile '{name}' has the {key} {profile[key]}, and {PARAMS} has DVC watch {said.get(key)}; run"
            f" `univigu use {name}` first, or give -S {key}={profile[key]} too."
        )


def _bundled(name: str) -> Path:
    return Path(str(resources.files("components") / "profiles" / f"{name}.yaml"))


@functools.cache
def _examples() -> dict[str, dict[str, Any]]:
    """The bundled profiles by name; nobody changes them."""
    return {name: read_yaml(_bundled(name)) for name in profile_names()}


def _check_kinds(value: Any, examples: Sequence[Any], path: str, key: str) -> None:
    """Raise `ConfigError` where a profile has another kind of value than the bundled ones have in that place."""
    if isinstance(value, Mapping) and {} not in examples:  # else it is somebody else's, as a captioner's options are
        for name, entry in value.items():
            found = [example[name] for example in examples if isinstance(example, Mapping) and name in example]
            _check_kinds(entry, found, path, f"{key}.{name}" if key else name)
    known = [example for example in examples if example is not None]
    if not known or (value is None and len(known) < len(examples)):
        return
    wrong = f"'{key}' in the profile {path} is {json.dumps(value, default=str)}"
    kinds = {type(example) for example in known}
    if kinds <= {int, float}:
        whole = kinds == {int}
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            hint = " (to YAML, 2e-3 is a text, and 2.0e-3 a number)" if "e" in str(value) and not whole else ""
            raise ConfigError(f"{wrong}; give it a {'whole ' if whole else ''}number, such as {known[0]}{hint}.")
        if value < 0 <= min(known) or (value == 0 and key.endswith("_size")):
            raise ConfigError(f"{wrong}; give it a number above that, such as {known[0]}.")
    elif kinds == {list}:
        if not isinstance(value, list):
            raise ConfigError(f"{wrong}; give it a list, such as {json.dumps(known[0])}.")
        entries = [entry for example in known for entry in example]
        for entry in value:
            if not isinstance(entry, list):
                _check_kinds(entry, entries, path, key)
    elif kinds == {dict} and not isinstance(value, Mapping):
        raise ConfigError(f"{wrong}; give it a table, as the bundled profile 'tiny' does.")


def _keys(profile: dict[str, Any]) -> set[str]:
    """Every section, and every ``section.key``."""
    sections = {name: values for name, values in profile.items() if isinstance(values, dict)}
    return set(profile) | {f"{name}.{key}" for name, values in sections.items() for key in values}
