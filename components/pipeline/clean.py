"""Removing what runs have left below a work root, while none of them is under way."""

import shutil
from contextlib import ExitStack
from pathlib import Path

from components.pipeline import stages
from components.pipeline.commit import remove
from components.pipeline.state import STATE, lock

LEFT = ("staging", "scratch", "shards", "runs", "kept", "docs")  # of the state; locks, answers and what is aside stay


def clean(root: Path) -> None:
    """Remove all outputs, and what unfinished runs have left; raises `BusyError` while a step is under way.

    What was paid for or set aside stays, and so does what isn't a step's: the registry, DVC's cache, pretraining.
    """
    root = root.resolve()
    with ExitStack() as held:
        for stage in stages.STAGES:
            refusal = f"'{stage.name}' is under way below {root}; wait for it, or stop it, and run this again."
            held.enter_context(lock(root, stage.name, refusal))
        for stage in stages.STAGES:
            for path in _outputs(root, stage):
                remove(path)
        (root / "reports" / "run.json").unlink(missing_ok=True)
        for name in LEFT:
            shutil.rmtree(root / STATE / name, ignore_errors=True)


def _outputs(root: Path, stage: stages.Stage) -> list[Path]:
    home = root / stage.home
    names = (*stage.outputs, "rejected.parquet", "manifest.json")
    return [home / name for name in names] if stage.outputs else [home]
