"""Profiles as layers: a file's own settings over those of the profile that it extends, and ``--set`` over both.

A table is merged with the parent's key by key; a list or a single value replaces the parent's. A table whose keys a
plug-in defines (a captioner's options) is replaced as a whole, since its keys mean nothing to another plug-in.
"""

import errno
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from components.settings.fields import REPLACED
from components.settings.schema_words import look_up
from univigu.errors import ConfigError
from univigu.files import parse_yaml, read_yaml

EXTENDS = "extends"
SET = "--set"
_NO_FILE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_SPEC = re.compile(r"(.+?) (\{.*\})", re.DOTALL)


class Layer(NamedTuple):
    """The settings of one file or of the command line."""

    name: str  # for messages: a file, or ``--set``
    values: Mapping[str, Any]  # without ``extends``


def read_layers(path: Path, find: Callable[[str], Path | None]) -> list[Layer]:
    """A profile's file and all files that it extends, the topmost parent first.

    find: the file of a bundled profile, or None for an unknown name. Any other parent is the path of a YAML file,
    relative to the file that names it. Raises `ConfigError` for a file that is missing or isn't a table, for an unknown
    parent, and for profiles that extend each other in a circle.
    """
    layers: list[Layer] = []
    seen: list[Path] = []
    while True:
        values = _read(path, seen)
        seen.append(path)
        layers.insert(0, Layer(str(path), {key: value for key, value in values.items() if key != EXTENDS}))
        if EXTENDS not in values:
            return layers
        parent = _find_parent(values[EXTENDS], path, find)
        if os.path.abspath(parent) in map(os.path.abspath, seen):
            circle = " extends ".join(str(one) for one in [*seen, parent])
            raise ConfigError(f"Profiles extend each other in a circle: {circle}; remove one `extends`.")
        path = parent


def combine(layers: Sequence[Layer], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the layers; later ones override earlier ones."""
    values: dict[str, Any] = {}
    for layer in layers:
        values = _merge(values, layer.values, (), schema)
    return values


def set_value(values: Mapping[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    """`values` with another value at ``keys[0].keys[1]...``; missing tables are created."""
    first, *rest = keys
    inner = values.get(first)
    new = set_value(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value
    return {**values, first: new}


def find_origin(path: Sequence[str | int], layers: Sequence[Layer]) -> str:
    """The name of the last layer that sets `path`; the profile's own file if none does."""
    for layer in reversed(layers):
        if _sets(layer.values, path):
            return layer.name
    files = [layer.name for layer in layers if layer.name != SET]
    return files[-1]


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """``section.key=VALUE`` as ``{"section.key": value}``; each value is read as YAML.

    Raises `ConfigError` that lists all texts that can't be parsed.
    """
    found, faults = {}, []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            faults.append(f"'{text}' is not section.key=VALUE, such as train_stage_2.steps=500")
            continue
        try:
            found[key] = parse_yaml(value)
        except ValueError as error:
            faults.append(f"the value in '{text}' is not YAML ({error})")
    if faults:
        raise ConfigError(f"{SET} can't be read: {'; '.join(faults)}.")
    return found


def join_spec(name: str, changes: Mapping[str, Any]) -> str:
    """A profile's name and changed settings as one text, which `load_profile` accepts like a name."""
    old_name, old = split_spec(name)
    both = {**old, **changes}
    return f"{old_name} {json.dumps(both, default=str)}" if both else old_name


def split_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """The name, or path, and the changes in ``tiny {"train_stage_2.steps": 500}``; raises `ConfigError`."""
    match = _SPEC.fullmatch(spec)
    if not match:
        return spec, {}
    try:
        changes = parse_yaml(match[2])
    except ValueError as error:
        raise ConfigError(f"The settings after the profile in '{spec}' can't be read ({error}).") from error
    if not all(isinstance(key, str) for key in changes):
        raise ConfigError(f"The settings after the profile in '{spec}' need keys such as train_stage_2.steps.")
    return match[1], changes


def _read(path: Path, children: Sequence[Path]) -> dict[str, Any]:
    child = f", which {children[-1]} extends" if children else ""
    try:
        values = read_yaml(path)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise ConfigError(f"There is no profile file {path}{child}; check the path.") from error
    except ValueError as error:
        raise ConfigError(f"The profile {path}{child} is not readable YAML ({error}); correct it.") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"The profile {path}{child} is not a table of settings; see `univigu profile show tiny`.")
    return values


def _find_parent(parent: Any, path: Path, find: Callable[[str], Path | None]) -> Path:
    shown = json.dumps(parent, default=str)
    if not isinstance(parent, str) or not parent:
        raise ConfigError(f"'extends' in the profile {path} is {shown}; give a bundled profile's name or a YAML file.")
    if Path(parent).suffix in {".yaml", ".yml"}:
        return path.parent / parent
    if (found := find(parent)) is None:
        raise ConfigError(
            f"'extends' in the profile {path} is {shown}, which doesn't exist; use one of `univigu profile list`"
            " or a YAML file's path."
        )
    return found


def _merge(
    parent: Mapping[str, Any], child: Mapping[str, Any], path: tuple[str, ...], schema: Mapping[str, Any]
) -> dict[str, Any]:
    merged = dict(parent)
    for key, value in child.items():
        old, here = merged.get(key), (*path, str(key))
        if isinstance(old, Mapping) and isinstance(value, Mapping) and not look_up(schema, here).get(REPLACED):
            value = _merge(old, value, here, schema)
        merged[key] = value
    return merged


def _sets(values: Any, path: Sequence[str | int]) -> bool:
    for part in path:
        if isinstance(values, list):
            return True  # a list is one value, so all of it is set
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True
