"""Profiles: a YAML file of settings each, which may extend another; code never asks which one it is in.

What the settings are, and what is wrong in a profile, is known to `components.settings`, which is imported when a
profile is read, since pydantic takes a tenth of a second.
"""

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.pipeline.stages import STAGES
from univigu.errors import ConfigError
from univigu.files import read_yaml

if TYPE_CHECKING:
    from components.settings.layers import Layer

PARAMS = "params.yaml"
MOST_FAULTS = 50  # in one message
MOST_KEYS = 5  # in its first line


def profile_names() -> list[str]:
    """The profiles that come with the project."""
    folder = resources.files("components") / "profiles"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def load_profile(spec: str) -> dict[str, Any]:
    """The settings of a profile, complete and checked, as the plain mapping whose values a recipe hashes.

    spec: a bundled profile's name, or the path of a YAML file; after a space, as JSON, what is set otherwise
    (`with_settings`). Raises `ConfigError` that names every key that doesn't fit, where it is, and what would do.
    """
    from components.settings.faults import dotted
    from components.settings.layers import find_origin
    from components.settings.profile import find_faults

    values, layers = _read(spec)
    if faults := find_faults(values):
        said = [f"{find_origin(path, layers)}: {dotted(path)} {text}" for path, text in faults]
        keys = [dotted(path) for path, _ in faults]
        raise ConfigError(_say_all(spec, said, keys))
    return values


def with_settings(spec: str, settings: Sequence[str]) -> str:
    """A profile with ``section.key=VALUE`` set otherwise, as text for `load_profile`, wherever a profile is named.

    Every process and every step that is given this text reads the same settings. Raises `ConfigError` for what can't
    be read; whether the keys are right is up to `load_profile`.
    """
    from components.settings.layers import join_spec, parse_settings

    return join_spec(spec, parse_settings(settings)) if settings else spec


def absolute_profile(spec: str) -> str:
    """The same profile for a process that works in another folder: a file's path made absolute."""
    from components.settings.layers import join_spec, split_spec

    name, changes = split_spec(spec)
    path = Path(name)
    return join_spec(str(path.resolve()) if path.suffix in {".yaml", ".yml"} else name, changes)


def profile_files(spec: str) -> list[Path]:
    """The files that a profile is made of, without those that come with the project; raises as `load_profile` does."""
    _, layers = _read(spec)
    bundled = {_bundled(name) for name in profile_names()}
    return [path for layer in layers if (path := Path(layer.name)).suffix and path not in bundled]


def profile_parents(spec: str) -> list[str]:
    """What a profile extends, the nearest first, by names or paths; raises as `load_profile` does."""
    _, layers = _read(spec)
    bundled = {str(_bundled(name)): name for name in profile_names()}
    files = [bundled.get(layer.name, layer.name) for layer in layers if Path(layer.name).suffix]
    return files[-2::-1]


def find_profile(name: str) -> Path:
    """The file of a bundled profile, or the path that `name` is; raises `ConfigError` for an unknown name."""
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        return path
    if name not in profile_names():
        raise ConfigError(
            f"There is no profile '{name}'; choose one of {', '.join(profile_names())}, or give a YAML file's path."
        )
    return _bundled(name)


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


def settings_page() -> str:
    """The page of all settings, as Markdown."""
    from components.settings.reference import write_page

    return write_page()


def settings_schema() -> dict[str, Any]:
    """The JSON schema of a profile's file, for editors."""
    from components.settings.reference import file_schema

    return file_schema()


def _say_all(spec: str, said: Sequence[str], keys: Sequence[str]) -> str:
    """One message for all faults. Its first line names keys, as orchestrators pass on no more than that line."""
    if len(said) == 1:
        return f"{said[0]}."
    some = ", ".join(keys[:MOST_KEYS]) + (", ..." if len(keys) > MOST_KEYS else "")
    more = [f"and {len(said) - MOST_FAULTS} more"] if len(said) > MOST_FAULTS else []
    return "\n  ".join([f"The profile {spec} has {len(said)} faults ({some}):", *said[:MOST_FAULTS], *more])


def _bundled(name: str) -> Path:
    return Path(str(resources.files("components") / "profiles" / f"{name}.yaml"))


def _read(spec: str) -> "tuple[dict[str, Any], list[Layer]]":
    """The settings of a profile, not checked yet, and the layers that they come from."""
    from components.settings.layers import SET, Layer, combine, read_layers, set_value, split_spec
    from components.settings.profile import schema

    name, changes = split_spec(spec)
    layers = read_layers(find_profile(name), lambda parent: _bundled(parent) if parent in profile_names() else None)
    values = combine(layers, schema())
    if changes:
        said: dict[str, Any] = {}
        for key, value in changes.items():
            values, said = (set_value(one, key.split("."), value) for one in (values, said))
        layers = [*layers, Layer(SET, said)]
    return values, layers
