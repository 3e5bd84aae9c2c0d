"""The only code that executes a step, and what it guarantees.

At-least-once execution, idempotent commit: a step's output is either absent or complete and verified.

* Inputs are verified against their manifests (sizes and SHA-256) before the step starts. They can't be replaced while
  it runs, and are checked again before the commit.
* A step writes into a staging folder. When it has succeeded, everything is hashed, flushed to disk and renamed into its
  final place. The manifest is removed first and written last, so a reader that finds a manifest finds all its files.
* Long steps work in shards. A shard is a folder, and its record is in the run's state. A re-run keeps a shard only if
  the record's key (input rows, parameters, code) is still valid and its bytes still match.
* Work made by another recipe (parameters, inputs, code) is set aside, never deleted: checkpoints and finished shards.
* Several processes can make shards in advance, each one a part of them; the run that follows keeps and commits them. A
  shard is locked while it is made, and nothing is committed while a part is running.
* A row that can't be used goes to `rejected.parquet` with its reason; too many of them fail the step.
* Nothing in an output depends on the clock, the machine, or the order of completion.
"""

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.pipeline import aside, commit
from components.pipeline.digests import source_digest
from components.pipeline.fingerprint import stage_code
from components.pipeline.manifests import inside, read_manifest, stamps, verify
from components.pipeline.notes import FAILURE, note_path, remove_note, write_note
from components.pipeline.stages import EDITED, EDITS, EXCLUDED, Stage, find_stage
from components.pipeline.state import STATE, Lock, lock
from components.pipeline.step import Step, load_function
from components.pipeline.weights import how_to_fetch
from components.pipeline.withdrawn import REASON as WITHDRAWN
from components.pipeline.withdrawn import read_withdrawn
from components.pipeline.workspace import Part, PartEnded
from univigu.errors import (
    BadInputError,
    BusyError,
    ConfigError,
    GateFailedError,
    MissingInputError,
    PreemptedError,
    TransientError,
    UniViGUError,
    first_line,
    storage_fault,
)
from univigu.files import write_json

if TYPE_CHECKING:
    from components.pipeline.edits import Edit

IMPORTED = "import-"  # prefix of the step names of `univigu data import`
SOURCE_ROOT = Path(__file__).resolve().parents[2]


def run_stage(name: str, profile: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Run the step `name` with a profile under the work root; returns its manifest.

    Raises an error of `univigu.errors` if an input is missing or damaged, if the step's own gate fails, or if another
    process runs the same step under the same root. An imported output is kept unchanged.
    """
    stage = find_stage(name)
    root = root.resolve()
    if found := imported(stage, root):
        return found
    if os.environ.get("RANK", "0") != "0":
        return _run_worker_rank(stage, profile, root)
    return run_adhoc_stage(stage, profile, root, {})


def imported(stage: Stage, root: Path) -> dict[str, Any] | None:
    """The manifest of an output from `univigu data import`, which is kept instead of running the step, or None."""
    home = inside(root.resolve(), stage.home)
    try:
        maker = read_manifest(home, stage.name)["step"]
    except (BadInputError, OSError):
        return None
    return verify(home, stage.name) if str(maker).startswith(IMPORTED) else None


def run_adhoc_stage(stage: Stage, profile: Mapping[str, Any], root: Path, paths: Mapping[str, Path]) -> dict[str, Any]:
    """Run a step that need not be in the table of steps, with the guarantees of `run_stage`; returns its manifest.

    paths: more inputs by name. They may be outside the work root and have no manifest; the step records what it read
    from them in the rows of its shards.
    """
    with _noting_failure(stage, root.resolve()), _working(stage, root, fcntl.LOCK_EX) as held:
        commit.require_no_reader(stage, root.resolve())
        return _run_locked(stage, profile, root.resolve(), paths, held)


def run_part(name: str, profile: Mapping[str, Any], root: Path, part: Part) -> dict[str, int]:
    """Make the shards of one part of a step for a later `run_stage`; returns the numbers of shards made and kept.

    Parts of one step may run at the same time on one volume. Raises like `run_stage`, and `ConfigError` for a step
    without shards.
    """
    stage = find_stage(name)
    if not stage.sharded:
        raise ConfigError(f"'{name}' has no shards, so it has no parts; run it without --part.")
    if imported(stage, root):
        return {"made": 0, "kept": 0}
    return run_adhoc_part(stage, profile, root, {}, part)


def run_adhoc_part(
    stage: Stage, profile: Mapping[str, Any], root: Path, paths: Mapping[str, Path], part: Part
) -> dict[str, int]:
    """Make the shards of one part, as `run_part` does, for a later `run_adhoc_stage` with the same arguments."""
    with _working(stage, root, fcntl.LOCK_SH):
        step = make_step(stage, profile, root.resolve())
        step.inputs = {**step.inputs, **paths}
        step.part = part
        step.out.mkdir(parents=True, exist_ok=True)
        aside.keep_foreign_shards(step)
        try:
            load_function(stage.function)(step)
        except PartEnded as ended:
            return {"made": ended.made, "kept": ended.kept}
        raise AssertionError(f"'{stage.name}' is declared as sharded but did not call map_shards")


def restart(name: str, profile: Mapping[str, Any], root: Path) -> None:
    """Set aside all work of unfinished runs of a step, so that its next run starts from nothing.

    Raises like `run_stage`.
    """
    stage = find_stage(name)
    with _working(stage, root, fcntl.LOCK_EX):
        for place in aside.keep_everything(make_step(stage, profile, root.resolve())):
            print(f"{name}: the finished work is kept in {place}", file=sys.stderr)


def resume(name: str, profile: Mapping[str, Any], root: Path, folder: Path) -> None:
    """Make the next run of a step resume from the work in `folder`, whatever recipe made it (`aside`).

    Raises like `run_stage`, and `MissingInputError` if `folder` holds no work of the step.
    """
    stage = find_stage(name)
    with _working(stage, root, fcntl.LOCK_EX):
        for place in aside.resume_work(make_step(stage, profile, root.resolve()), folder):
            print(f"{name}: the earlier finished work is kept in {place}", file=sys.stderr)


@contextmanager
def _noting_failure(stage: Stage, root: Path) -> Iterator[None]:
    """Leave a note for monitoring of the error that ends the step. Being stopped, or busy, is not a failure."""
    note = note_path(root, FAILURE, stage.name)
    try:
        yield
        remove_note(note)
    except (BusyError, PreemptedError):
        raise
    except Exception as error:
        write_note(note, {"error": type(error).__name__, "message": first_line(error), "time": time.time()})
        raise


@contextmanager
def _working(stage: Stage, root: Path, kind: int) -> Iterator[Lock]:
    """Hold the locks of the step and its inputs; errors of the environment become errors of `univigu.errors`."""
    root, name = root.resolve(), stage.name
    refusal = f"Another run of '{name}' is running under {root}; wait for it, or use another --root."
    try:
        with lock(root, name, refusal, kind | fcntl.LOCK_NB) as held, ExitStack() as inputs:
            for maker in sorted(set(stage.inputs.values())):
                inputs.enter_context(commit.reading(maker, root))
            try:
                yield held
            except UniViGUError:
                raise
            except Exception:
                held.require()  # another run may have removed this run's files
                raise
    except UniViGUError:
        raise
    except Exception as error:
        if fault := storage_fault(error, root):
            raise fault from error
        if isinstance(error, FileNotFoundError) and str(root / STATE) in str(error):
            raise TransientError(
                f"Files of '{name}' under {root / STATE} were removed while it was running ({first_line(error)}). Run "
                "it again when no other process deletes files there; finished work is kept."
            ) from error
        if maker := _maker_of(error, stage, root):
            raise MissingInputError(
                f"'{name}' needs {getattr(error, 'filename', '')}, which is not in the output of '{maker}': another "
                f"release of this project made it. Run `univigu run {maker}` again, and then `univigu run {name}`."
            ) from error
        raise


def _maker_of(error: Exception, stage: Stage, root: Path) -> str | None:
    """The step whose finished output lacks the file that an error names, or None."""
    if not isinstance(error, FileNotFoundError) or not error.filename:
        return None
    missing = Path(os.fsdecode(error.filename))
    return next((step for step in stage.inputs.values() if missing.is_relative_to(root / find_stage(step).home)), None)


def _run_worker_rank(stage: Stage, profile: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Run a step as one of several processes of torchrun; rank 0 prepares and commits."""
    step = make_step(stage, profile, root)
    load_function(stage.function)(step)
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
        load_function(stage.function)(step)
        step.rows_in += step.reasons[EXCLUDED]  # which the step's function never saw
        _write_rejected(step)
    except GateFailedError:
        step._rejected.write(step.scratch)
        raise
    finally:
        step._rejected.close()
    held.require()
    manifest = commit.commit(step)
    _tell_of_edits(manifest)
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
        code=stage_code(stage, profile, [stage.function, stage.edits] if EDITED in inputs else ()),
    )


def _prepare_staging(staging: Path, scratch: Path, run_key: str) -> None:
    """Keep the shards and checkpoints of a killed run, and remove its other files."""
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
    """The path, the digest and the `stamps` of each input; the stamps are taken before the digest."""
    inputs: dict[str, Path] = {}
    digests: dict[str, str] = {}
    seen: dict[str, Any] = {}
    withdrawn = read_withdrawn(root)
    for name, maker in stage.inputs.items():
        inputs[name] = inside(root, find_stage(maker).home)
        seen[name] = stamps(inputs[name])
        digests[name] = verify(inputs[name], maker)["digest"]
        if digests[name] in withdrawn.outputs:
            raise BadInputError(
                f"'{stage.name}' can't read {inputs[name]}, which holds or comes from withdrawn data; run '{maker}' "
                "again first, or the import."
            )
    for name, key in stage.sources.items():
        path = inside(root, section(profile, key))
        if not path.exists():
            raise MissingInputError(
                f"'{stage.name}' needs {path} (the profile's '{key}'), which does not exist; {how_to_fetch(path)}."
            )
        inputs[name] = path
        seen[name] = stamps(path)
        digests[name] = source_digest(path)
    if edits_in_force(stage, root):
        inputs[EDITED] = root / EDITS
        seen[EDITED] = stamps(inputs[EDITED])
        digests[EDITED] = source_digest(inputs[EDITED])
    return inputs, digests, seen


def code_entries(stage: Stage, root: Path) -> list[str]:
    """What the code of a step starts from (`stage_code`) where people's edits are in force; empty: only the step."""
    return [stage.function, stage.edits] if edits_in_force(stage, root) else []


def edits_in_force(stage: Stage, root: Path) -> "tuple[Edit, ...]":
    """People's edits that a step has to apply; without any, the file is not an input of the step."""
    if not stage.edits or not (root / EDITS).is_file():
        return ()
    from components.pipeline.edits import in_force, read_edits  # importing pydantic takes a tenth of a second

    return in_force(read_edits(root))


def section(profile: Mapping[str, Any], key: str) -> Any:
    if key not in profile:
        raise ConfigError(f"The profile has no '{key}'; add that section (the bundled profile 'tiny' shows it).")
    return profile[key]


def _write_rejected(step: Step) -> None:
    """Write the rejected rows; raises `GateFailedError` if their share of the input rows is too large."""
    quarantined = step._rejected.write(step.out)
    own = step.parameters[step.stage.parameters[-1]] if step.stage.parameters else None
    limit = own.get("max_rejected_share", 1.0) if isinstance(own, Mapping) else 1.0
    decided = step.reasons[WITHDRAWN] + step.reasons[EXCLUDED]  # by people, so nothing is wrong with the data
    if quarantined - decided > limit * max(step.rows_in, 1):
        counts = ", ".join(f"{reason} {count}" for reason, count in step.reasons.most_common())
        kept = step.scratch / "rejected.parquet"
        raise GateFailedError(
            f"'{step.stage.name}' rejected {quarantined} of {step.rows_in} rows, more than the profile's share of "
            f"{limit:g} ({counts}); they are in {kept}."
        )


def _tell_of_edits(manifest: Mapping[str, Any]) -> None:
    failed = manifest["facts"].get(EDITED, {}).get("not_applied", [])
    if failed:
        print(
            f"{manifest['step']}: {len(failed)} edits in {EDITS} were not applied, because their clips or captions "
            f"are others by now: {', '.join(map(str, failed[:10]))}. `univigu data edit --list` "
            "shows them; undo them, or make them again.",
            file=sys.stderr,
        )


def _record_run(root: Path, manifest: Mapping[str, Any], run_key: str, seconds: float) -> None:
    """Record times and memory beside the outputs, never in them; `reports/run.json` is made from these records."""
    import resource

    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    peak, cpu = max(one.ru_maxrss for one in used), sum(one.ru_utime + one.ru_stime for one in used)
    record = {key: manifest[key] for key in ("rows_in", "rows_out", "quarantined", "reasons", "digest")}
    clock = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "process_seconds": _process_seconds()}
    record = {"name": manifest["step"], "key": run_key, **clock, "peak_rss_mb": round(peak / 1024, 1), **record}
    (root / STATE / "runs").mkdir(parents=True, exist_ok=True)
    write_json(root / STATE / "runs" / f"{manifest['step']}.json", record)


def _process_seconds() -> float | None:
    """Seconds since this process started, including its start-up; None if the system isn't Linux."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since boot
    except OSError:
        return None
    return round(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 2)
