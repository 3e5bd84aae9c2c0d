"""What must hold after a fault, and after the run that follows it; each returns what is wrong, in words."""

import errno
import signal
from collections.abc import Mapping
from pathlib import Path

from components.pipeline.manifests import MANIFEST, verify
from components.pipeline.stages import find_stage
from tests.chaos import roots
from tests.chaos.server import Outcome
from tests.chaos.shim import Fault
from univigu.errors import BadInputError

DOCUMENTED = (65, 66, 73, 74, 75, 78, 80, 81, 82)  # the README's exit codes, without success and usage
_FITTING = {errno.EIO: (74,), errno.ENOSPC: (73,)}
_WORKED_ON = (".univigu/staging/", ".univigu/scratch/")


def after_fault(outcome: Outcome, fault: Fault, place: Path, step: str, expected: Mapping[str, str]) -> list[str]:
    """What is wrong with how a run ended that met a fault, and with what it left."""
    found = []
    if outcome.hung:
        found.append("hang")
    if "Traceback (most recent call last)" in outcome.err:
        found.append(f"traceback: {_traceback(outcome.err)}")
    if fault.number and not outcome.hung:
        found += _ending(outcome, fault, place, expected)
    return found + _output(place / "root", step)


def after_again(outcome: Outcome, place: Path, expected: Mapping[str, str]) -> list[str]:
    """What is wrong with the run after that, which meets no fault, and with what is there then."""
    found = []
    if outcome.hung:
        found.append("hang of the second run")
    if outcome.code:
        found.append(f"the second run ends with {outcome.code}: {_last(outcome.err)}")
    if not found:
        found = roots.differences(expected, roots.state(place / "root"))
    return found + leftovers(place)


def leftovers(place: Path) -> list[str]:
    """What is in the folder for temporary files that shouldn't be."""
    return [f"left in TMPDIR: {path.name}" for path in sorted((place / "tmp").iterdir())]


def _ending(outcome: Outcome, fault: Fault, place: Path, expected: Mapping[str, str]) -> list[str]:
    if outcome.code == 0:  # the fault was none for the output: it must be there, and right
        now = roots.state(place / "root")
        found = [line for line in roots.differences(expected, now) if not _is_work(line)]
        return [f"success, and {line}" for line in found] + leftovers(place)
    found = []
    if outcome.code == -signal.SIGKILL or outcome.code not in DOCUMENTED:
        found.append(f"exit code {outcome.code}: {_last(outcome.err)}")
    elif outcome.code not in _FITTING.get(fault.number, DOCUMENTED) and not (
        _in_sqlite(outcome) and outcome.code == 74
    ):
        found.append(f"wrong cause, {outcome.code} for {fault.kind}: {_last(outcome.err)}")
    if not _last(outcome.err).startswith("univigu: "):
        found.append(f"no sentence at the end: {_last(outcome.err)}")
    return found + ([] if fault.lasting else leftovers(place))


def _in_sqlite(outcome: Outcome) -> bool:
    """Whether the call was one of SQLite's, which says of most errors no more than that input or output failed."""
    return any("mlflow.db" in call for call in outcome.calls)


def _is_work(line: str) -> bool:
    """Whether a difference is about work that the next run removes or uses."""
    return line.startswith(_WORKED_ON)


def _output(root: Path, step: str) -> list[str]:
    """A step's output must be absent, or complete and verified."""
    if not step:
        return []
    home = root / find_stage(step).home
    if not (home / MANIFEST).exists():
        return []
    try:
        verify(home, step)
    except BadInputError as error:
        return [f"the output doesn't verify: {error}"]
    return []


def _traceback(text: str) -> str:
    """What it came from and what it said, of the first traceback."""
    before, _, after = text.partition("Traceback (most recent call last)")
    lines = after.splitlines()[1:]
    said = next((line for line in lines if not line.startswith(" ")), "")
    return f"{said[:200]} (after '{_last(before)[:100]}'; {lines[0].strip() if lines else ''})"


def _last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]
