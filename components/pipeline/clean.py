"""Remove what runs have left under a work root, while no step is running."""

import shutil
from contextlib import ExitStack
from pathlib import Path

from components.pipeline import stages
from components.pipeline.commit import remove
from components.pipeline.state import STATE, lock

# under STATE; locks, answers and aside stay
LEFT = ("staging", "scratch", "shards", "runs", "kept", "docs", "monitor/training", "monitor/failure")


def clean(root: Path) -> None:
    """Remove all outputs and the files of unfinished runs; raises `BusyError` while a step is running.

    Paid answers and work that was set aside stay, and so does what no step owns: the registry, DVC's cache,
    pretraining.
    """
    root = root.resolve()
    with ExitStack() as held:
        for stage in stages.STAGES:
            refusal = f"'{stage.name}' is running under {root}; wait for it or stop it, then try again."
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
