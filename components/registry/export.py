"""A registered version as a folder: its pipeline and card for use without a registry, or all its files, verified."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.registry import ledger
from components.tracking import store_to_read
from univigu import registry, version_files
from univigu.errors import BadInputError, CorruptDataError
from univigu.files import sync_tree

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def export_version(name: str, version: str, folder: Path, precision: str, root: Path) -> int:
    """Write a version's pipeline and card to the new folder `folder`, and return the size of its files in bytes.

    precision: in which the weights are stored, one of `PRECISIONS`; `from_pretrained` loads them as fp32 unless told
    otherwise. The folder appears complete, or not at all. Raises `BadInputError` if it exists already, and
    `MissingInputError` if there is no such version.
    """
    store = store_to_read(root)
    address = f"models:/{name}/{registry.find_version(name, version, store).version}"
    pipeline = registry.artifact(address, "pipeline", store)
    card = registry.artifact(address, "README.md", store).read_text(encoding="utf-8")
    with _new_folder(folder) as staged:
        _store_weights(pipeline, staged, precision)
        (staged / "README.md").write_text(_with_precision(card, precision), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def pull_version(name: str, version: str, folder: Path, root: Path, unverified: bool = False) -> ledger.Entry | None:
    """Write a version as MLflow stores it to the new folder `folder`, if its files are those that were promoted.

    Returns the ledger line with the digest that the files have; None if there is no such line, which `unverified`
    allows. The folder appears complete, or not at all. Raises `CorruptDataError` where the files or the ledger were
    changed, `BadInputError` for a version without a line or a folder that exists already, and `MissingInputError` if
    there is no such version.
    """
    store = store_to_read(root)
    found = registry.find_version(name, version, store)
    number = int(found.version)
    line = _promotion_of(name, number, root)
    if line is None and not unverified:
        if version_files.TAG not in found.tags:
            raise BadInputError(
                f"Version {number} of '{name}' was registered by an earlier release, which recorded no digest of its "
                f"files; give --unverified if you trust the artifact store, or register the model again."
            )
        raise BadInputError(
            f"The ledger has no digest of the files of version {number} of '{name}', as it was never promoted, or by "
            f"an earlier release; promote it (`univigu model promote {number} --why ...`), or give --unverified."
        )
    if not registry.has_files(found, store):
        registry.artifact(f"models:/{name}/{number}", "pipeline", store)  # raises, with their location
    with _new_folder(folder) as staged:
        staged.mkdir()
        registry.download(f"models:/{name}/{number}", staged, store)
        for cache in list(staged.rglob("__pycache__")):
            shutil.rmtree(cache)
        if line is not None and not _has_digest(staged, line.files):
            raise CorruptDataError(
                f"The files of version {number} of '{name}' are not those that {line.who} promoted on {line.when}; "
                f"don't load it from the registry, and find out who can write to the artifact store."
            )
    return line


def _has_digest(folder: Path, digest: str) -> bool:
    try:
        return version_files.folder_digest(folder) == digest
    except ValueError:  # MLmodel describes no model
        return False


def _promotion_of(name: str, number: int, root: Path) -> ledger.Entry | None:
    """The first line about a version that has a digest of its files, which never change afterwards."""
    if faults := ledger.verify_ledger(name, root).faults:
        raise CorruptDataError(
            f"The history of '{name}' was changed in {len(faults)} places, so nothing in it can be relied on; see "
            f"`univigu model history --name {name} --verify`."
        )
    decided = (ledger.PROMOTED, ledger.UNCHANGED)
    lines = [line for line in ledger.read_ledger(name, root) if line.outcome in decided and line.version == number]
    return next((line for line in reversed(lines) if line.files), None)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A path beside `folder`, to which it is renamed if the block succeeds; otherwise nothing is left."""
    if folder.exists():
        raise BadInputError(f"'{folder}' exists already; give a new folder, or delete that one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        staged = Path(temporary) / "model"
        yield staged
        sync_tree(staged)
        os.rename(staged, folder)


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
