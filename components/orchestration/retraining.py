"""What an orchestrator decides around the steps: whether to train, and who is to be champion.

Plain functions without an orchestrator in them; `dags/` calls them.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.pipeline.freshness import finished
from components.pipeline.manifests import verify
from components.pipeline.profiles import load_profile, profile_names
from components.pipeline.stages import find_stage
from components.registry import promotion
from components.tracking import open_tracking, tracking_uri
from univigu import registry
from univigu.errors import BadInputError
from univigu.files import read_yaml

DATASET_STEP = "validate-prompts"  # whose output is the dataset that a retraining begins with
DATASET_STEPS = ("curate-prompts", DATASET_STEP)
REGISTRATION_STEP = "register-model"
DIGEST = re.compile(r"[0-9a-f]{64}")
PROFILE_TAG = "univigu.profile"


def dataset(root: Path, profile: str) -> dict[str, Any]:
    """The digest and the number of rows of the validated prompts that `profile` has made below `root`.

    Raises `MissingInputError` where there are none, and `BadInputError` where others lie there.
    """
    manifest = finished(DATASET_STEP, load_profile(profile), root)
    if manifest is None:
        verify(root / find_stage(DATASET_STEP).home, DATASET_STEP)
        raise BadInputError(
            f"The validated prompts below {root} are not what the profile '{profile}' makes: another run has replaced "
            f"them; run this again."
        )
    return {"digest": manifest["digest"], "rows": manifest["rows_out"]}


def announced_profile(extra: Mapping[str, Any], default: str) -> str:
    """The profile that the event of a dataset says it was made with, or `default` where it says none.

    Raises `BadInputError` for one that isn't the project's.
    """
    profile = extra.get("profile", default)
    if profile not in profile_names():
        raise BadInputError(
            f"The event's 'profile' is {json.dumps(profile)}, which is none of {', '.join(profile_names())}; emit the "
            f"event again with one of these."
        )
    return profile


def find_trained(root: Path, profile: str, digest: str) -> int | None:
    """The newest version that was trained with this profile from the dataset of this digest, if there is one.

    Raises `BadInputError` for what is no digest, and `TransientError` where the registry does not answer.
    """
    if not DIGEST.fullmatch(digest):
        raise BadInputError(
            f"The event's 'digest' is {json.dumps(digest)}, which is no SHA-256 of a dataset; the DAG `new_data` "
            f"emits events that have one."
        )
    open_tracking(root)
    tags = {f"univigu.digest.{DATASET_STEP}": digest, PROFILE_TAG: profile}
    found = registry.version_with(_name(profile), tags, tracking_uri(root))
    # pyrefly: ignore[bad-return]
    return found and int(found.version)


def compare_candidate(root: Path, profile: str) -> dict[str, Any]:
    """The version registered from below `root` against the champion: ``name``, ``version``, ``champion``, ``better``
    and ``reason``.

    Whoever else has registered a candidate meanwhile is left alone. The version is marked as trained with `profile`;
    nothing else is changed. Raises `MissingInputError` where nothing was registered from here, and `BadInputError`
    where it was under another name.
    """
    name = _name(profile)
    home = root / find_stage(REGISTRATION_STEP).home
    verify(home, REGISTRATION_STEP)
    registered = json.loads((home / "registration.json").read_text(encoding="utf-8"))
    if registered["name"] != name:
        raise BadInputError(
            f"What was registered from {root} is called '{registered['name']}', and the profile '{profile}' says "
            f"'{name}': another run has replaced it; run this again."
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
    }


def promote_version(root: Path, name: str, version: int, who: str, why: str) -> dict[str, Any]:
    """Make a version champion if it still is better; returns the ledger's ``outcome`` and ``reason``."""
    entry = promotion.offer(name, version, why, who=who, root=root)
    return {"outcome": entry.outcome, "reason": entry.reason}


def version_dataset(root: Path, profile: str) -> str:
    """Put the dataset below `root` into DVC's cache and its lock file; returns what was done, in words.

    The lock file is for people to commit: nothing here writes to git. Where the work root is no DVC project, or is set
    to another profile, nothing is versioned, and the words say why.
    """
    if not (root / ".dvc").is_dir() or not (root / "dvc.yaml").is_file():
        return f"not versioned: {root} is no DVC project, so the dataset is known by its digest alone"
    chosen = _chosen_profile(root)
    if chosen != profile:
        return f"not versioned: params.yaml names the profile '{chosen}', and the dataset is made with '{profile}'"
    command = [sys.executable, "-m", "dvc", "commit", "--quiet", "--force", *DATASET_STEPS]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "DVC_NO_ANALYTICS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise BadInputError(f"DVC could not version the dataset below {root} ({said}); run `dvc status` there.")
    return "in DVC's cache, and named by dvc.lock; `git commit dvc.lock` and `dvc push` make it everybody's"


def _name(profile: str) -> str:
    return load_profile(profile)["register_model"]["name"]


def _chosen_profile(root: Path) -> str | None:
    try:
        return read_yaml(root / "params.yaml").get("profile")
    except (OSError, ValueError, AttributeError):
        return None
