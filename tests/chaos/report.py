"""What the trials came to: a line each in a log, so that a run can be stopped and resumed, and a report of them."""

import json
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.chaos.plans import REPO
from tests.chaos.shim import Fault
from tests.chaos.trials import Trial


def command(trial: Trial) -> str:
    """The line that repeats a trial."""
    if not trial.faults:
        return "python -m tests.chaos all --minutes 0"
    faults = " ".join(f"--fault '{fault.kind}:{fault.n}'" for fault in trial.faults)
    return f"python -m tests.chaos one '{trial.plan}' {faults}"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, of each trial the newest; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return list({line.get("key", number): line for number, line in enumerate(lines)}.values())


def note(path: Path, line: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log:
        log.write(json.dumps(line) + "\n")


def of_trial(trial: Trial, seconds: float) -> dict[str, Any]:
    kinds = [fault.kind for fault in trial.faults]
    return {
        "plan": trial.plan,
        "kind": "another folder" if not kinds else "double kill" if len(kinds) > 1 else kinds[0],
        "key": key(trial.plan, trial.faults),
        "hit": trial.hit,
        "findings": list(trial.findings),
        "repeat": command(trial),
        "seconds": round(seconds, 2),
        "commit": commit(),
    }


def of_fuzzing(name: str, inputs: int, found: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """A line of the log about `inputs` odd inputs."""
    told = [f"{one['finding']}; python -m tests.chaos fuzz --target '{name}' --number {one['input']}" for one in found]
    return {"fuzzed": name, "inputs": inputs, "findings": told, "seconds": round(seconds, 2), "commit": commit()}


def key(plan: str, faults: Iterable[Fault]) -> str:
    return f"{plan}: " + ", ".join(f"{fault.kind} {fault.n}" for fault in faults)


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def summarise(lines: Iterable[Mapping[str, Any]], scheduled: int, seed: int) -> dict[str, Any]:
    """Counts by plan and kind, and each finding with the line that repeats it.

    A trial whose call never came is none.
    """
    lines = list(lines)
    trials = [line for line in lines if "plan" in line and line["hit"]]
    fuzzed = [line for line in lines if "fuzzed" in line]
    by_plan: dict[str, Counter[str]] = defaultdict(Counter)
    for line in trials:
        by_plan[line["plan"]][line["kind"]] += 1
    kinds = Counter(line["kind"] for line in trials)
    return {
        "seed": seed,
        "commits": sorted({line["commit"] for line in lines}),
        "seconds": round(sum(line["seconds"] for line in lines)),
        "scheduled": scheduled,
        "kills": sum(count for kind, count in kinds.items() if "kill" in kind),
        "faults": sum(count for kind, count in kinds.items() if kind.startswith("E")),
        "kinds": dict(sorted(kinds.items())),
        "plans": {plan: dict(sorted(counts.items())) for plan, counts in by_plan.items()},
        "fuzzed": {name: sum(line["inputs"] for line in fuzzed if line["fuzzed"] == name) for name in _names(fuzzed)},
        "inputs": sum(line["inputs"] for line in fuzzed),
        "findings": [
            {name: line[name] for name in ("repeat", "hit", "fuzzed", "findings") if name in line}
            for line in lines
            if line["findings"]
        ],
    }


def _names(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    return sorted({line["fuzzed"] for line in lines})
