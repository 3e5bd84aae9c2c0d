"""Decisions around the steps: whether to train, and which version becomes champion.

These functions don't depend on an orchestrator; `dags/` calls them.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.orchestration import approval
from components.pipeline.freshness import finished
from components.pipeline.manifests import verify
from components.pipeline.profiles import load_profile, profile_names
from components.pipeline.stages import find_stage
from components.registry import promotion
from components.tracking import open_tracking, tracking_uri
from univigu import registry
from univigu.errors import BadInputError
from univigu.files import read_yaml

DATASET_STEP = "validate-prompts"  # its output is the dataset that a retraining starts from
DATASET_STEPS = ("curate-prompts", DATASET_STEP)
REGISTRATION_STEP = "register-model"
DIGEST = re.compile(r"[0-9a-f]{64}")
PROFILE_TAG = "univigu.profile"


def require_registry(root: Path) -> None:
    """Fail now if the registry does not answer, rather than after hours of training."""
    open_tracking(root)


def dataset(root: Path, profile: str) -> dict[str, Any]:
    """The digest and the number of rows of the validated prompts in `root`, made with `profile`.

    Raises `MissingInputError` if there are none, and `BadInputError` if they were made with another profile.
    """
    manifest = finished(DATASET_STEP, load_profile(profile), root)
    if manifest is None:
        verify(root / find_stage(DATASET_STEP).home, DATASET_STEP)
        raise BadInputError(
            f"The validated prompts in {root} were not made with the profile '{profile}': another run has replaced "
            f"them; run the task again."
        )
    return {"digest": manifest["digest"], "rows": manifest["rows_out"]}


def announced_profile(extra: Mapping[str, Any], default: str) -> str:
    """The profile that a dataset's event names, or `default` if it names none.

    Raises `BadInputError` for an unknown profile.
    """
    profile = extra.get("profile", default)
    if profile not in profile_names():
        raise BadInputError(
            f"The event's 'profile' is {json.dumps(profile)}, which is not a profile; emit the event again with one of "
            f"{', '.join(profile_names())}."
        )
    return profile


def find_trained(root: Path, profile: str, digest: str) -> int | None:
    """The newest version that was trained with this profile from the dataset with this digest, or None.

    Raises `BadInputError` for an invalid digest, and `TransientError` if the registry does not answer.
    """
    if not DIGEST.fullmatch(digest):
        raise BadInputError(
            f"The event's 'digest' is {json.dumps(digest)}, which is not a SHA-256 digest; emit the event with the "
            f"dataset's digest, as the DAG `new_data` does."
        )
    open_tracking(root)
    tags = {f"univigu.digest.{DATASET_STEP}": digest, PROFILE_TAG: profile}
    found = registry.version_with(_name(profile), tags, tracking_uri(root))
    # pyrefly: ignore[bad-return]
    return found and int(found.version)


def compare_candidate(root: Path, profile: str) -> dict[str, Any]:
    """Compare the version that was registered from `root` with the champion.

    Returns ``name``, ``version``, ``champion``, ``better``, ``reason``, and ``body``, what to show to a person who
    approves. Candidates that other processes registered
    are ignored. The version gets a tag with `profile`; nothing else changes. Raises `MissingInputError` if nothing was
    registered from `root`, and `BadInputError` if it was registered under another name.
    """
    name = _name(profile)
    home = root / find_stage(REGISTRATION_STEP).home
    verify(home, REGISTRATION_STEP)
    registered = json.loads((home / "registration.json").read_text(encoding="utf-8"))
    if registered["name"] != name:
        raise BadInputError(
            f"The model registered from {root} is called '{registered['name']}', but the profile '{profile}' names "
            f"'{name}': another run has replaced it; run the task again."
        )
    open_tracking(root)
    candidate = registry.find_version(name, registered["version"], tracking_uri(root))
    registry.set_tags(candidate, {PROFILE_TAG: profile}, tracking_uri(root))
    found = promotion.compare(name, candidate.version, root=root)
    return {
        "name": name,
        "version": found.challenger,
        "champion": found.champion,
        "better": found.better,
        "reason": found.reason,
        "body": _describe(found, root),
    }


def _describe(found: promotion.Comparison, root: Path) -> str:
    store = tracking_uri(root)
    sides = {"challenger": found.challenger, "champion": found.champion}
    runs = {side: registry.find_version(found.name, number, store).run_id for side, number in sides.items() if number}
    # pyrefly: ignore[bad-argument-type]
    return approval.describe(found, promotion.side_by_side(found, root=root), root, runs)


def promote_version(root: Path, name: str, version: int, who: str, why: str) -> dict[str, Any]:
    """Make a version champion if it is still better; returns the ledger's ``outcome`` and ``reason``."""
    entry = promotion.promote_if_better(name, version, why, who=who, root=root)
    return {"outcome": entry.outcome, "reason": entry.reason}


def version_dataset(root: Path, profile: str) -> str:
    """Add the dataset in `root` to DVC's cache and to dvc.lock; returns a sentence that says what was done.

    The user commits dvc.lock; nothing here writes to git. If the work root is not a DVC project, or is set to another
    profile, nothing is versioned, and the sentence says why.
    """
    if not (root / ".dvc").is_dir() or not (root / "dvc.yaml").is_file():
        return f"not versioned: {root} is not a DVC project, so only the digest identifies the dataset"
    chosen = _chosen_profile(root)
    if chosen != profile:
        return f"not versioned: params.yaml names the profile '{chosen}', but the dataset is made with '{profile}'"
    command = [sys.executable, "-m", "dvc", "commit", "--quiet", "--force", *DATASET_STEPS]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "DVC_NO_ANALYTICS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise BadInputError(f"DVC could not version the dataset in {root} ({reason}); run `dvc status` there.")
    return "added to DVC's cache and to dvc.lock; `git commit dvc.lock` and `dvc push` share it"


def _name(profile: str) -> str:
    return load_profile(profile)["register_model"]["name"]


def _chosen_profile(root: Path) -> str | None:
    try:
        return read_yaml(root / "params.yaml").get("profile")
    except (OSError, ValueError, AttributeError):
        return None
