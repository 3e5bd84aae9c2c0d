"""The tables that steps exchange: their schemas, and how they are read and written.

A table is a Parquet file named after its schema, ``<folder>/<name>.parquet``, sorted by its first two columns, with the
schema's fields in the schema's order: equal rows give equal bytes. A table that doesn't fit into memory is sorted on
disk.
"""

import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from univigu.errors import BadInputError, CorruptDataError, MissingInputError

_strings = pa.list_(pa.string())


def _schema(**fields: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind) for name, kind in fields.items()])


SCHEMAS: Mapping[str, pa.Schema] = {
    # One row per clean prompt. `scores` holds each filter's score as JSON; `n_tokens` includes EOS.
    "prompts": _schema(
        id=pa.string(),
        text=pa.string(),
        source=pa.string(),
        licence=pa.string(),
        language=pa.string(),
        n_tokens=pa.int32(),
        scores=pa.string(),
        verdict=pa.string(),
    ),
    # One row per kept clip. `shard` is the tar's path inside the folder, `member` the mp4's name inside the tar.
    # `stage` is the training stage the clip is for (1 or 2): decided by a hash of the id, so the stages share no clip.
    "clips": _schema(
        id=pa.string(),
        prompt_id=pa.string(),
        prompt=pa.string(),
        stage=pa.int8(),
        seed=pa.int64(),
        generator=pa.string(),
        generator_digest=pa.string(),
        frames=pa.int32(),
        height=pa.int32(),
        width=pa.int32(),
        fps=pa.float32(),
        sha256=pa.string(),
        scores=pa.string(),
        shard=pa.string(),
        member=pa.string(),
    ),
    # One row per clip. `status`: success | truncated | blocked | error | skipped (a stage-1 clip needs no caption).
    "captions": _schema(
        clip_id=pa.string(),
        text=pa.string(),
        n_tokens=pa.int32(),
        status=pa.string(),
        attempts=pa.int32(),
        captioner=pa.string(),
        captioner_digest=pa.string(),
        template_version=pa.string(),
    ),
    # One row per training sample that passed the last gate. `split`: train | heldout. `caption` is null in stage 1.
    "pairs": _schema(
        id=pa.string(),
        clip_id=pa.string(),
        stage=pa.int8(),
        split=pa.string(),
        prompt=pa.string(),
        caption=pa.string(),
        shard=pa.string(),
        member=pa.string(),
    ),
    # One row per encoded sample: where its tensors are (`univigu.training.data` describes the shard).
    "latents": _schema(
        id=pa.string(),
        stage=pa.int8(),
        split=pa.string(),
        video_sha256=pa.string(),
        vae_digest=pa.string(),
        tokenizer_digest=pa.string(),
        text_encoder_digest=pa.string(),
        prompt_sha256=pa.string(),
        frames=pa.int32(),
        height=pa.int32(),
        width=pa.int32(),
        shard=pa.string(),
        row=pa.int32(),
    ),
    # Rows that a step could not use. `row` is the row as JSON; curation withholds personal data from it.
    "rejected": _schema(id=pa.string(), reason=pa.string(), detail=pa.string(), row=pa.string()),
    # One row per scored item of the evaluation.
    "items": _schema(
        task=pa.string(),
        clip_id=pa.string(),
        prompt=pa.string(),
        text=pa.string(),
        truth=pa.string(),
        found=pa.string(),
        correct=pa.string(),
        open_attributes=_strings,
    ),
}


ROW_GROUP = 65_536  # rows of a table that are in memory at once, and rows of a Parquet row group
_BATCH = 4096  # rows that are Python objects at once
_STRIDE = 512  # rows of a sorted run between the places where row groups may be cut


def write_table(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write `rows` as ``folder/name.parquet``, sorted by the schema's first two columns; returns their number.

    Raises `BadInputError` if a row does not fit the schema.
    """
    writer = TableWriter(name, folder)
    try:
        writer.extend(rows)
        return writer.write(folder)
    finally:
        writer.close()


class TableWriter:
    """Writes a table by an external merge sort: rows may come in any order, and memory doesn't grow with their number.

    Runs of `ROW_GROUP` rows are sorted and written to a hidden folder in `folder`; `write` merges the runs. A query
    engine would sort as well, but its row groups may change with its version, and equal rows must give equal bytes.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.schema = SCHEMAS[name]
        self._rows: list[Mapping[str, Any]] = []
        self._tables: list[pa.Table] = []
        self._runs: list[Path] = []
        self._spilled: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; raises `BadInputError` (now or on a later call) if it does not fit the schema."""
        self._rows.append(row)
        self._count += 1
        if len(self._rows) == _BATCH:
            self._gather()
            if sum(table.num_rows for table in self._tables) >= ROW_GROUP:
                self._spill()

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows, as `append` does."""
        for row in rows:
            self.append(row)

    def write(self, folder: Path) -> int:
        """Write ``folder/<name>.parquet`` with all rows so far; returns their number."""
        self._gather()
        path = folder / f"{self.name}.parquet"
        if not self._runs:
            pq.write_table(self._sorted(), path, compression="zstd")
            return self._count
        if self._tables:
            self._spill()
        with pq.ParquetWriter(path, self.schema, compression="zstd") as writer:
            for group in _row_groups(_merged([_open_run(run) for run in self._runs])):
                writer.write_table(group, row_group_size=ROW_GROUP)
        return self._count

    def close(self) -> None:
        """Remove the runs on disk."""
        if self._spilled:
            self._spilled.cleanup()

    def _gather(self) -> None:
        """Convert the rows from Python objects to Arrow, which takes a fraction of the memory."""
        try:
            self._tables.append(pa.Table.from_pylist(self._rows, schema=self.schema))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise BadInputError(
                f"A row of the table '{self.name}' does not fit its schema ({error}); fix the step."
            ) from error
        self._rows = []

    def _sorted(self) -> pa.Table:
        return _sort(pa.concat_tables(self._tables, promote_options="none"))

    def _spill(self) -> None:
        if not self._spilled:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._spilled = tempfile.TemporaryDirectory(prefix=f".{self.name}-", dir=self.folder)
        run = Path(self._spilled.name) / f"{len(self._runs):06d}.arrow"
        table = self._sorted()
        with pa.OSFile(str(run), "wb") as sink, pa.ipc.new_file(sink, self.schema) as writer:
            writer.write_table(table)
        self._runs.append(run)
        self._tables = []


def _sort(table: pa.Table) -> pa.Table:
    """Sort by the first two columns; the sort is stable."""
    return table.combine_chunks().sort_by([(field, "ascending") for field in table.schema.names[:2]])


def _open_run(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _merged(runs: Sequence[pa.Table]) -> Iterator[pa.Table]:
    """Merge sorted runs into tables of about `ROW_GROUP` rows."""

    def place(value: pa.Scalar) -> tuple[bool, Any]:
        return not value.is_valid, value.as_py()  # nulls come last

    keys = [run.column(0) for run in runs]
    cuts = sorted(place(key[at]) for key in keys for at in range(_STRIDE, len(key), _STRIDE))
    starts = [0] * len(runs)
    for cut in [*cuts[ROW_GROUP // _STRIDE :: ROW_GROUP // _STRIDE], None]:
        ends = [len(key) if cut is None else bisect_left(key, cut, key=place) for key in keys]
        parts = [run.slice(start, end - start) for run, start, end in zip(runs, starts, ends, strict=True)]
        yield _sort(pa.concat_tables(parts))
        starts = ends


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `ROW_GROUP` rows and one rest: row groups must not depend on the runs."""
    waiting: pa.Table | None = None
    for table in tables:
        waiting = pa.concat_tables([waiting, table]) if waiting else table
        while len(waiting) >= ROW_GROUP:
            yield waiting.slice(0, ROW_GROUP).combine_chunks()
            waiting = waiting.slice(ROW_GROUP)
    if waiting:
        yield waiting.combine_chunks()


def read_table(folder: Path, name: str) -> pa.Table:
    """Read ``folder/name.parquet``; raises if it is missing, damaged or has another schema."""
    path = folder / f"{name}.parquet"
    if not path.is_file():
        raise MissingInputError(f"There is no table '{name}' at {path}; run the step that makes it first.")
    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise CorruptDataError(
            f"The table {path} can't be read ({error}); delete it and run its step again."
        ) from error
    if not table.schema.equals(SCHEMAS[name]):
        raise BadInputError(f"The table {path} doesn't have the schema of '{name}'; run the step that makes it again.")
    return table
