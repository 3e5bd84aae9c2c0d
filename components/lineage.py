"""The way back from a registered version: model -> training runs -> dataset -> snapshot -> prompts."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components import snapshots
from components.register_model import PROMPT_SOURCES
from components.tracking import existing_store
from univigu import registry
from univigu.errors import MissingInputError

DATA_STEPS = ("curate-prompts", "encode-latents")


def trace_version(name: str, version: int | str, root: Path) -> dict[str, Any]:
    """What a version (a number or an alias) was made of, from its own tags and files; plain values, for JSON.

    The dataset's snapshot is looked for in the git repository of `root`. Raises `MissingInputError` where there is no
    such version, or where its files are gone.
    """
    store = existing_store(root)
    found = registry.find_version(name, version, store)
    folder = registry.artifact(f"models:/{name}/{found.version}", "lineage", store)
    manifests = {step: _read(folder / f"{step}.json") for step in DATA_STEPS}
    tags = found.tags
    digest = tags["univigu.dataset_digest"]
    snapshot = snapshots.find_snapshot(root, digest)
    prompts, latents = (manifests[step] for step in DATA_STEPS)
    return {
        "model": {
            "name": name,
            "version": int(found.version),
            "aliases": found.aliases,
            "digest": tags["univigu.model_digest"],
            "code": tags.get("univigu.git_commit"),
            "decision": tags.get("univigu.decision"),
        },
        "runs": [
            {"step": tag.removeprefix("univigu.run."), "id": run_id, **_run_facts(run_id, store)}
            for tag, run_id in sorted(tags.items())
            if tag.startswith("univigu.run.")
        ],
        "dataset": {
            "digest": digest,
            "samples": latents["rows_out"],
            "pairs_digest": latents["inputs"]["pairs"],
            "snapshot": snapshot and snapshot.tag,
            "commit": snapshot and snapshot.commit,
        },
        "prompts": {
            "digest": prompts["digest"],
            "raw_digest": prompts["inputs"]["raw"],
            "raw": prompts["rows_in"],
            "kept": prompts["rows_out"],
            "rejected": prompts["reasons"],
            "files": prompts["facts"].get("sources", {}),
            "sources": _read(folder / PROMPT_SOURCES)["sources"],
        },
        "steps": {
            tag.removeprefix("univigu.digest."): value
            for tag, value in sorted(tags.items())
            if tag.startswith("univigu.digest.")
        },
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingInputError(
            f"The version carries no '{path.name}' to walk back by; register the model again (`univigu run "
            f"register-model`) to get a version that does."
        ) from error


def _run_facts(run_id: str, store: str) -> dict[str, str]:
    """When a run of MLflow began and how it ended; nothing where this store doesn't know it."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        run = MlflowClient(store).get_run(run_id).info
    except MlflowException:
        return {}
    began = datetime.fromtimestamp(run.start_time / 1000, UTC).isoformat(timespec="seconds")
    return {"began": began, "status": run.status}
