"""The tables that travel between steps: their schemas, and the one way to read and write them.

A table is a Parquet file named after its schema, ``<folder>/<name>.parquet``, sorted by its first column, with the
schema's fields in the schema's order: equal rows give equal bytes.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from univigu.errors import BadInputError, CorruptDataError, MissingInputError

_strings = pa.list_(pa.string())


def _schema(**fields: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind) for name, kind in fields.items()])


SCHEMAS: Mapping[str, pa.Schema] = {
    # One row a clean prompt. `scores` holds each filter's figure as JSON; `n_tokens` includes EOS.
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
    # One row a kept clip. `shard` is the tar's path inside the folder, `member` the mp4's name inside the tar.
    # `stage` is the training stage the clip is for (1 or 2): decided by a hash of the id, so the two never share one.
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
    # One row a clip. `status`: success | truncated | blocked | error | skipped (a stage-1 clip needs no caption).
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
    # One row a training sample that passed the last gate. `split`: train | heldout. `caption` is null in stage 1.
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
    # One row an encoded sample: where its tensors lie (`univigu.training.data` describes the shard).
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
    # What could not be used, in any step. `row` is the row as JSON; curation withholds personal data from it.
    "rejected": _schema(id=pa.string(), reason=pa.string(), detail=pa.string(), row=pa.string()),
    # One row a scored item of the evaluation.
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


def write_table(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write `rows` as ``folder/name.parquet``, sorted by the schema's first column; returns how many there were.

    Raises `BadInputError` where a row does not fit the schema.
    """
    schema = SCHEMAS[name]
    try:
        table = pa.Table.from_pylist(list(rows), schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise BadInputError(f"A row of the table '{name}' does not fit its schema ({error}); mend the step.") from error
    table = table.sort_by([(field, "ascending") for field in schema.names[:2]])
    pq.write_table(table, folder / f"{name}.parquet", compression="zstd")
    return table.num_rows


def read_table(folder: Path, name: str) -> pa.Table:
    """Read ``folder/name.parquet``; raises when it is missing, damaged, or has another schema."""
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
        raise BadInputError(f"The table {path} has another schema than '{name}'; run the step that makes it again.")
    return table
