"""The only code that executes a step, and what it promises.

At-least-once execution, idempotent commit: a step's output is absent, or complete and verified.

* Inputs are verified against their manifests (sizes and SHA-256) before the step starts.
* A step writes into a staging folder. When it has ended well, everything is hashed and renamed into its final place;
  the manifest is removed first and written last, so whoever finds a manifest finds all that it names.
* Long steps work in shards. A shard is a folder, its record lies beside the run's state; the shard is kept on a re-run
  only where the record's key (input rows, parameters, code) still holds and its bytes still match.
* Shards can be made ahead, by several processes at once, each its part of them; the run that follows keeps and commits
  them. A shard is locked while it is made, and nothing is committed while a part is under way.
* A row that can't be used goes to `rejected.parquet` with its reason; too many of them fail the step.
* Nothing in an output depends on the clock, the machine, or the order of completion.
"""

import errno
import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from components.pipeline.digests import file_digest, json_digest, tree_digest, tree_files
from components.pipeline.parts import Part, PartEnded
from components.pipeline.progress import progress
from components.pipeline.stages import Stage, find_stage
from components.pipeline.tables import read_table, write_table
from univigu.errors import (
    BadInputError,
    BusyError,
    ConfigError,
    CorruptDataError,
    DiskFullError,
    GateFailedError,
    MissingInputError,
    UniViGUError,
)

T = TypeVar("T")
MANIFEST = "manifest.json"
ELSEWHERE = "remote.json"  # in an output whose large files lie in an object store (`univigu data offload`)
STATE = ".univigu"  # staging, locks and run records, below the work root
_SCARCE_BYTES = 64 * 1024
SOURCE_ROOT = Path(__file__).resolve().parents[2]

ShardWork = Callable[[Sequence[Mapping[str, Any]], Path], Sequence[Mapping[str, Any]]]


@dataclass
class Step:
    """What a step function is given: its inputs, its parameters, and the ways to leave something behind."""

    stage: Stage
    root: Path  # the work root; a step needs it only to find what all steps share, such as the tracking store
    parameters: Mapping[str, Any]  # the profile's sections that the stage declares
    inputs: Mapping[str, Path]  # earlier steps' folders and the profile's sources, by name
    input_digests: Mapping[str, str]
    out: Path  # the staging folder: everything in it is committed when the function returns
    scratch: Path  # survives a killed run until the commit: checkpoints live here; never part of the output
    previous: Path  # where the last committed output lies, if there is one
    records: Path  # what is known of each finished shard: below the work root, never part of the output
    docs: Path  # pages for people that may carry times: below the work root, never part of the output
    code_digest: str
    part: Part | None = None  # make only these shards, and commit nothing
    rows_in: int = 0
    rows_out: int = 0
    facts: dict[str, Any] = field(default_factory=dict)  # goes into the manifest as it is; no clock, no host
    _rejected: list[dict[str, str]] = field(default_factory=list)

    def __getitem__(self, section: str) -> Any:
        """A section of the profile, e.g. ``step["video"]["height"]``."""
        return self.parameters[section]

    def key(self) -> str:
        """A digest of all that decides the output: parameters, inputs and code."""
        return json_digest([dict(self.parameters), dict(self.input_digests), self.code_digest])

    def read(self, source: str, table: str) -> pa.Table:
        """Read a table out of the input called `source`."""
        return read_table(self.inputs[source], table)

    def write(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a table into the output and count its rows as the step's `rows_out`."""
        self.rows_out = write_table(self.out, table, rows)

    def reject(self, row_id: str, reason: str, detail: str = "", row: Any = None) -> None:
        """Quarantine a row: `reason` is a short slug to count by, `detail` says what was seen."""
        text = json.dumps(row, ensure_ascii=False, sort_keys=True, default=str)
        text = text.encode(errors="replace").decode()  # half a surrogate pair has no UTF-8, so no Parquet either
        self._rejected.append({"id": row_id, "reason": reason, "detail": detail, "row": text})

    def progress(self, items: Iterable[T], total: int | None = None, unit: str = "rows") -> Iterator[T]:
        """Yield `items` with a bar on a terminal, and a line every few seconds otherwise."""
        return progress(items, self.stage.name, total, unit)

    def map_shards(self, rows: Sequence[Mapping[str, Any]], size: int, work: ShardWork) -> list[dict[str, Any]]:
        """Run `work(rows, folder)` over `rows` in shards of `size`, keeping the finished shards of an earlier run.

        `work` fills `folder` (large files: a tar, a safetensors) and returns the output rows; it may call `reject`.
        The folder ends up as ``<out>/shards/00000`` and so on. Returns all output rows, in shard order; in a part of
        a step it doesn't return, as only the whole run has all rows.
        """
        shards = [(f"{i:05d}", rows[start : start + size]) for i, start in enumerate(range(0, len(rows), size))]
        if self.part:
            self._make_part(shards[self.part.number - 1 :: self.part.of], work)
        results: list[dict[str, Any]] = []
        for name, shard in self.progress(shards, unit="shards"):
            key = self._shard_key(shard)
            record = self._kept_shard(name, key) or self._make_shard(name, key, shard, work)
            self._rejected.extend(record["rejected"])
            results.extend(record["rows"])
        names = {name for name, _ in shards}
        for folder in (self.out / "shards").glob("*"):  # of a killed run over other rows
            if folder.name not in names:
                shutil.rmtree(folder)
        return results

    def _make_part(self, shards: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], work: ShardWork) -> None:
        made = 0
        for name, shard in self.progress(shards, unit="shards"):
            with _lock(self.root, f"{self.stage.name}/{name}", f"shard {name} of '{self.stage.name}'"):
                key = self._shard_key(shard)
                if not self._find_shard(name, key):
                    self._make_shard(name, key, shard, work)
                    made += 1
        raise PartEnded(made, len(shards) - made)

    def _shard_key(self, shard: Sequence[Mapping[str, Any]]) -> str:
        return json_digest([list(shard), dict(self.parameters), dict(self.input_digests), self.code_digest])

    def _kept_shard(self, name: str, key: str) -> dict[str, Any] | None:
        """The record of a finished shard, which then lies in the staging folder, or None."""
        found = self._find_shard(name, key)
        if not found:
            return None
        record, folder = found
        if folder != self.out / "shards" / name:
            shutil.rmtree(self.out / "shards" / name, ignore_errors=True)
            shutil.copytree(folder, self.out / "shards" / name, copy_function=_link_or_copy)
        return record

    def _find_shard(self, name: str, key: str) -> tuple[dict[str, Any], Path] | None:
        """The record and folder of a finished shard whose key still holds and whose bytes still match, or None."""
        try:
            record = json.loads((self.records / f"{name}.json").read_text(encoding="utf-8"))
            if record["key"] != key:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        for home in (self.out, self.previous):
            folder = home / "shards" / name
            if record["files"] == _file_digests(folder):
                return record, folder
        return None

    def _make_shard(self, name: str, key: str, rows: Sequence[Mapping[str, Any]], work: ShardWork) -> dict[str, Any]:
        partial = self.out / "shards" / f".{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        before = len(self._rejected)
        made = [dict(row) for row in work(rows, partial)]
        record = {
            "key": key,
            "files": _file_digests(partial),
            "rows": made,
            "rejected": self._rejected[before:],
        }
        del self._rejected[before:]
        final = self.out / "shards" / name
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        self.records.mkdir(parents=True, exist_ok=True)
        write_json(self.records / f"{name}.json", record)
        return record


def run_stage(name: str, profile: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Run the step `name` with a profile below the work root; returns its manifest.

    Raises an error of `univigu.errors` where the input is missing or damaged, where the step's own gate fails, or where
    another process runs the same step below the same root.
    """
    stage = find_stage(name)
    root = root.resolve()
    if os.environ.get("RANK", "0") != "0":
        return _help_along(stage, profile, root)
    with _expected_failures(name, root), _lock(root, name, f"'{name}'"):
        return _run_locked(stage, profile, root)


def run_part(name: str, profile: Mapping[str, Any], root: Path, part: Part) -> dict[str, int]:
    """Make the shards of one part of a step, for `run_stage` to keep; returns how many were made, and how many kept.

    Parts of one step may run at the same time, on one volume. Raises as `run_stage` does, and `ConfigError` for a step
    that doesn't work in shards.
    """
    stage = find_stage(name)
    if not stage.sharded:
        raise ConfigError(f"'{name}' doesn't work in shards, so it has no parts; run it without --part.")
    root = root.resolve()
    with _expected_failures(name, root), _lock(root, name, f"'{name}'", fcntl.LOCK_SH):
        step = make_step(stage, profile, root)
        step.part = part
        step.out.mkdir(parents=True, exist_ok=True)
        try:
            _load_function(stage)(step)
        except PartEnded as ended:
            return {"made": ended.made, "kept": ended.kept}
        raise AssertionError(f"'{name}' is said to work in shards, and called no map_shards")


@contextmanager
def _lock(root: Path, name: str, what: str, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold a lock that ends with the process; raises `BusyError` where another process holds it."""
    path = root / STATE / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        try:
            fcntl.flock(stream, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                f"Another run of {what} is under way below {root}; wait for it, or give another --root."
            ) from error
        yield


@contextmanager
def _expected_failures(name: str, root: Path) -> Iterator[None]:
    """Say in one sentence what is no fault of the code: a full disk, a root that can't be written to."""
    try:
        yield
    except UniViGUError:
        raise
    except Exception as error:
        if is_disk_full(error, root):
            raise DiskFullError(
                f"The disk below {root} is full, so '{name}' left its output as it was; make room and run it again."
            ) from error
        if isinstance(error, OSError) and not (root / STATE / "locks").is_dir():
            raise BadInputError(
                f"Nothing can be written below {root} ({error.strerror}); give another --root."
            ) from error
        raise


def is_disk_full(error: Exception, root: Path) -> bool:
    """Whether a failure comes from a full disk; torch, safetensors and SQLite say so in words, without an errno."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    said = ("no space left", "disk is full", "disk quota exceeded", "file too large", "disk full")
    if any(words in str(error).lower() for words in said):
        return True
    return root.is_dir() and shutil.disk_usage(root).free < _SCARCE_BYTES


def _help_along(stage: Stage, profile: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Take part in a step that torchrun started as several processes: the first of them prepares and commits."""
    step = make_step(stage, profile, root)
    _load_function(stage)(step)
    return {"rows_in": step.rows_in, "rows_out": step.rows_out, "quarantined": 0, "reasons": {}}


def _run_locked(stage: Stage, profile: Mapping[str, Any], root: Path) -> dict[str, Any]:
    started = time.monotonic()
    step = make_step(stage, profile, root)
    _prepare_staging(step.out, step.scratch, step.key())
    try:
        _load_function(stage)(step)
        _write_rejected(step)
    except GateFailedError:
        write_table(step.scratch, "rejected", step._rejected)
        raise
    manifest = _commit(step, inside(root, stage.home))
    shutil.rmtree(step.scratch, ignore_errors=True)
    _record_run(root, manifest, step.key(), time.monotonic() - started)
    return manifest


def make_step(stage: Stage, profile: Mapping[str, Any], root: Path) -> Step:
    parameters = {name: section(profile, name) for name in stage.parameters}
    inputs, digests = _resolve_inputs(stage, profile, root)
    return Step(
        stage=stage,
        root=root,
        parameters=parameters,
        inputs=inputs,
        input_digests=digests,
        out=root / STATE / "staging" / stage.name,
        scratch=root / STATE / "scratch" / stage.name,
        previous=inside(root, stage.home),
        records=root / STATE / "shards" / stage.name,
        docs=root / STATE / "docs" / stage.name,
        code_digest=code_digest(stage),
    )


def _prepare_staging(staging: Path, scratch: Path, run_key: str) -> None:
    """Keep a killed run's shards and checkpoints; drop what was made for other inputs, parameters or code."""
    shards = staging / "shards"
    for entry in staging.iterdir() if staging.is_dir() else ():
        if entry != shards:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    staging.mkdir(parents=True, exist_ok=True)
    key_file = scratch / "run-key"
    if not key_file.is_file() or key_file.read_text() != run_key:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        key_file.write_text(run_key)


def _resolve_inputs(stage: Stage, profile: Mapping[str, Any], root: Path) -> tuple[dict[str, Path], dict[str, str]]:
    inputs: dict[str, Path] = {}
    digests: dict[str, str] = {}
    for name, maker in stage.inputs.items():
        inputs[name] = inside(root, find_stage(maker).home)
        digests[name] = verify(inputs[name], maker)["digest"]
    for name, key in stage.sources.items():
        path = inside(root, section(profile, key))
        if not path.exists():
            raise MissingInputError(
                f"'{stage.name}' needs {path} (the profile's '{key}'), and it is not there; check --root."
            )
        inputs[name] = path
        digests[name] = source_digest(path)
    return inputs, digests


def source_digest(path: Path) -> str:
    return tree_digest([path], relative_to=path if path.is_dir() else path.parent)


def verify(folder: Path, maker: str) -> dict[str, Any]:
    """Check every file of a committed output against its manifest; returns the manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
    except FileNotFoundError as error:
        raise MissingInputError(f"There is no finished output at {folder}; run `univigu run {maker}` first.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptDataError(
            f"The manifest of {folder} is damaged; delete the folder and run `univigu run {maker}`."
        ) from error
    for name, facts in files:
        path = inside(folder, name)
        if not path.is_file() and (folder / ELSEWHERE).is_file():
            continue  # in an object store, as that file says: verified when it is fetched
        if not path.is_file():
            raise CorruptDataError(
                f"{path} is missing from a finished output; delete {folder} and run `univigu run {maker}`."
            )
        if path.stat().st_size != facts["size"] or file_digest(path) != facts["sha256"]:
            raise CorruptDataError(
                f"{path} is not the file that its manifest names (size or SHA-256 differs); "
                f"delete {folder} and run `univigu run {maker}`."
            )
    return manifest


def inside(root: Path, path: str | Path) -> Path:
    """`path` below `root`, as an absolute path; raises `BadInputError` where it would leave it."""
    resolved = (root / path).resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise BadInputError(f"The path '{path}' leaves the work root {root}; give one inside it.")
    return resolved


def section(profile: Mapping[str, Any], key: str) -> Any:
    if key not in profile:
        raise ConfigError(f"The profile has no '{key}'; add that section (the bundled profile 'tiny' shows it).")
    return profile[key]


def code_digest(stage: Stage) -> str:
    own = f"{stage.module.replace('.', '/')}.py"
    return tree_digest([_source_path(path) for path in (own, *stage.code)], relative_to=SOURCE_ROOT)


def _source_path(path: str) -> Path:
    return SOURCE_ROOT / path


def _load_function(stage: Stage) -> Callable[[Step], None]:
    from importlib import import_module

    module, _, function = stage.function.partition(":")
    return getattr(import_module(module), function)


def _write_rejected(step: Step) -> None:
    """Write the quarantine, and fail the step where it holds too large a share of what came in."""
    write_table(step.out, "rejected", step._rejected)
    limit = step.parameters[step.stage.parameters[-1]].get("max_rejected_share", 1.0)
    if step._rejected and len(step._rejected) > limit * max(step.rows_in, 1):
        counts = ", ".join(
            f"{reason} {count}" for reason, count in Counter(r["reason"] for r in step._rejected).most_common()
        )
        kept = step.scratch / "rejected.parquet"
        raise GateFailedError(
            f"'{step.stage.name}' rejected {len(step._rejected)} of {step.rows_in} rows, over the profile's share of "
            f"{limit:g} ({counts}); look at them in {kept}."
        )


def _commit(step: Step, home: Path) -> dict[str, Any]:
    """Hash the staging folder, move it into place, and write the manifest last."""
    for shard in (step.out / "shards").glob(".*"):
        shutil.rmtree(shard)
    files = {
        file.relative_to(step.out).as_posix(): {"size": file.stat().st_size, "sha256": file_digest(file)}
        for file in tree_files(step.out)
    }
    manifest = {
        "step": step.stage.name,
        "digest": json_digest({name: facts["sha256"] for name, facts in files.items()}),
        "rows_in": step.rows_in,
        "rows_out": step.rows_out,
        "quarantined": len(step._rejected),
        "reasons": dict(sorted(Counter(row["reason"] for row in step._rejected).items())),
        "inputs": dict(step.input_digests),
        "parameters": dict(step.parameters),
        "facts": step.facts,
        "files": files,
    }
    home.mkdir(parents=True, exist_ok=True)
    stale = {path.name for path in home.iterdir()} if not step.stage.outputs else _owned_entries(home)
    (home / MANIFEST).unlink(missing_ok=True)
    for entry in stale - {MANIFEST}:
        _remove(home / entry)
    for entry in sorted(step.out.iterdir()):
        _remove(home / entry.name)
        entry.rename(home / entry.name)
    write_json(home / MANIFEST, manifest)
    step.out.rmdir()
    return manifest


def _owned_entries(home: Path) -> set[str]:
    """The top-level entries that the last commit left in `home`."""
    try:
        files = json.loads((home / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return set()
    return {name.split("/", 1)[0] for name in files}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _record_run(root: Path, manifest: Mapping[str, Any], run_key: str, seconds: float) -> None:
    """Keep what the clock said beside the outputs, never in them; `reports/run.json` is made of these records."""
    import resource

    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    record = {key: manifest[key] for key in ("rows_in", "rows_out", "quarantined", "reasons", "digest")}
    clock = {"seconds": round(seconds, 2), "peak_rss_mb": round(peak / 1024, 1)}
    record = {"name": manifest["step"], "key": run_key, **clock, **record}
    (root / STATE / "runs").mkdir(parents=True, exist_ok=True)
    write_json(root / STATE / "runs" / f"{manifest['step']}.json", record)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, sort_keys=True, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def _file_digests(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): file_digest(file) for file in tree_files(folder)}


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
