"""Versions of the dataset: an annotated git tag at a commit whose `dvc.lock` names the data.

A tag is called ``dataset@v1.2.0``, the format that GTO and DVC Studio use for artifact versions
(https://dvc.org/doc/gto). Its message holds the dataset's digest, which models refer to, and row counts, so that a tag
can be read without the data.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.pipeline.manifests import read_manifest
from components.pipeline.stages import find_stage
from univigu.errors import BadInputError, ConfigError, MissingInputError, TransientError

NAME = "dataset"
STEPS = (  # their outputs are the dataset, in the order in which they run
    "curate-prompts",
    "validate-prompts",
    "synthesize-videos",
    "validate-clips",
    "caption-videos",
    "validate-pairs",
    "encode-latents",
)
RECIPE = ("dvc.lock", "dvc.yaml", "params.yaml")  # a tag identifies the data only if these are committed
_VERSION = re.compile(r"v(\d+)\.(\d+)\.(\d+)")
_FACT = re.compile(r"^([A-Z][A-Za-z-]+): (.*)$", re.M)


@dataclass(frozen=True)
class Snapshot:
    """A tagged dataset. `facts` are the lines of the tag's message, such as ``Pairs: 512``."""

    tag: str
    commit: str
    when: str
    digest: str
    facts: Mapping[str, str]


def take_snapshot(root: Path, version: str = "") -> tuple[Snapshot, bool]:
    """Tag the dataset under `root`; returns its snapshot, and whether the tag is new.

    A dataset that is already tagged keeps its tag. version: ``v1.2.0``; by default the next minor version. Raises
    `BadInputError` outside git, if the recipe isn't committed, and if the data differ from ``dvc.lock``.
    """
    _require_git(root)
    manifests = {step: read_manifest(root / find_stage(step).home, step) for step in STEPS}
    _require_in_cache(root)
    digest = manifests["encode-latents"]["digest"]
    existing = find_snapshot(root, digest)
    if existing:
        return existing, False
    _require_committed(root)
    tag = f"{NAME}@{_next_version(list_snapshots(root), version)}"
    counts = {step: manifests[step]["rows_out"] for step in STEPS}
    message = (
        f"{counts['validate-pairs']} pairs of clips and captions, from {counts['curate-prompts']} prompts\n\n"
        f"Dataset-Digest: {digest}\n"
        f"Pairs-Digest: {manifests['validate-pairs']['digest']}\n"
        f"Prompts-Digest: {manifests['curate-prompts']['digest']}\n"
        f"Prompts: {counts['curate-prompts']}\n"
        f"Clips: {counts['validate-clips']}\n"
        f"Pairs: {counts['validate-pairs']}\n"
        f"Samples: {counts['encode-latents']}\n"
    )
    done = _run(["git", "tag", "-a", tag, "-m", message], root)
    if done.returncode:
        raise BadInputError(f"git could not create the tag '{tag}': {_last_line(done)}")
    made = find_snapshot(root, digest)
    assert made is not None
    return made, True


def push_data(root: Path) -> None:
    """Push the dataset's files to the default DVC remote; raises `ConfigError` if there is none."""
    if not _run(_dvc("config", "core.remote"), root).stdout.strip():
        raise ConfigError(
            "There is no default DVC remote to push to; add one with `dvc remote add -d store URL`, where URL is a "
            "folder, `s3://bucket/path` or `gs://bucket/path`."
        )
    done = _run(_dvc("push", *(find_stage(step).home for step in STEPS)), root)
    if done.returncode:
        raise TransientError(f"`dvc push` failed ({_last_line(done)}); fix the cause, then run it again.")


def list_snapshots(root: Path) -> list[Snapshot]:
    """All tagged datasets of the repository, newest version first."""
    fields = ("%(refname:strip=2)", "%(*objectname)", "%(taggerdate:iso-strict)", "%(contents)")
    pattern = f"refs/tags/{NAME}@*"
    done = _run(["git", "for-each-ref", f"--format={'%1f'.join(fields)}%1e", pattern], root)
    if done.returncode:
        _require_git(root)
        raise BadInputError(f"git can't list the tags of {root.resolve()}: {_last_line(done)}")
    found = []
    for record in done.stdout.split("\x1e")[:-1]:
        tag, commit, when, message = record.strip("\n").split("\x1f", 3)
        facts = dict(_FACT.findall(message))
        if _VERSION.fullmatch(tag.partition("@")[2]) and "Dataset-Digest" in facts:
            found.append(Snapshot(tag, commit, when, facts["Dataset-Digest"], facts))
    return sorted(found, key=lambda one: _numbers(one.tag.partition("@")[2]), reverse=True)


def find_snapshot(root: Path, digest: str) -> Snapshot | None:
    """The first tag of the dataset with this digest; None if it has none, or if `root` is not in git."""
    try:
        found = [one for one in list_snapshots(root) if one.digest == digest]
    except BadInputError:
        return None
    return found[-1] if found else None


# --- preconditions for a tag -----------------------------------------------------------------------------------------


def _require_git(root: Path) -> None:
    if _run(["git", "rev-parse", "--verify", "--quiet", "HEAD"], root).returncode:
        raise BadInputError(
            f"{root.resolve()} is not in a git repository with a commit, so there is nothing to tag; work in a clone, "
            f"or run `git init` and commit first."
        )


def _require_committed(root: Path) -> None:
    if not (root / "dvc.lock").is_file():
        raise MissingInputError(f"{root.resolve()} has no dvc.lock; run `dvc repro`, which writes it.")
    changed = _run(["git", "status", "--porcelain", "-z", "--", *RECIPE], root).stdout.split("\0")
    names = [entry[3:] for entry in changed if entry]
    if names:
        raise BadInputError(
            f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} uncommitted changes, and a tag points to a "
            f"commit; run `git add {' '.join(names)}` and `git commit`, then try again."
        )


def _require_in_cache(root: Path) -> None:
    """Refuse data that differ from dvc.lock, or that DVC could not restore."""
    homes = {find_stage(step).home for step in STEPS}
    done = _run(_dvc("data", "status", "--json", *sorted(homes)), root)
    if done.returncode:
        raise BadInputError(f"`dvc data status` failed in {root.resolve()}: {_last_line(done)}")
    status = json.loads(done.stdout)
    changed = [path for paths in status.get("uncommitted", {}).values() for path in _paths(paths)]
    lost = _paths(status.get("not_in_cache", []))
    for paths, fault in ((changed, "differs from dvc.lock"), (lost, "is not in DVC's cache")):
        wrong = [path.rstrip("/") for path in paths if path.rstrip("/") in homes]
        if wrong:
            raise BadInputError(f"{wrong[0]} {fault}; run `dvc repro`, and commit the dvc.lock that it writes.")


def _paths(entries: Sequence[Any]) -> list[str]:
    return [entry if isinstance(entry, str) else entry["new"] for entry in entries]


def _next_version(known: Sequence[Snapshot], wanted: str) -> str:
    taken = [one.tag.partition("@")[2] for one in known]
    if wanted:
        wanted = wanted.removeprefix(f"{NAME}@")
        if not _VERSION.fullmatch(wanted):
            raise BadInputError(f"'{wanted}' is not a version; use the form v1.2.0, or omit it for the next version.")
        if wanted in taken:
            raise BadInputError(f"{NAME}@{wanted} tags another dataset; give another version, or omit it.")
        return wanted
    if not taken:
        return "v1.0.0"
    major, minor, _ = _numbers(taken[0])
    return f"v{major}.{minor + 1}.0"


def _numbers(version: str) -> tuple[int, ...]:
    # pyrefly: ignore[missing-attribute]
    return tuple(map(int, _VERSION.fullmatch(version).groups()))


# --- git and dvc -----------------------------------------------------------------------------------------------------


def _dvc(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *arguments]


def _run(command: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError as error:
        raise MissingInputError(
            f"'{command[0]}' can't be run in {root.resolve()} ({error.strerror}); install it and check PATH."
        ) from error


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error message of a command, in one line."""
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["no output"]
    errors = [line for line in lines if line.lower().startswith(("error", "fatal"))]
    return (errors or lines)[-1].strip()
