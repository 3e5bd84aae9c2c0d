"""Profiles: YAML files of settings, which may extend each other. Code never checks which profile it runs with.

`components.settings` defines the settings and finds faults in a profile. It is imported only when a profile is read,
because importing pydantic takes a tenth of a second.
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
    """The names of the bundled profiles."""
    folder = resources.files("components") / "profiles"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def load_profile(spec: str) -> dict[str, Any]:
    """The settings of a profile, complete and checked, as the plain mapping whose values a recipe hashes.

    spec: a bundled profile's name or the path of a YAML file, optionally followed by a space and changed settings as
    JSON (`with_settings`). Raises `ConfigError` that lists each invalid key, its place and what is allowed there.
    """
    from components.settings.faults import dotted
    from components.settings.layers import find_origin
    from components.settings.profile import find_faults

    values, layers = _read(spec)
    if faults := find_faults(values):
        messages = [f"{find_origin(path, layers)}: {dotted(path)} {text}" for path, text in faults]
        keys = [dotted(path) for path, _ in faults]
        raise ConfigError(_list_faults(spec, messages, keys))
    return values


def with_settings(spec: str, settings: Sequence[str]) -> str:
    """A profile spec with changed settings (``section.key=VALUE``), accepted wherever a profile is named.

    Every process that is given this text reads the same settings. Raises `ConfigError` for a setting that can't be
    parsed; `load_profile` checks the keys.
    """
    from components.settings.layers import join_spec, parse_settings

    return join_spec(spec, parse_settings(settings)) if settings else spec


def absolute_profile(spec: str) -> str:
    """The same profile spec for a process in another folder: a file's path is made absolute."""
    from components.settings.layers import join_spec, split_spec

    name, changes = split_spec(spec)
    path = Path(name)
    return join_spec(str(path.resolve()) if path.suffix in {".yaml", ".yml"} else name, changes)


def profile_files(spec: str) -> list[Path]:
    """The files of a profile except the bundled ones; raises like `load_profile`."""
    _, layers = _read(spec)
    bundled = {_bundled(name) for name in profile_names()}
    return [path for layer in layers if (path := Path(layer.name)).suffix and path not in bundled]


def profile_parents(spec: str) -> list[str]:
    """The names or paths of the profiles that a profile extends, nearest first; raises like `load_profile`."""
    _, layers = _read(spec)
    bundled = {str(_bundled(name)): name for name in profile_names()}
    files = [bundled.get(layer.name, layer.name) for layer in layers if Path(layer.name).suffix]
    return files[-2::-1]


def find_profile(name: str) -> Path:
    """The file of a bundled profile, or `name` as a path to a YAML file; raises `ConfigError` for an unknown name."""
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        return path
    if name not in profile_names():
        raise ConfigError(
            f"There is no profile '{name}'; choose one of {', '.join(profile_names())}, or give a YAML file's path."
        )
    return _bundled(name)


def watched(profile: Mapping[str, Any]) -> dict[str, str]:
    """The paths of a profile that ``dvc.yaml`` watches, by key: DVC can't read them from the profile."""
    return {key: profile[key] for key in sorted({key for stage in STAGES for key in stage.sources.values()})}


def use_profile(name: str, root: Path) -> dict[str, str]:
    """Make ``dvc repro`` under `root` run the profile `name`: writes ``params.yaml`` if it differs.

    Returns the paths that DVC watches. Raises `ConfigError` for a profile that isn't bundled.
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
    """In a DVC stage, raise `ConfigError` if ``params.yaml`` makes DVC watch other paths than the profile reads.

    This happens after ``dvc exp run -S profile=NAME`` if the two profiles have different bases.
    """
    if "DVC_STAGE" not in os.environ or not (root / PARAMS).is_file():
        return
    params = read_yaml(root / PARAMS)
    differing = [key for key, path in watched(profile).items() if params.get(key) != path]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"The profile '{name}' reads {profile[key]} as its {key}, but DVC watches {params.get(key)} ({PARAMS}); run"
            f" `univigu use {name}` first, or add -S {key}={profile[key]}."
        )


def require_longer_captions(profile: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if a profile's captions may be as short as its prompts."""
    from components.settings.sections import Text

    Text.model_validate(profile["text"]).require_longer_captions()


def settings_page() -> str:
    """The page of all settings, as Markdown."""
    from components.settings.reference import write_page

    return write_page()


def settings_schema() -> dict[str, Any]:
    """The JSON schema of a profile's file, for editors."""
    from components.settings.reference import file_schema

    return file_schema()


def _list_faults(spec: str, messages: Sequence[str], keys: Sequence[str]) -> str:
    """One message for all faults. Its first line lists keys, because orchestrators show only the first line."""
    if len(messages) == 1:
        return f"{messages[0]}."
    some = ", ".join(keys[:MOST_KEYS]) + (", ..." if len(keys) > MOST_KEYS else "")
    more = [f"and {len(messages) - MOST_FAULTS} more"] if len(messages) > MOST_FAULTS else []
    return "\n  ".join([f"The profile {spec} has {len(messages)} faults ({some}):", *messages[:MOST_FAULTS], *more])


def _bundled(name: str) -> Path:
    return Path(str(resources.files("components") / "profiles" / f"{name}.yaml"))


def _read(spec: str) -> "tuple[dict[str, Any], list[Layer]]":
    """The settings of a profile, not validated yet, and the layers that they come from."""
    from components.settings.layers import SET, Layer, combine, read_layers, set_value, split_spec
    from components.settings.profile import schema

    name, changes = split_spec(spec)
    layers = read_layers(find_profile(name), lambda parent: _bundled(parent) if parent in profile_names() else None)
    values = combine(layers, schema())
    if changes:
        changed: dict[str, Any] = {}
        for key, value in changes.items():
            values, changed = (set_value(one, key.split("."), value) for one in (values, changed))
        layers = [*layers, Layer(SET, changed)]
    return values, layers
