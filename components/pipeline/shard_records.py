"""Records of finished shards and batches: input rows, recipe, files, output rows, and a digest of the record itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.pipeline.digests import json_digest, plain_json
from components.pipeline.workspace import Workspace
from univigu.files import read_json_object, write_json

OWN_DIGEST = "record_sha256"


def record_keys(step: Workspace, rows_digest: str) -> dict[str, str]:
    """What identifies a shard or batch: digests of its input rows, of the run's recipe, and of both."""
    return {"of": rows_digest, "run": step.key, "key": json_digest([rows_digest, step.key])}


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record with a digest of itself."""
    plain = plain_json({name: value for name, value in record.items() if name != OWN_DIGEST})
    write_json(path, {**plain, OWN_DIGEST: json_digest(plain)})


def read_record(path: Path) -> dict[str, Any] | None:
    """A record; None if it is missing or was changed after it was written."""
    try:
        record = read_json_object(path)
    except (OSError, ValueError):
        return None
    own = record.pop(OWN_DIGEST, None)
    return record if own == json_digest(record) else None
