"""What a step function is given, and how long steps work: in shards and batches, of which a killed run keeps those that
are finished.

A finished shard is a folder below ``<out>/shards``; its record is beside the run's state. A batch is a folder beside
the shard that is under way, ``.00003.batches/0007``, with its record next to it. Either is kept only where its record's
key (input rows, parameters, inputs, code) still holds and its bytes still match.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
from components.pipeline.state import STATE, lock
from components.pipeline.tables import TableWriter, read_table, write_table
from components.pipeline.workspace import Part, PartEnded, Workspace
from univigu.files import file_sha256, link_or_copy, sync_tree

if TYPE_CHECKING:
    from components.settings.profile import Profile

T = TypeVar("T")
Rows = Sequence[Mapping[str, Any]]
Work = Callable[[Rows, Path], Rows]  # fills a folder, returns the rows of what is in it


@dataclass
class Step(Workspace):
    """What a step function is given: its inputs, its parameters, and the ways to leave something behind."""

    part: Part | None = None  # make only these shards, and commit nothing
    meter: Meter | None = None  # of the shards that are under way
    rows_in: int = 0
    rows_out: int = 0
    facts: dict[str, Any] = field(default_factory=dict)  # goes into the manifest as it is; no clock, no host
    reasons: Counter[str] = field(default_factory=Counter)  # of the rows that were rejected
    _rejected: TableWriter = field(init=False)
    _rejected_of_shard: list[dict[str, str]] | None = None  # while one is made: they go into its record

    def __post_init__(self) -> None:
        self._rejected = TableWriter("rejected", self.scratch)

    @cached_property
    def settings(self) -> "Profile":
        """The sections of the profile that the stage declares, e.g. ``step.settings.video.height``.

        Reading a section that it doesn't declare raises `AttributeError`: what isn't declared decides no output.
        """
        from components.settings.profile import read_sections  # pydantic's models: only steps need them

        return read_sections(self.parameters)

    def __getitem__(self, section: str) -> Any:
        """A section of the profile, e.g. ``step["video"]["height"]``."""
        return self.parameters[section]

    def kept_folder(self, entry: str, more: Any = None) -> Path:
        """A folder for results that one function (``module:name``) decides, and not all of the step's code.

        It is below the work root, is never part of the output, and outlives commits; for another recipe, or another
        `more` (JSON), it is another one. Whoever keeps something there makes sure that it is whole when it is read.
        """
        code = stage_code(self.stage, self.parameters, [entry])
        key = json_digest([Recipe(self.parameters, self.input_digests, code).key(), more])
        return self.root / STATE / "kept" / self.stage.name / key[:16]

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
        The folder ends up as ``<out>/shards/00000`` and so on. With a `group`, a shard holds only neighbours for which
        it is equal. Returns all output rows, in shard order; in a part of a step it doesn't return, as only the whole
        run has all rows.
        """
        return _map_shards(self, rows, size, work, unit, group)

    def map_batches(
        self, rows: Sequence[Mapping[str, Any]], size: int, folder: Path, work: Work
    ) -> list[tuple[Path, list[dict[str, Any]]]]:
        """Within `map_shards`, do a shard in batches of `size`, keeping the finished ones of a run that was killed.

        `folder` is the shard's. `work(rows, batch_folder)` is as in `map_shards`. Returns each batch's folder, which
        goes when the shard is finished, and its output rows.
        """
        return _map_batches(self, rows, size, folder, work)


def _map_shards(
    step: Step, rows: Rows, size: int, work: Work, unit: str, group: Callable[[Mapping[str, Any]], Any] | None
) -> list[dict[str, Any]]:
    """What `Step.map_shards` promises."""
    chunks = [chunk for _, alike in groupby(rows, group or (lambda _: None)) for chunk in _chunks(list(alike), size)]
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
    for folder in (step.out / "shards").glob("*"):  # of a killed run over other rows
        if folder.name not in names:
            shutil.rmtree(folder)
    return results


def _map_batches(
    step: Step, rows: Rows, size: int, folder: Path, work: Work
) -> list[tuple[Path, list[dict[str, Any]]]]:
    """What `Step.map_batches` promises."""
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
                f"Another run of shard {name} of '{step.stage.name}' is under way below {step.root}; wait for it, or "
                "give another --root."
            )
            with lock(step.root, f"{step.stage.name}/{name}", refusal):
                if _find_shard(step, name, json_digest(list(shard))):
                    step.meter.skip(len(shard))
                else:
                    _make_shard(step, name, shard, work)
                    made += 1
    raise PartEnded(made, len(shards) - made)


def _kept_shard(step: Step, name: str, rows_digest: str) -> dict[str, Any] | None:
    """The record of a finished shard, which is then in the staging folder, or None."""
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
    """The record and folder of a finished shard whose key still holds and whose bytes still match, or None."""
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
    """Run `work`, and keep what it rejected in the record: whoever keeps the record counts it."""
    around, step._rejected_of_shard = step._rejected_of_shard, []
    try:
        made = [dict(row) for row in work(rows, folder)]
        rejected = step._rejected_of_shard
    finally:
        step._rejected_of_shard = around
    return {**keys, "files": _file_digests(folder), "rows": made, "rejected": rejected}


def _file_digests(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in tree_files(folder)}
