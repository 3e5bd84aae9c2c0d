"""Trace a registered version to its origins: model -> training runs -> dataset -> snapshot -> prompts."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from components.registry import dataset_versions
from components.registry.register_model import LINEAGE, PROMPT_SOURCES
from components.tracking import store_to_read
from univigu import registry
from univigu.errors import BadInputError, CorruptDataError, MissingInputError
from univigu.files import read_json_object

DATA_STEPS = ("curate-prompts", "encode-latents")
_REPAIR = "restore the version's files from a copy, or delete the version and register the model again"
Fact = TypeVar("Fact", int, str, dict, list)


def trace_version(name: str, version: int | str, root: Path) -> dict[str, Any]:
    """The origins of a version (a number or an alias), read from its tags and files; JSON values.

    The dataset's snapshot is searched in the git repository of `root`. Raises `MissingInputError` if there is no such
    version or its files are gone, and `CorruptDataError` if its files are damaged.
    """
    store = store_to_read(root)
    found = registry.find_version(name, version, store)
    folder = registry.artifact(f"models:/{name}/{found.version}", "lineage", store)
    manifests = {step: _read(folder / f"{step}.json") for step in DATA_STEPS}
    sources = _read(folder / PROMPT_SOURCES)
    tags = found.tags
    if not {"univigu.dataset_digest", "univigu.model_digest"} <= tags.keys():
        raise BadInputError(
            f"Version {found.version} of '{name}' has no lineage tags: either `register-model` did not create it, or "
            f"its tags were removed; ask who registered it."
        )
    steps = _tags_below(tags, "univigu.digest.")
    if (folder / LINEAGE).is_file():  # versions of earlier releases have these digests in tags alone
        steps = _fact(_read(folder / LINEAGE), dict, "steps")
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
            {"step": step, "id": run_id, **_run_facts(run_id, store)}
            for step, run_id in _tags_below(tags, "univigu.run.").items()
        ],
        "dataset": _dataset_facts(tags["univigu.dataset_digest"], latents, root),
        "prompts": _prompt_facts(prompts, sources),
        "steps": steps,
    }


def _dataset_facts(digest: str, latents: Mapping[str, Any], root: Path) -> dict[str, Any]:
    snapshot = dataset_versions.find_snapshot(root, digest)
    return {
        "digest": digest,
        "samples": _fact(latents, int, "rows_out"),
        "pairs_digest": _fact(latents, str, "inputs", "pairs"),
        "snapshot": snapshot and snapshot.tag,
        "commit": snapshot and snapshot.commit,
    }


def _prompt_facts(prompts: Mapping[str, Any], sources: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "digest": _fact(prompts, str, "digest"),
        "raw_digest": _fact(prompts, str, "inputs", "raw"),
        "raw": _fact(prompts, int, "rows_in"),
        "kept": _fact(prompts, int, "rows_out"),
        "rejected": _fact(prompts, dict, "reasons"),
        "files": _fact(prompts, dict, "facts", "sources") if "sources" in _fact(prompts, dict, "facts") else {},
        "sources": [
            {
                "source": _fact(row, str, "source"),
                "licence": _fact(row, str, "licence"),
                "count": _fact(row, int, "count"),
            }
            for row in _fact(sources, list, "sources")
        ],
    }


def _tags_below(tags: Mapping[str, str], prefix: str) -> dict[str, str]:
    """The tags with this prefix, sorted, without the prefix."""
    return {tag.removeprefix(prefix): value for tag, value in sorted(tags.items()) if tag.startswith(prefix)}


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except FileNotFoundError as error:
        raise MissingInputError(
            f"The version has no lineage file '{path.name}'; `univigu run register-model` registers a complete one."
        ) from error
    except ValueError as error:
        raise CorruptDataError(f"A lineage file of the version is damaged ({error}); {_REPAIR}.") from error


def _fact(value: Any, kind: type[Fact], *keys: str) -> Fact:
    """The value at these nested keys; raises `CorruptDataError` if it is missing or of another type."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CorruptDataError(f"A lineage file of the version has no valid '{'.'.join(keys)}'; {_REPAIR}.")
    return value


def _run_facts(run_id: str, store: str) -> dict[str, str]:
    """When an MLflow run started and how it ended; empty if this store doesn't have the run."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        run = MlflowClient(store).get_run(run_id).info
    except MlflowException:
        return {}
    began = datetime.fromtimestamp(run.start_time / 1000, UTC).isoformat(timespec="seconds")
    return {"began": began, "status": run.status}
