"""The object that a step function receives, and long steps in shards and batches that survive a killed run.

A finished shard is a folder under ``<out>/shards``; its record is in the run's state. A batch is a folder beside the
shard in progress, ``.00003.batches/0007``, with its record next to it. Both are kept only if the record's key (input
rows, parameters, inputs, code) is still valid and the bytes still match.
"""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from components.pipeline.aside import keep_committed_shard
from components.pipeline.digests import json_digest, tree_files
from components.pipeline.fingerprint import stage_code
from components.pipeline.manifests import Recipe
from components.pipeline.progress import Meter, progress
from components.pipeline.shard_records import read_record, record_keys, write_record
from components.pipeline.stages import EDITED
from components.pipeline.state import STATE, lock
from components.pipeline.tables import TableWriter, read_table, write_table
from components.pipeline.withdrawn import DETAIL, REASON, Withdrawn, read_withdrawn
from components.pipeline.workspace import Part, PartEnded, Workspace
from univigu.files import file_sha256, link_or_copy, sync_tree

if TYPE_CHECKING:
    from components.pipeline.edits import Edit
    from components.settings.profile import Profile

T = TypeVar("T")
Rows = Sequence[Mapping[str, Any]]
Work = Callable[[Rows, Path], Rows]  # fills a folder, returns its output rows


@dataclass
class Step(Workspace):
    """What a step function receives: its inputs, its parameters, and the functions that write its output."""

    part: Part | None = None  # make only these shards and commit nothing
    meter: Meter | None = None  # of the shards in progress
    rows_in: int = 0
    rows_out: int = 0
    facts: dict[str, Any] = field(default_factory=dict)  # goes into the manifest unchanged; no times, no host names
    reasons: Counter[str] = field(default_factory=Counter)  # of rejected rows
    _rejected: TableWriter = field(init=False)
    _rejected_of_shard: list[dict[str, str]] | None = None  # while a shard is made: for its record

    def __post_init__(self) -> None:
        self._rejected = TableWriter("rejected", self.scratch)

    @cached_property
    def settings(self) -> "Profile":
        """The sections of the profile that the stage declares, e.g. ``step.settings.video.height``.

        Reading an undeclared section raises `AttributeError`: undeclared sections must not decide the output.
        """
        from components.settings.profile import read_sections  # pydantic is imported only when a step runs

        return read_sections(self.parameters)

    @contextmanager
    def temporary_files(self) -> Iterator[Path]:
        """Within the block, temporary files of this process, MLflow's too, are made in the folder that it yields.

        The folder is beside the output in progress, so what a killed run leaves there is removed by the next one.
        """
        before = tempfile.tempdir
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            tempfile.tempdir = folder
            try:
                yield Path(folder)
            finally:
                tempfile.tempdir = before

    def kept_folder(self, entry: str, more: Any = None) -> Path:
        """A folder for results that depend on one function (``module:name``) instead of all of the step's code.

        It is under the work root, is never part of the output, and survives commits. Another recipe, or another value
        of `more` (JSON), has another folder. The caller must verify what it reads from there.
        """
        code = stage_code(self.stage, self.parameters, [entry])
        key = json_digest([Recipe(self.parameters, self.input_digests, code).key(), more])
        return self.root / STATE / "kept" / self.stage.name / key[:16]

    def read(self, source: str, table: str) -> pa.Table:
        """Read a table of the input called `source`, with people's edits where the step applies them."""
        found = read_table(self.inputs[source], table)
        return load_function(self.stage.edits)(self, table, found) if EDITED in self.inputs else found

    @cached_property
    def edits(self) -> "tuple[Edit, ...]":
        """The edits of clips that this step has to apply."""
        from components.pipeline.edits import in_force, read_edits

        return in_force(read_edits(self.root)) if EDITED in self.inputs else ()

    def write(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a table into the output, without withdrawn rows; its number of rows becomes the step's `rows_out`."""
        self.rows_out = write_table(self.out, table, self.without_withdrawn(rows))

    @cached_property
    def withdrawn(self) -> Withdrawn:
        """What was withdrawn under the work root."""
        return read_withdrawn(self.root)

    def without_withdrawn(self, rows: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
        """The rows that were not withdrawn; the others are quarantined without their content."""
        return (row for row in rows if not self._drop(row)) if self.withdrawn else rows

    def _drop(self, row: Mapping[str, Any]) -> bool:
        covered = self.withdrawn.covers(row)
        if covered:
            self.reject(str(row.get("id") or row.get("clip_id")), REASON, DETAIL)
        return covered

    def reject(self, row_id: str, reason: str, detail: str = "", row: Any = None) -> None:
        """Quarantine a row: `reason` is a short slug for counting, `detail` says what was found."""
        text = json.dumps(row, ensure_ascii=False, sort_keys=True, default=str)
        text = text.encode(errors="replace").decode()  # Parquet can't store a lone surrogate
        rejected = {"id": row_id, "reason": reason, "detail": detail, "row": text}
        if self._rejected_of_shard is None:
            self._quarantine([rejected])
        else:
            self._rejected_of_shard.append(rejected)

    def _quarantine(self, rejected: Iterable[Mapping[str, str]]) -> None:
        for row in rejected:
            self.reasons[row["reason"]] += 1
            self._rejected.append(row)

    def progress(self, items: Iterable[T], total: int | None = None, unit: str = "rows") -> Iterator[T]:
        """Yield `items` with a bar on a terminal, and a line every few seconds otherwise."""
        return progress(items, self.stage.name, total, unit)

    def map_shards(
        self,
        rows: Sequence[Mapping[str, Any]],
        size: int,
        work: Work,
        unit: str = "rows",
        group: Callable[[Mapping[str, Any]], Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Run `work(rows, folder)` over `rows` in shards of `size`, keeping the finished shards of an earlier run.

        `work` fills `folder` (large files: a tar, a safetensors) and returns the output rows; it may call `reject`.
        The folder becomes ``<out>/shards/00000`` and so on. With `group`, a shard holds only consecutive rows for which
        its value is equal. Returns all output rows in shard order. In a part of a step it raises `PartEnded` instead,
        since only the whole run has all rows.
        """
        return _map_shards(self, rows, size, work, unit, group)

    def map_batches(
        self, rows: Sequence[Mapping[str, Any]], size: int, folder: Path, work: Work
    ) -> list[tuple[Path, list[dict[str, Any]]]]:
        """Within `map_shards`, make a shard in batches of `size`, keeping the finished batches of a killed run.

        folder: the shard's. `work(rows, batch_folder)` is as in `map_shards`. Returns each batch's folder, which is
        deleted when the shard is finished, and its output rows.
        """
        return _map_batches(self, rows, size, folder, work)


def load_function(address: str) -> Callable[..., Any]:
    """The function ``module:name``, imported now."""
    module, _, name = address.partition(":")
    return getattr(import_module(module), name)


def _map_shards(
    step: Step, rows: Rows, size: int, work: Work, unit: str, group: Callable[[Mapping[str, Any]], Any] | None
) -> list[dict[str, Any]]:
    """Implement `Step.map_shards`."""
    chunks = [chunk for _, alike in groupby(rows, group or (lambda _: None)) for chunk in _chunks(list(alike), size)]
    # Withdrawn rows are dropped from their shards, so that the other shards are kept.
    chunks = [kept for chunk in chunks if (kept := list(step.without_withdrawn(chunk)))]
    shards = [(f"{number:05d}", chunk) for number, chunk in enumerate(chunks)]
    if step.part:
        _make_part(step, shards[step.part.number - 1 :: step.part.of], work, unit)
    results: list[dict[str, Any]] = []
    with Meter(step.stage.name, len(rows), unit) as step.meter:
        for name, shard in shards:
            record = _kept_shard(step, name, json_digest(list(shard)))
            if record:
                step.meter.skip(len(shard))
            else:
                record = _make_shard(step, name, shard, work)
            step._quarantine(record["rejected"])
            results.extend(record["rows"])
    names = {name for name, _ in shards}
    for folder in (step.out / "shards").glob("*"):  # left by a killed run over other rows
        if folder.name not in names:
            shutil.rmtree(folder)
    return results


def _map_batches(
    step: Step, rows: Rows, size: int, folder: Path, work: Work
) -> list[tuple[Path, list[dict[str, Any]]]]:
    """Implement `Step.map_batches`."""
    results = []
    for number, batch in enumerate(_chunks(rows, size)):
        place = _batches(folder) / f"{number:04d}"
        path, keys = place.with_suffix(".json"), record_keys(step, json_digest(list(batch)))
        record = _read_record(path, keys["key"])
        if record and record["files"] == _file_digests(place):
            # pyrefly: ignore[missing-attribute]
            step.meter.skip(len(batch))
        else:
            path.unlink(missing_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            record = _do(step, keys, batch, place, work)
            write_record(path, record)
            # pyrefly: ignore[missing-attribute]
            step.meter.advance(len(batch))
        # pyrefly: ignore[missing-attribute]
        step._rejected_of_shard.extend(record["rejected"])
        results.append((place, record["rows"]))
    return results


# --- shards -----------------------------------------------------------------------------------------------------------


def _chunks(rows: Rows, size: int) -> list[Rows]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _batches(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.batches")


def _make_part(step: Step, shards: Sequence[tuple[str, Rows]], work: Work, unit: str) -> None:
    made = 0
    with Meter(step.stage.name, sum(len(shard) for _, shard in shards), unit) as step.meter:
        for name, shard in shards:
            refusal = (
                f"Another run of shard {name} of '{step.stage.name}' is running under {step.root}; wait for it, or "
                "use another --root."
            )
            with lock(step.root, f"{step.stage.name}/{name}", refusal):
                if _find_shard(step, name, json_digest(list(shard))):
                    step.meter.skip(len(shard))
                else:
                    _make_shard(step, name, shard, work)
                    made += 1
    raise PartEnded(made, len(shards) - made)


def _kept_shard(step: Step, name: str, rows_digest: str) -> dict[str, Any] | None:
    """The record of a finished shard after copying it to the staging folder, or None."""
    found = _find_shard(step, name, rows_digest)
    if not found:
        return None
    record, folder = found
    if folder != step.out / "shards" / name:
        shutil.rmtree(step.out / "shards" / name, ignore_errors=True)
        shutil.copytree(folder, step.out / "shards" / name, copy_function=link_or_copy)
    return record


def _read_record(path: Path, key: str) -> dict[str, Any] | None:
    record = read_record(path)
    return record if record and record["key"] == key else None


def _find_shard(step: Step, name: str, rows_digest: str) -> tuple[dict[str, Any], Path] | None:
    """The record and folder of a finished shard whose key is still valid and whose bytes still match, or None."""
    record = _read_record(step.records / f"{name}.json", record_keys(step, rows_digest)["key"])
    if record:
        for home in (step.out, step.previous):
            folder = home / "shards" / name
            if record["files"] == _file_digests(folder):
                return record, folder
    return None


def _make_shard(step: Step, name: str, rows: Rows, work: Work) -> dict[str, Any]:
    rows_digest = json_digest(list(rows))
    keep_committed_shard(step, name, rows_digest)
    partial = step.out / "shards" / f".{name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # pyrefly: ignore[missing-attribute]
    done = step.meter.done
    record = _do(step, record_keys(step, rows_digest), rows, partial, work)
    final = step.out / "shards" / name
    shutil.rmtree(final, ignore_errors=True)
    sync_tree(partial)
    partial.rename(final)
    step.records.mkdir(parents=True, exist_ok=True)
    write_record(step.records / f"{name}.json", record)
    shutil.rmtree(_batches(partial), ignore_errors=True)
    # pyrefly: ignore[missing-attribute]
    step.meter.advance(len(rows) - (step.meter.done - done))
    return record


def _do(step: Step, keys: Mapping[str, str], rows: Rows, folder: Path, work: Work) -> dict[str, Any]:
    """Run `work`; the rows that it rejects go into the record, and count whenever the record is used."""
    around, step._rejected_of_shard = step._rejected_of_shard, []
    try:
        made = [dict(row) for row in work(rows, folder)]
        rejected = step._rejected_of_shard
    finally:
        step._rejected_of_shard = around
    return {**keys, "files": _file_digests(folder), "rows": made, "rejected": rejected}


def _file_digests(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in tree_files(folder)}
