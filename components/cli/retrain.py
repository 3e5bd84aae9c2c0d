"""What `univigu data withdraw --retrain` runs: every step that used something withdrawn, and all that depend on one."""

import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from components.cli.messages import say
from components.pipeline.runner import imported
from components.pipeline.stages import STAGES, find_stage
from univigu.errors import ConfigError, UniViGUError


def steps_after(outputs: Collection[str]) -> list[str]:
    """The steps whose outputs held withdrawn data and those that depend on one of them, in the pipeline's order."""
    again: list[str] = []
    for stage in STAGES:
        if stage.name in outputs or any(source in again for source in stage.inputs.values()):
            again.append(stage.name)
    return again


def check_retraining(root: Path, outputs: Collection[str], dry_run: bool) -> None:
    """Raise `ConfigError` for a dry run, and `CorruptDataError` if an import that has to be copied is damaged."""
    if dry_run:
        raise ConfigError("--dry-run changes nothing, so it can't be combined with --retrain; leave one out.")
    find_imported(root, outputs)


def find_imported(root: Path, outputs: Collection[str]) -> list[str]:
    """The steps among `outputs` whose output is that of an import."""
    return [name for name in outputs if imported(find_stage(name), root.resolve())]


def retrain(root: Path, outputs: Collection[str], profile: str) -> None:
    """Run the steps again, each in a process of its own, up to the registration of a new version.

    An import is written again first, without what was withdrawn; its steps then keep it.
    Raises `UniViGUError` at the first that fails; the withdrawal stands.
    """
    if find_imported(root, outputs):
        from components.clips.import_remains import remake_import

        manifest = remake_import(root)
        say(f"Left of the import: {manifest['rows_out']} clips")
    for step in steps_after(outputs):
        say(f"Running {step} again")
        command = [sys.executable, "-m", "components.cli.main", "run", step, "--profile", profile, "--root", str(root)]
        if code := subprocess.run(command, check=False).returncode:
            raise UniViGUError(
                f"The retraining stopped: '{step}' ended with {code}, as it says above. The withdrawal stands; fix the "
                f"cause, then run this step and those after it with `univigu run`."
            )
