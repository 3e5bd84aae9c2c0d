"""What a finished output says of itself: every file with its size and SHA-256, and what it was made of.

A manifest covers itself too, so a reader finds whatever was changed in it.
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
    """All that decides an output."""

    parameters: Mapping[str, Any]  # sections of the profile
    inputs: Mapping[str, str]  # digests of earlier outputs and of sources, by name
    code: Mapping[str, str]  # `fingerprint`

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "Recipe":
        """What an output was made by; of an imported one, or one without it, nothing."""
        return cls(*(manifest.get(name) or {} for name in cls._fields))

    def key(self) -> str:
        return json_digest([self.parameters, self.inputs, code_digest(self.code)])

    def differences(self, now: "Recipe") -> list[str]:
        """What is another in `now`, by name."""
        found = [
            f"{name} ({_brief(before)} -> {_brief(after)})"
            for name, before, after in _changed(_flat(self.parameters), _flat(now.parameters))
        ]
        found += [f"the input '{name}'" for name, _, _ in _changed(self.inputs, now.inputs)]
        return [*found, *changed_code(self.code, now.code)]


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file of an output: its size and SHA-256, by its path in the folder; the manifest itself is left out."""
    return {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": file_sha256(file)}
        for file in tree_files(folder)
        if file != folder / MANIFEST
    }


def files_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """What an output is known by to the steps after it: its files' names and bytes."""
    return json_digest({name: facts["sha256"] for name, facts in files.items()})


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of a finished output, with a digest of itself; returns it."""
    plain = plain_json({name: value for name, value in manifest.items() if name != OWN_DIGEST})
    sealed = {**plain, OWN_DIGEST: json_digest(plain)}
    write_json(folder / MANIFEST, sealed)
    return sealed


def read_manifest(folder: Path, maker: str) -> dict[str, Any]:
    """The manifest of an output that the step `maker` makes; its files are not looked at.

    Raises `MissingInputError` where there is none, and `CorruptDataError` where it isn't as it was written.
    """
    try:
        manifest = read_json_object(folder / MANIFEST)
    except FileNotFoundError as error:
        raise MissingInputError(f"There is no finished output at {folder}; run `univigu run {maker}` first.") from error
    except NotADirectoryError as error:
        raise MissingInputError(f"{folder} is no folder; remove it and run `univigu run {maker}`.") from error
    except ValueError as error:
        raise _damaged(f"The manifest of {folder} is damaged", maker) from error
    if manifest.get(OWN_DIGEST) != json_digest({k: value for k, value in manifest.items() if k != OWN_DIGEST}):
        raise _damaged(f"The manifest of {folder} is damaged", maker)
    return manifest


def verify(folder: Path, maker: str) -> dict[str, Any]:
    """Check every file of a finished output against its manifest; returns the manifest.

    Raises as `read_manifest` does, and `CorruptDataError` for a file that is missing or another.
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
            raise _damaged(f"{path} is not the file that its manifest names (size or SHA-256 differs)", maker)
    return manifest


def files_elsewhere(folder: Path) -> dict[str, str]:
    """The SHA-256 of the files of an output that are in an object store, by their names; nothing where none are."""
    try:
        shards = read_json_object(folder / ELSEWHERE)["shards"]
        return {name: str(facts["sha256"]) for name, facts in shards.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def is_whole(folder: Path) -> bool:
    """Whether an output is as its manifest says."""
    try:
        verify(folder, "")
    except BadInputError:
        return False
    return True


def inside(root: Path, path: str | Path) -> Path:
    """`path` below `root`, as an absolute path; raises `BadInputError` where it would leave it."""
    resolved = (root / path).resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise BadInputError(f"The path '{path}' leaves the work root {root}; give one inside it.")
    return resolved


def stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """For each file at or below a path, what changes when it is replaced or written to: inode, size and time."""
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
