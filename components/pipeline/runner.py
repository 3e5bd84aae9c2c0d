"""The only code that executes a step, and what it promises.

At-least-once execution, idempotent commit: a step's output is absent, or complete and verified.

* Inputs are verified against their manifests (sizes and SHA-256) before the step starts, nobody replaces them while it
  runs, and before the commit they are still the same files.
* A step writes into a staging folder. When it has ended well, everything is hashed, written through to the disk and
  renamed into its final place; the manifest is removed first and written last, so a reader that finds a manifest finds
  all that it names.
* Long steps work in shards. A shard is a folder, its record is beside the run's state; the shard is kept on a re-run
  only where the record's key (input rows, parameters, code) still holds and its bytes still match.
* What was made by another recipe (parameters, inputs, code) is set aside, never deleted: checkpoints, finished shards.
* Shards can be made ahead, by several processes at once, each its part of them; the run that follows keeps and commits
  them. A shard is locked while it is made, and nothing is committed while a part is under way.
* A row that can't be used goes to `rejected.parquet` with its reason; too many of them fail the step.
* Nothing in an output depends on the clock, the machine, or the order of completion.
"""

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from components.pipeline import aside, commit
from components.pipeline.digests import source_digest
from components.pipeline.fingerprint import stage_code
from components.pipeline.manifests import inside, read_manifest, stamps, verify
from components.pipeline.stages import Stage, find_stage
from components.pipeline.state import STATE, Lock, lock
from components.pipeline.step import Step
from components.pipeline.weights import how_to_fetch
from components.pipeline.workspace import Part, PartEnded
from univigu.errors import (
    BadInputError,
    ConfigError,
    GateFailedError,
    MissingInputError,
    TransientError,
    UniViGUError,
    first_line,
    storage_fault,
)
from univigu.files import write_json

T = TypeVar("T")
IMPORTED = "import-"  # begins the names of the steps behind `univigu data import`
SOURCE_ROOT = Path(__file__).resolve().parents[2]


def run_stage(name: str, profile: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Run the step `name` with a profile below the work root; returns its manifest.

    Raises an error of `univigu.errors` where the input is missing or damaged, where the step's own gate fails, or where
    another process runs the same step below the same root. An output that was imported is kept as it is.
    """
    stage = find_stage(name)
    root = root.resolve()
    if found := imported(stage, root):
        return found
    if os.environ.get("RANK", "0") != "0":
        return _run_worker_rank(stage, profile, root)
    return run_adhoc_stage(stage, profile, root, {})


def imported(stage: Stage, root: Path) -> dict[str, Any] | None:
    """The manifest of what `univigu data import` put in the place of a step, which is kept instead of running it."""
    home = inside(root.resolve(), stage.home)
    try:
        maker = read_manifest(home, stage.name)["step"]
    except (BadInputError, OSError):
        return None
    return verify(home, stage.name) if str(maker).startswith(IMPORTED) else None


def run_adhoc_stage(stage: Stage, profile: Mapping[str, Any], root: Path, paths: Mapping[str, Path]) -> dict[str, Any]:
    """Run a step that need not be in the table of steps, with what `run_stage` promises; returns its manifest.

    paths: inputs by name that may lie outside the work root and have no manifest; the step names what it read of them
    in the rows of its shards.
    """
    with _working(stage, root, fcntl.LOCK_EX) as held:
        commit.require_no_reader(stage, root.resolve())
        return _run_locked(stage, profile, root.resolve(), paths, held)


def run_part(name: str, profile: Mapping[str, Any], root: Path, part: Part) -> dict[str, int]:
    """Make the shards of one part of a step, for `run_stage` to keep; returns how many were made, and how many kept.

    Parts of one step may run at the same time, on one volume. Raises as `run_stage` does, and `ConfigError` for a step
    that doesn't work in shards.
    """
    stage = find_stage(name)
    if not stage.sharded:
        raise ConfigError(f"'{name}' doesn't work in shards, so it has no parts; run it without --part.")
    if imported(stage, root):
        return {"made": 0, "kept": 0}
    with _working(stage, root, fcntl.LOCK_SH):
        step = make_step(stage, profile, root.resolve())
        step.part = part
        step.out.mkdir(parents=True, exist_ok=True)
        aside.keep_foreign_shards(step)
        try:
            _load_function(stage)(step)
        except PartEnded as ended:
            return {"made": ended.made, "kept": ended.kept}
        raise AssertionError(f"'{name}' is said to work in shards, and called no map_shards")


def restart(name: str, profile: Mapping[str, Any], root: Path) -> None:
    """Set aside all that unfinished runs of a step have left, so that its next run starts from nothing.

    Raises as `run_stage` does.
    """
    stage = find_stage(name)
    with _working(stage, root, fcntl.LOCK_EX):
        for place in aside.keep_everything(make_step(stage, profile, root.resolve())):
            print(f"{name}: what was finished is kept in {place}", file=sys.stderr)


def resume(name: str, profile: Mapping[str, Any], root: Path, folder: Path) -> None:
    """Have the next run of a step go on from what lies in `folder`, whatever recipe made it (`aside`).

    Raises as `run_stage` does, and `MissingInputError` where there is nothing to go on from.
    """
    stage = find_stage(name)
    with _working(stage, root, fcntl.LOCK_EX):
        for place in aside.take_up(make_step(stage, profile, root.resolve()), folder):
            print(f"{name}: what was finished before is kept in {place}", file=sys.stderr)


@contextmanager
def _working(stage: Stage, root: Path, kind: int) -> Iterator[Lock]:
    """Hold the step's lock, and its inputs as they are; what is no fault of the code is said in one sentence."""
    root, name = root.resolve(), stage.name
    refusal = f"Another run of '{name}' is under way below {root}; wait for it, or give another --root."
    try:
        with lock(root, name, refusal, kind | fcntl.LOCK_NB) as held, ExitStack() as inputs:
            for maker in sorted(set(stage.inputs.values())):
                inputs.enter_context(commit.reading(maker, root))
            try:
                yield held
            except UniViGUError:
                raise
            except Exception:
                held.require()  # another run may have taken away what this one was working on
                raise
    except UniViGUError:
        raise
    except Exception as error:
        if fault := storage_fault(error, root):
            raise fault from error
        if isinstance(error, FileNotFoundError) and str(root / STATE) in str(error):
            raise TransientError(
                f"Files of '{name}' below {root / STATE} were removed while it was at work ({first_line(error)}); run "
                "it again when nothing else cleans up there: what is finished is kept."
            ) from error
        raise


def _run_worker_rank(stage: Stage, profile: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Take part in a step that torchrun started as several processes: the first of them prepares and commits."""
    step = make_step(stage, profile, root)
    _load_function(stage)(step)
    return {"rows_in": step.rows_in, "rows_out": step.rows_out, "quarantined": 0, "reasons": {}}


def _run_locked(
    stage: Stage, profile: Mapping[str, Any], root: Path, paths: Mapping[str, Path], held: Lock
) -> dict[str, Any]:
    started = time.monotonic()
    step = make_step(stage, profile, root)
    step.inputs = {**step.inputs, **paths}
    aside.keep_foreign_work(step)
    _prepare_staging(step.out, step.scratch, step.key)
    aside.note_recipe(step)
    try:
        _load_function(stage)(step)
        _write_rejected(step)
    except GateFailedError:
        step._rejected.write(step.scratch)
        raise
    finally:
        step._rejected.close()
    held.require()
    manifest = commit.commit(step)
    shutil.rmtree(step.scratch, ignore_errors=True)
    _record_run(root, manifest, step.key, time.monotonic() - started)
    return manifest


def make_step(stage: Stage, profile: Mapping[str, Any], root: Path) -> Step:
    parameters = {name: section(profile, name) for name in stage.parameters}
    inputs, digests, seen = _resolve_inputs(stage, profile, root)
    return Step(
        stage=stage,
        root=root,
        parameters=parameters,
        inputs=inputs,
        input_digests=digests,
        input_stamps=seen,
        out=root / STATE / "staging" / stage.name,
        scratch=root / STATE / "scratch" / stage.name,
        previous=inside(root, stage.home),
        records=root / STATE / "shards" / stage.name,
        docs=root / STATE / "docs" / stage.name,
        code=stage_code(stage, profile),
    )


def _prepare_staging(staging: Path, scratch: Path, run_key: str) -> None:
    """Keep a killed run's shards and checkpoints, and remove what else it left."""
    shards = staging / "shards"
    for entry in staging.iterdir() if staging.is_dir() else ():
        if entry != shards:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    staging.mkdir(parents=True, exist_ok=True)
    key_file = scratch / "run-key"
    if aside.read_text(key_file) != run_key:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        key_file.write_text(run_key)


def _resolve_inputs(
    stage: Stage, profile: Mapping[str, Any], root: Path
) -> tuple[dict[str, Path], dict[str, str], dict[str, Any]]:
    """Where each input is, what it holds, and what its files looked like when that was established."""
    inputs: dict[str, Path] = {}
    digests: dict[str, str] = {}
    seen: dict[str, Any] = {}
    for name, maker in stage.inputs.items():
        inputs[name] = inside(root, find_stage(maker).home)
        seen[name] = stamps(inputs[name])
        digests[name] = verify(inputs[name], maker)["digest"]
    for name, key in stage.sources.items():
        path = inside(root, section(profile, key))
        if not path.exists():
            raise MissingInputError(
                f"'{stage.name}' needs {path} (the profile's '{key}'), and it is not there; {how_to_fetch(path)}."
            )
        inputs[name] = path
        seen[name] = stamps(path)
        digests[name] = source_digest(path)
    return inputs, digests, seen


def section(profile: Mapping[str, Any], key: str) -> Any:
    if key not in profile:
        raise ConfigError(f"The profile has no '{key}'; add that section (the bundled profile 'tiny' shows it).")
    return profile[key]


def _load_function(stage: Stage) -> Callable[[Step], None]:
    from importlib import import_module

    module, _, function = stage.function.partition(":")
    return getattr(import_module(module), function)


def _write_rejected(step: Step) -> None:
    """Write the quarantine, and fail the step where it holds too large a share of what came in."""
    quarantined = step._rejected.write(step.out)
    limit = step.parameters[step.stage.parameters[-1]].get("max_rejected_share", 1.0)
    if quarantined > limit * max(step.rows_in, 1):
        counts = ", ".join(f"{reason} {count}" for reason, count in step.reasons.most_common())
        kept = step.scratch / "rejected.parquet"
        raise GateFailedError(
            f"'{step.stage.name}' rejected {quarantined} of {step.rows_in} rows, over the profile's share of "
            f"{limit:g} ({counts}); look at them in {kept}."
        )


def _record_run(root: Path, manifest: Mapping[str, Any], run_key: str, seconds: float) -> None:
    """Keep what the clock said beside the outputs, never in them; `reports/run.json` is made of these records."""
    import resource

    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    record = {key: manifest[key] for key in ("rows_in", "rows_out", "quarantined", "reasons", "digest")}
    clock = {"seconds": round(seconds, 2), "process_seconds": _process_seconds(), "peak_rss_mb": round(peak / 1024, 1)}
    record = {"name": manifest["step"], "key": run_key, **clock, **record}
    (root / STATE / "runs").mkdir(parents=True, exist_ok=True)
    write_json(root / STATE / "runs" / f"{manifest['step']}.json", record)


def _process_seconds() -> float | None:
    """How long this process has lived, its start included; None where the system isn't Linux."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the machine's start
    except OSError:
        return None
    return round(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 2)
