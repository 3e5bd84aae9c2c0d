"""Whether a step has to run at all, and whether its inputs are still those of the same run.

The runner doesn't use this: skipping steps and sharing a work root between runs is up to the orchestrators.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.pipeline import stages
from components.pipeline.digests import json_digest, source_digest
from components.pipeline.fingerprint import code_digest, stage_code
from components.pipeline.manifests import Recipe, inside, read_manifest, verify
from components.pipeline.runner import code_entries, imported, make_step, section
from components.pipeline.stages import EDITED, EDITS
from univigu.errors import BadInputError, MissingInputError


def finished(name: str, profile: Mapping[str, Any], root: Path) -> dict[str, Any] | None:
    """The manifest of a step's output if these inputs, parameters and code made it and its files are intact, else None.

    The manifest alone decides, so the output may come from a run, from DVC's cache or from a copy. An imported output
    replaces the step's own, whatever its inputs are. Raises like `run_stage` if an input is missing or damaged.
    """
    stage, root = stages.find_stage(name), root.resolve()
    if manifest := imported(stage, root):
        return manifest
    try:
        manifest = read_manifest(inside(root, stage.home), name)
    except BadInputError:
        return None
    step = make_step(stage, profile, root)
    if Recipe.of(manifest).key() != step.key:
        return None
    try:
        return verify(step.previous, name)
    except BadInputError:
        return None


def why_not_finished(name: str, profile: Mapping[str, Any], root: Path) -> str:
    """What running a step would do, for people; "" if it is `finished`."""
    stage, root = stages.find_stage(name), root.resolve()
    try:
        if finished(name, profile, root):
            return ""
        step = make_step(stage, profile, root)
    except BadInputError as error:
        return f"can't run yet: {error}"
    try:
        manifest = read_manifest(step.previous, name)
    except MissingInputError:
        return "has not run"
    except BadInputError as error:
        return f"would run again: {error}"
    differences = Recipe.of(manifest).differences(step.recipe)
    return f"would start again: {'; '.join(differences)}" if differences else "would run again: its output is damaged"


def committed(name: str, root: Path) -> dict[str, Any]:
    """The manifest of a step's committed output, or an empty one; its files are not verified."""
    try:
        return read_manifest(root / stages.find_stage(name).home, name)
    except (OSError, BadInputError):
        return {}


def require_inputs(name: str, root: Path, expected: Mapping[str, str], made: bool = False) -> None:
    """Raise `BadInputError` if a step would read (with `made`: has read) an output that isn't this run's.

    expected: the digest of each output of this run, by the step that made it; other inputs are not checked.
    """
    if made:
        read = committed(name, root).get("inputs", {})  # empty if it was imported
        found = {maker: read[key] for key, maker in stages.find_stage(name).inputs.items() if key in read}
    else:
        found = {maker: committed(maker, root).get("digest") for maker in expected}
    # the step itself reports an output that is missing
    if others := [maker for maker, digest in expected.items() if (found.get(maker) or digest) != digest]:
        raise BadInputError(
            f"The output of {', '.join(others)} was replaced by another run before '{name}' had read it. Start this "
            "run again when no other run uses this work root; finished work is kept."
        )


def recipes(profile: Mapping[str, Any], root: Path) -> dict[str, str]:
    """For each step, a digest of everything that decides its output: parameters, sources and code.

    It includes those of all earlier steps, so it is known before anything has run.
    """
    sources = {key: inside(root, section(profile, key)) for stage in stages.STAGES for key in stage.sources.values()}
    digests = {key: source_digest(path) for key, path in sources.items() if path.exists()}
    known: dict[str, str] = {}
    for stage in stages.STAGES:
        own = {name: section(profile, name) for name in stage.parameters}
        read = {name: digests.get(key) for name, key in stage.sources.items()}
        entries = code_entries(stage, root)
        read |= {EDITED: source_digest(root / EDITS)} if entries else {}
        before = [known[name] for name in stage.inputs.values()]
        known[stage.name] = json_digest([own, read, code_digest(stage_code(stage, profile, entries)), before])
    return known
