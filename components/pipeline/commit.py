"""Commit a finished output: all of it or nothing, and never while another step reads the output that it replaces.

Everything is hashed and flushed to disk before the manifest names it. A step that reads an output holds a shared lock
on it from the first check until its own commit; the step that replaces the output needs an exclusive lock, briefly.
"""

import fcntl
import shutil
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from components.pipeline import aside
from components.pipeline.digests import source_digest
from components.pipeline.manifests import (
    ELSEWHERE,
    MANIFEST,
    describe_files,
    files_digest,
    inside,
    is_intact,
    read_manifest,
    stamps,
    verify,
    write_manifest,
)
from components.pipeline.stages import Stage
from components.pipeline.state import Lock, lock
from components.pipeline.step import Step
from univigu.errors import BadInputError, CorruptDataError, MissingInputError
from univigu.files import sync, sync_tree


def reading(maker: str, root: Path) -> AbstractContextManager[Lock]:
    """Hold a shared lock on the output of the step `maker`, so that nothing replaces it while it is read."""
    return lock(root, _output(maker), "", fcntl.LOCK_SH)  # waits: exclusive locks are held briefly


def require_no_reader(stage: Stage, root: Path) -> None:
    """Raise `BusyError` if a running step reads the output that would be replaced."""
    with _replacing(stage.name, root):
        pass


def commit(step: Step) -> dict[str, Any]:
    """Hash the staging folder, move it into place, and write the manifest last; returns the manifest.

    Raises `BadInputError` if an input has changed since the step read it, and `BusyError` if another step reads the
    output that would be replaced.
    """
    for shard in (step.out / "shards").glob(".*"):
        shutil.rmtree(shard)
    files = describe_files(step.out)
    manifest = {
        "step": step.stage.name,
        "digest": files_digest(files),
        "rows_in": step.rows_in,
        "rows_out": step.rows_out,
        "quarantined": step.reasons.total(),
        "reasons": dict(sorted(step.reasons.items())),
        **step.recipe._asdict(),
        "facts": step.facts,
        "files": files,
    }
    if came_from := aside.resumed_from(step):
        manifest["resumed_from"] = came_from
    sync_tree(step.out)
    require_same_inputs(step)
    home = inside(step.root, step.stage.home)
    damaged = (home / MANIFEST).exists() and not is_intact(home)
    with _replacing(step.stage.name, step.root):
        return _replace(step, home, manifest, damaged)


def require_same_inputs(step: Step) -> None:
    """Raise `BadInputError` if an input was replaced or written to after the step verified it."""
    for name, before in step.input_stamps.items():
        path = step.inputs[name]
        if stamps(path) != before and _digest(step, name, path) != step.input_digests[name]:
            raise BadInputError(
                f"{path} changed while '{step.stage.name}' was reading it, so nothing was committed. Run "
                f"`univigu run {step.stage.name}` again when no other process writes there."
            )


def _digest(step: Step, name: str, path: Path) -> str | None:
    try:
        return verify(path, step.stage.inputs[name])["digest"] if name in step.stage.inputs else source_digest(path)
    except (BadInputError, OSError):
        return None


def _replacing(name: str, root: Path) -> AbstractContextManager[Lock]:
    refusal = (
        f"Another step is reading the output of '{name}' under {root}. Run '{name}' again when that step has ended; "
        "finished work is kept."
    )
    return lock(root, _output(name), refusal)


def _output(name: str) -> str:
    return f"{name}.output"


def _replace(step: Step, home: Path, manifest: Mapping[str, Any], damaged: bool) -> dict[str, Any]:
    home.mkdir(parents=True, exist_ok=True)
    if (home / ELSEWHERE).is_file():
        print(
            f"{step.stage.name}: the new output is on this disk and replaces the offloaded one; "
            "`univigu data offload URL` uploads it.",
            file=sys.stderr,
        )
    stale = {path.name for path in home.iterdir()} if not step.stage.outputs else _owned_entries(home, step.stage.name)
    if damaged:
        aside.keep_damaged_output(step, home, stale | {MANIFEST})
    (home / MANIFEST).unlink(missing_ok=True)
    sync(home)
    for entry in stale - {MANIFEST}:
        remove(home / entry)
    for entry in sorted(step.out.iterdir()):
        remove(home / entry.name)
        entry.rename(home / entry.name)
    sync(home)
    written = write_manifest(home, manifest)
    sync(home.parent)
    step.out.rmdir()
    return written


def _owned_entries(home: Path, maker: str) -> set[str]:
    """The top-level entries of the last commit in a folder that other steps use too."""
    try:
        files = read_manifest(home, maker)["files"]
    except (CorruptDataError, MissingInputError):
        return set()
    return {name.split("/", 1)[0] for name in files} & {path.name for path in home.iterdir()}


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
