"""Export a registered version as a folder that works without a registry: its pipeline, and its card as README.md."""

import os
import shutil
import tempfile
from pathlib import Path

from components.tracking import existing_store
from univigu import registry
from univigu.errors import BadInputError
from univigu.files import sync_tree

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def export_version(name: str, version: str, folder: Path, precision: str, root: Path) -> int:
    """Write a version's pipeline and card to the new folder `folder`, and return the size of its files in bytes.

    precision: in which the weights are stored, one of `PRECISIONS`; `from_pretrained` loads them as fp32 unless told
    otherwise. The folder appears complete, or not at all. Raises `BadInputError` if it exists already, and
    `MissingInputError` if there is no such version.
    """
    if folder.exists():
        raise BadInputError(f"'{folder}' exists already; give a new folder, or delete that one.")
    store = existing_store(root)
    address = f"models:/{name}/{registry.find_version(name, version, store).version}"
    pipeline = registry.artifact(address, "pipeline", store)
    card = registry.artifact(address, "README.md", store).read_text(encoding="utf-8")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        staged = Path(temporary) / "model"
        _store_weights(pipeline, staged, precision)
        (staged / "README.md").write_text(_with_precision(card, precision), encoding="utf-8")
        sync_tree(staged)
        os.rename(staged, folder)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _store_weights(pipeline: Path, target: Path, precision: str) -> None:
    if precision == "fp32":
        shutil.copytree(pipeline, target)
        return
    import torch

    from univigu.pipeline import UniViGUPipeline

    dtype = getattr(torch, PRECISIONS[precision])
    UniViGUPipeline.from_pretrained(pipeline, dtype=dtype).save_pretrained(target)


def _with_precision(card: str, precision: str) -> str:
    if precision == "fp32":
        return card
    return (
        f"{card.rstrip()}\n\n## Precision\n\nThe weights were rounded to {precision} after the scores were measured.\n"
    )
