"""The manifest of a finished output: each file with its size and SHA-256, and the recipe that made it.

A manifest contains a digest of itself, so a reader detects any change to it.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from components.pipeline.digests import json_digest, plain_json, tree_files
from components.pipeline.fingerprint import changed_code, code_digest
from univigu.errors import BadInputError, CorruptDataError, MissingInputError
from univigu.files import file_sha256, read_json_object, write_json

MANIFEST = "manifest.json"
ELSEWHERE = "remote.json"  # in an output whose large files are in an object store (`univigu data offload`)
OWN_DIGEST = "manifest_sha256"


class Recipe(NamedTuple):
    """Everything that decides an output."""

    parameters: Mapping[str, Any]  # sections of the profile
    inputs: Mapping[str, str]  # digests of earlier outputs and of sources, by name
    code: Mapping[str, str]  # `fingerprint`

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "Recipe":
        """The recipe in a manifest; empty for an imported output, and for a manifest without one."""
        return cls(*(manifest.get(name) or {} for name in cls._fields))

    def key(self) -> str:
        return json_digest([self.parameters, self.inputs, code_digest(self.code)])

    def differences(self, now: "Recipe") -> list[str]:
        """What differs in `now`, by name."""
        found = [
            f"{name} ({_brief(before)} -> {_brief(after)})"
            for name, before, after in _changed(_flat(self.parameters), _flat(now.parameters))
        ]
        found += [f"the input '{name}'" for name, _, _ in _changed(self.inputs, now.inputs)]
        return [*found, *changed_code(self.code, now.code)]


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The size and SHA-256 of each file of an output except the manifest, by its path in the folder."""
    return {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": file_sha256(file)}
        for file in tree_files(folder)
        if file != folder / MANIFEST
    }


def files_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The digest by which later steps identify an output: of its files' names and contents."""
    return json_digest({name: facts["sha256"] for name, facts in files.items()})


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of a finished output with a digest of itself; returns it."""
    plain = plain_json({name: value for name, value in manifest.items() if name != OWN_DIGEST})
    sealed = {**plain, OWN_DIGEST: json_digest(plain)}
    write_json(folder / MANIFEST, sealed)
    return sealed


def read_manifest(folder: Path, maker: str) -> dict[str, Any]:
    """The manifest of an output of the step `maker`; its files are not verified.

    Raises `MissingInputError` if there is none, and `CorruptDataError` if it was changed after it was written.
    """
    try:
        manifest = read_json_object(folder / MANIFEST)
    except FileNotFoundError as error:
        raise MissingInputError(f"There is no finished output at {folder}; run `univigu run {maker}` first.") from error
    except NotADirectoryError as error:
        raise MissingInputError(f"{folder} is not a folder; remove it and run `univigu run {maker}`.") from error
    except ValueError as error:
        raise _damaged(f"The manifest of {folder} is damaged", maker) from error
    if manifest.get(OWN_DIGEST) != json_digest({k: value for k, value in manifest.items() if k != OWN_DIGEST}):
        raise _damaged(f"The manifest of {folder} is damaged", maker)
    return manifest


def verify(folder: Path, maker: str) -> dict[str, Any]:
    """Verify every file of a finished output against its manifest; returns the manifest.

    Raises like `read_manifest`, and `CorruptDataError` for a file that is missing or doesn't match.
    """
    manifest = read_manifest(folder, maker)
    elsewhere = files_elsewhere(folder)
    for name, facts in manifest["files"].items():
        path = inside(folder, name)
        if not path.is_file():
            if elsewhere.get(name) == facts["sha256"]:
                continue  # verified when it is fetched
            raise _damaged(f"{path} is missing from a finished output", maker)
        if path.stat().st_size != facts["size"] or file_sha256(path) != facts["sha256"]:
            raise _damaged(f"{path} doesn't match its manifest (size or SHA-256 differs)", maker)
    return manifest


def files_elsewhere(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of an output that is in an object store, by its name; empty if there are none."""
    try:
        shards = read_json_object(folder / ELSEWHERE)["shards"]
        return {name: str(facts["sha256"]) for name, facts in shards.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def is_intact(folder: Path) -> bool:
    """Whether an output matches its manifest."""
    try:
        verify(folder, "")
    except BadInputError:
        return False
    return True


def inside(root: Path, path: str | Path) -> Path:
    """`path` under `root`, as an absolute path; raises `BadInputError` if it is outside `root`."""
    resolved = (root / path).resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise BadInputError(f"The path '{path}' leaves the work root {root}; give one inside it.")
    return resolved


def stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """The inode, size and modification time of each file at or under a path: they change when it is written."""
    facts = {str(file): os.stat(file) for file in tree_files(folder)}
    return {name: (found.st_ino, found.st_size, found.st_mtime_ns) for name, found in facts.items()}


def _damaged(what: str, maker: str) -> CorruptDataError:
    return CorruptDataError(
        f"{what}; run `univigu run {maker}`, which makes it again and sets the damaged output aside."
    )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    return {key: one for part, inner in value.items() for key, one in _flat(inner, f"{name}.{part}".strip(".")).items()}


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Sequence[tuple[str, Any, Any]]:
    names = sorted({*before, *now})
    return [(name, before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)]


def _brief(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
