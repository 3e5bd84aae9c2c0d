"""The way back from a registered version: model -> training runs -> dataset -> snapshot -> prompts."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from components.registry import dataset_versions
from components.registry.register_model import PROMPT_SOURCES
from components.tracking import existing_store
from univigu import registry
from univigu.errors import BadInputError, CorruptDataError, MissingInputError
from univigu.files import read_json_object

DATA_STEPS = ("curate-prompts", "encode-latents")
_REPAIR = "put back a copy of the version's files, or delete the version and register the model again"
Fact = TypeVar("Fact", int, str, dict, list)


def trace_version(name: str, version: int | str, root: Path) -> dict[str, Any]:
    """What a version (a number or an alias) was made of, from its own tags and files; plain values, for JSON.

    The dataset's snapshot is looked for in the git repository of `root`. Raises `MissingInputError` where there is no
    such version, or where its files are gone, and `CorruptDataError` where its files don't say what they should.
    """
    store = existing_store(root)
    found = registry.find_version(name, version, store)
    folder = registry.artifact(f"models:/{name}/{found.version}", "lineage", store)
    manifests = {step: _read(folder / f"{step}.json") for step in DATA_STEPS}
    sources = _read(folder / PROMPT_SOURCES)
    tags = found.tags
    if not {"univigu.dataset_digest", "univigu.model_digest"} <= tags.keys():
        raise BadInputError(
            f"Version {found.version} of '{name}' has no tags that lead back to its data, so `register-model` did not "
            f"make it, or somebody removed them; ask who registered it."
        )
    digest = tags["univigu.dataset_digest"]
    snapshot = dataset_versions.find_snapshot(root, digest)
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
            "samples": _fact(latents, int, "rows_out"),
            "pairs_digest": _fact(latents, str, "inputs", "pairs"),
            "snapshot": snapshot and snapshot.tag,
            "commit": snapshot and snapshot.commit,
        },
        "prompts": {
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
        },
        "steps": {
            tag.removeprefix("univigu.digest."): value
            for tag, value in sorted(tags.items())
            if tag.startswith("univigu.digest.")
        },
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except FileNotFoundError as error:
        raise MissingInputError(
            f"The version carries no '{path.name}' to walk back by; register the model again (`univigu run "
            f"register-model`) to get a version that does."
        ) from error
    except ValueError as error:
        raise CorruptDataError(f"A file that leads back from the version is damaged ({error}); {_REPAIR}.") from error


def _fact(value: Any, kind: type[Fact], *keys: str) -> Fact:
    """What is at these nested keys; raises `CorruptDataError` where that is nothing, or not of this kind."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CorruptDataError(f"A file that leads back from the version has no '{'.'.join(keys)}'; {_REPAIR}.")
    return value


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
