"""Withdraw data: find everything that comes from it, write its tombstone, and name the models that learned from it.

The search reads the tables under the work root and the pairs of tagged datasets. An imported video is withdrawn whole,
with all its clips and with prompts that no other clip has. Files stay where they are: a step that runs again replaces
its output, and until then no step accepts an output that held withdrawn data (`components.pipeline.withdrawn`).
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyarrow import parquet

from components.pipeline.manifests import read_manifest
from components.pipeline.stages import STAGES, find_stage
from components.pipeline.tables import read_table
from components.pipeline.withdrawn import FILE, add_entry
from components.registry import dataset_versions
from components.registry.dataset_versions import Snapshot
from components.tracking import existing_store
from univigu import registry
from univigu.errors import BadInputError, ConfigError, MissingInputError
from univigu.files import file_sha256, write_json

TABLES = (  # the step, its table, and the column with the id of a prompt or clip
    ("curate-prompts", "prompts", "id"),
    ("validate-prompts", "prompts", "id"),
    ("synthesize-videos", "clips", "id"),
    ("validate-clips", "clips", "id"),
    ("caption-videos", "captions", "clip_id"),
    ("validate-pairs", "pairs", "clip_id"),
    ("encode-latents", "latents", "id"),
)
HOLDERS = tuple(step for step, _, _ in TABLES)
TRAINING = ("train-stage-1", "train-stage-2")  # their outputs come from the latents
IMPORT = "import"  # the generator of imported clips
TAG = "univigu.withdrawn"  # of a registered version: the numbers of the withdrawals that it learned from
DATASET_TAG = "univigu.dataset_digest"


@dataclass(frozen=True)
class Request:
    """What is to be withdrawn: exactly one of these."""

    source: str = ""
    id: str = ""  # of a prompt, a clip or a pair
    video: Path | None = None

    def describe(self) -> dict[str, str]:
        """The request without the name of a file."""
        return {"source": self.source} if self.source else {"id": self.id} if self.id else {"video": "a file"}


@dataclass
class Found:
    """Everything under a work root that comes from what is to be withdrawn."""

    prompts: set[str] = field(default_factory=set)
    clips: set[str] = field(default_factory=set)
    videos: set[str] = field(default_factory=set)
    rows: dict[str, int] = field(default_factory=dict)  # by step
    outputs: dict[str, str] = field(default_factory=dict)  # by step: the digest of an output that holds or learned any
    everything: bool = False


def withdraw(request: Request, root: Path, *, all_of_it: bool, dry_run: bool) -> dict[str, Any]:
    """Withdraw data under a work root; returns the report.

    With `dry_run`, nothing is changed. Raises `ConfigError` unless the request is of exactly one kind, and if it would
    withdraw every prompt or clip without `all_of_it`; raises `BadInputError` if nothing comes from what it names.
    """
    root = root.resolve()
    if sum(map(bool, (request.source, request.id, request.video))) != 1:
        raise ConfigError("Say what to withdraw: give exactly one of --source, --id and --video.")
    tables = _read_tables(root)
    found = find_derived(request, tables, root)
    if not found.prompts and not found.clips:
        raise BadInputError(
            f"Nothing under {root} comes from {_named(request)}, so there is nothing to withdraw; check it, and --root."
        )
    if found.everything and not all_of_it:
        raise ConfigError(f"All data under {root} come from {_named(request)}; to withdraw everything, add --all.")
    snapshots = list(examine_snapshots(root, found))
    models = list(examine_models(root, found, snapshots))
    report = _report(request, found, snapshots, models)
    if dry_run:
        return report
    datasets = [one["digest"] for one in snapshots if one["held"]]
    number = add_entry(root, _entry(request, found, report["when"], datasets))
    for model in models:
        if model["held"]:
            registry.set_tags(model["_version"], {TAG: _joined(model["withdrawals"], number)}, existing_store(root))
    return {**report, "number": number}


def _named(request: Request) -> str:
    return f"the source '{request.source}'" if request.source else f"'{request.id or request.video}'"


def _joined(before: str, number: int) -> str:
    return " ".join([*before.split(), str(number)])


# --- what comes from it -----------------------------------------------------------------------------------------------


def _read_tables(root: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each step's table, by the step's name; of those that exist."""
    homes = {step: (root / find_stage(step).home, table) for step, table, _ in TABLES}
    return {
        step: read_table(home, table).to_pylist()
        for step, (home, table) in homes.items()
        if (home / f"{table}.parquet").is_file()
    }


def find_derived(request: Request, tables: Mapping[str, Sequence[Mapping[str, Any]]], root: Path) -> Found:
    """Everything in the tables that comes from what is to be withdrawn."""
    found = Found()
    prompts, clips = tables.get("curate-prompts", []), tables.get("synthesize-videos", [])
    digest = _digest(request.video) if request.video else None
    pairs = {row["id"]: row["clip_id"] for row in tables.get("validate-pairs", [])}
    wanted = pairs.get(request.id, request.id)
    found.prompts = {row["id"] for row in prompts if request.source and row["source"] == request.source}
    found.prompts |= {row["id"] for row in prompts if wanted and row["id"] == wanted}
    own = {row["id"] for row in clips if row["prompt_id"] in found.prompts or (wanted and row["id"] == wanted)}
    own |= {row["id"] for row in clips if digest and digest in (row["sha256"], _parent(row))}
    found.videos = {parent for row in clips if row["id"] in own and (parent := _parent(row))}
    found.clips = own | {row["id"] for row in clips if _parent(row) in found.videos}
    others = {row["prompt_id"] for row in clips if row["id"] not in found.clips}
    found.prompts |= {row["prompt_id"] for row in clips if _parent(row) in found.videos} - others
    _count(found, tables)
    found.everything = _is_all(found.clips, clips) or _is_all(found.prompts, prompts)
    found.outputs = dict(_find_outputs(root, found))
    return found


def _digest(path: Path) -> str:
    if not path.is_file():
        raise MissingInputError(f"There is no file {path}; give the video as it was imported, or --id.")
    return file_sha256(path)


def _parent(clip: Mapping[str, Any]) -> str | None:
    """The SHA-256 of the video that an imported clip was cut from."""
    return clip["generator_digest"] if clip["generator"] == IMPORT else None


def _is_all(chosen: set[str], rows: Sequence[Mapping[str, Any]]) -> bool:
    return bool(rows) and {row["id"] for row in rows} <= chosen


def _count(found: Found, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    chosen = found.prompts | found.clips | {f"{stage}-{clip}" for stage in (1, 2) for clip in found.clips}
    for step, _, column in TABLES:
        if number := sum(row[column] in chosen for row in tables.get(step, [])):
            found.rows[step] = number


def _find_outputs(root: Path, found: Found) -> Iterator[tuple[str, str]]:
    """The outputs with withdrawn rows, and the models that were trained on them, by the steps that made them."""
    tainted: set[str] = set()
    for stage in STAGES:
        if stage.name not in (*HOLDERS, *TRAINING):
            continue
        try:
            manifest = read_manifest(root / stage.home, stage.name)
        except (BadInputError, OSError):
            continue
        learned = stage.name in TRAINING and tainted & set(manifest["inputs"].values())
        if found.rows.get(stage.name) or learned:
            tainted.add(manifest["digest"])
            yield stage.name, manifest["digest"]


# --- datasets and models ----------------------------------------------------------------------------------------------


def examine_snapshots(root: Path, found: Found) -> Iterator[dict[str, Any]]:
    """Each tagged dataset, and whether it held any: None if its pairs can't be read."""
    try:
        snapshots = dataset_versions.list_snapshots(root)
    except BadInputError:
        return
    for snapshot in snapshots:
        held = snapshot.digest in found.outputs.values() or _held_by(snapshot, root, found)
        yield {"tag": snapshot.tag, "digest": snapshot.digest, "held": held}


def _held_by(snapshot: Snapshot, root: Path, found: Found) -> bool | None:
    """Whether the pairs of a tagged dataset hold any, read from DVC's cache or remote; None if they aren't there."""
    import dvc.api

    path = f"{find_stage('validate-pairs').home}/pairs.parquet"
    try:
        content = dvc.api.read(path, repo=str(root), rev=snapshot.tag, mode="rb")
        clips = parquet.read_table(io.BytesIO(content), columns=["clip_id"])["clip_id"].to_pylist()
    except Exception:  # those of DVC, its remotes and Arrow have no other common base
        return None
    # Ids of clips that no longer exist begin with that of their prompt, or with the digest of their video.
    known = found.clips | found.prompts | {digest[:16] for digest in found.videos}
    return any(clip in known or clip.rpartition("-")[0] in known for clip in clips)


def examine_models(root: Path, found: Found, snapshots: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each registered version, and whether its dataset held any: None if that dataset is not known here."""
    try:
        store = existing_store(root)
    except MissingInputError:
        return
    from mlflow import MlflowClient

    known = {one["digest"]: one["held"] for one in snapshots} | _current(root, found)
    for name in sorted(model.name for model in MlflowClient(store).search_registered_models()):
        for version in registry.versions(name, store):
            dataset = version.tags.get(DATASET_TAG)
            yield {
                "name": name,
                "version": int(version.version),
                "aliases": version.aliases,
                "dataset": dataset,
                "withdrawals": version.tags.get(TAG, ""),
                "held": known.get(dataset),
                "_version": version,
            }


def _current(root: Path, found: Found) -> dict[str, bool]:
    """The digest of the latents under the work root, and whether they hold any."""
    try:
        digest = read_manifest(root / find_stage("encode-latents").home, "encode-latents")["digest"]
    except (BadInputError, OSError):
        return {}
    return {digest: digest in found.outputs.values()}


# --- the tombstone and the report -------------------------------------------------------------------------------------


def _entry(request: Request, found: Found, when: str, datasets: Sequence[str]) -> dict[str, Any]:
    return {
        "when": when,
        "prompts": sorted(found.prompts),
        "clips": sorted(found.clips),
        "videos": sorted(found.videos),
        "sources": [request.source] if request.source else [],
        "outputs": sorted({*found.outputs.values(), *datasets}),
    }


def _report(
    request: Request, found: Found, snapshots: Sequence[Mapping[str, Any]], models: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "withdrawn": request.describe(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "prompts": sorted(found.prompts),
        "clips": sorted(found.clips),
        "videos": sorted(found.videos),
        "rows": found.rows,
        "outputs": found.outputs,
        "datasets": snapshots,
        "models": [{name: value for name, value in model.items() if name[0] != "_"} for model in models],
    }


def describe(report: Mapping[str, Any]) -> Iterator[str]:
    """A report as lines of Markdown."""
    ((kind, value),) = report["withdrawn"].items()
    number = f"Withdrawal {report['number']}" if "number" in report else "A withdrawal that was not carried out"
    yield f"# {number}: {kind} {value}"
    yield ""
    counts = ", ".join(f"{kind}: {len(report[kind])}" for kind in ("prompts", "clips", "videos"))
    yield f"{report['when']}. Found {counts}."
    yield ""
    yield "| step | withdrawn rows |"
    yield "|---|---|"
    yield from (f"| `{step}` | {count} |" for step, count in report["rows"].items())
    yield ""
    for title, things in (("datasets", report["datasets"]), ("registered models", report["models"])):
        for held, what in ((True, "held or learned from it"), (None, "may have: their data are not here")):
            names = [_title(thing) for thing in things if thing["held"] is held]
            yield f"- {title} that {what}: {', '.join(names) or 'none'}"
    yield ""
    steps = ", ".join(f"`{step}`" for step in report["outputs"]) or "none"
    yield f"Run again, in this order: {steps}. Until then no later step reads their outputs."
    yield "Copies are in DVC's cache and remote, in `.univigu` and in the raw files, which this doesn't delete."
    yield f"The tombstone is in `{FILE}`: commit it."


def _title(thing: Mapping[str, Any]) -> str:
    if "tag" in thing:
        return thing["tag"]
    return " ".join([f"{thing['name']} version {thing['version']}", *thing["aliases"]])


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON, or as Markdown where the file's name ends in ``.md``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".md":
        path.write_text("\n".join(describe(report)) + "\n", encoding="utf-8")
    else:
        write_json(path, json.loads(json.dumps(report)))
