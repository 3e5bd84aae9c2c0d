"""Whether a step has to run at all, and whether its inputs are still the same run's.

The runner never asks: skipping whole steps, and runs that share a work root, are the orchestrators' business.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.pipeline import stages
from components.pipeline.digests import json_digest
from components.pipeline.runner import (
    MANIFEST,
    STATE,
    code_digest,
    imported,
    inside,
    make_step,
    section,
    source_digest,
    verify,
)
from univigu.errors import BadInputError


def finished(name: str, profile: Mapping[str, Any], root: Path) -> dict[str, Any] | None:
    """The manifest of a step's output if these very inputs, parameters and code made it and all its bytes are there.

    So it is where the output was imported, which stands in for the step whatever its inputs are. Raises as `run_stage`
    does where an input is missing or damaged.
    """
    stage = stages.find_stage(name)
    root = root.resolve()
    if manifest := imported(stage, root):
        return manifest
    try:
        record = json.loads((root / STATE / "runs" / f"{name}.json").read_text(encoding="utf-8"))
        key, digest = record["key"], record["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    step = make_step(stage, profile, root)
    if step.key() != key:
        return None
    try:
        manifest = verify(step.previous, name)
    except BadInputError:
        return None
    return manifest if manifest["digest"] == digest else None


def committed(name: str, root: Path) -> dict[str, Any]:
    """The manifest that lies in a step's place, or nothing; its files are not verified."""
    try:
        manifest = json.loads((root / stages.find_stage(name).home / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def require_inputs(name: str, root: Path, expected: Mapping[str, str], made: bool = False) -> None:
    """Raise `BadInputError` where a step would read, or with `made` has read, another output than this run's.

    expected: the digest of what this run has made, by the step that made it; what it doesn't name is not looked at.
    """
    if made:
        read = committed(name, root).get("inputs", {})  # nothing where it was imported
        found = {maker: read[key] for key, maker in stages.find_stage(name).inputs.items() if key in read}
    else:
        found = {maker: committed(maker, root).get("digest") for maker in expected}
    # where nothing lies, the step says so itself
    if others := [maker for maker, digest in expected.items() if (found.get(maker) or digest) != digest]:
        raise BadInputError(
            f"The output of {', '.join(others)} was replaced by another run before '{name}' had read it; when no other "
            "run uses this work root, start this one anew, and it goes on with what is finished."
        )


def recipes(profile: Mapping[str, Any], root: Path) -> dict[str, str]:
    """For each step, a digest of what decides its output from the start: parameters, sources and code.

    Those of all steps before it are in it, so it is known before anything has run.
    """
    sources = {key: inside(root, section(profile, key)) for stage in stages.STAGES for key in stage.sources.values()}
    digests = {key: source_digest(path) for key, path in sources.items() if path.exists()}
    known: dict[str, str] = {}
    for stage in stages.STAGES:
        own = {name: section(profile, name) for name in stage.parameters}
        read = {name: digests.get(key) for name, key in stage.sources.items()}
        before = [known[name] for name in stage.inputs.values()]
        known[stage.name] = json_digest([own, read, code_digest(stage), before])
    return known
