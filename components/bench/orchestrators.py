"""`make measure-orchestrators`: the overhead of each orchestrator per step, and whether all make the same dataset.

Each orchestrator runs the whole pipeline in a fresh copy of this repository, as its page describes. A step's overhead
is the time from the end of the previous step to its own end, minus the time of its own process (`univigu run STEP`,
including the start of the interpreter). For the first step it begins when the orchestrator is started (`dvc repro`,
`univigu pipeline run --local`) or, in a running Airflow, when the task that decides to train has ended.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from components.orchestration.airflow_server import AirflowServer, free_port
from components.pipeline.manifests import MANIFEST
from components.pipeline.profiles import use_profile
from components.pipeline.stages import STAGES, find_stage
from components.pipeline.state import STATE
from univigu.errors import UniViGUError
from univigu.files import write_json

REPO = Path(__file__).resolve().parents[2]
DATASET = "encode-latents"  # the step whose output is the dataset
ORCHESTRATORS = ("dvc", "kfp_local", "airflow")


def main(
    profile: Annotated[str, typer.Option(help="Parameters and sizes of the run.")] = "smoke",
    only: Annotated[list[str] | None, typer.Option(help="Measure only this orchestrator; may be repeated.")] = None,
    root: Annotated[Path, typer.Option(help="The folder for reports/orchestrators.json.")] = REPO,
) -> None:
    """Run the pipeline once under each orchestrator, and write reports/orchestrators.json."""
    names = only or ORCHESTRATORS
    try:
        report = measure(profile, {name: RUNS[name] for name in names})
    except UniViGUError as error:
        print(f"univigu: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    (root / "reports").mkdir(exist_ok=True)
    write_json(root / "reports" / "orchestrators.json", report)
    for name in names:
        by_step = report["overhead_seconds_by_step"][name]
        worst = max(by_step, key=by_step.__getitem__)
        print(
            f"{name:<10} {report['overhead_seconds'][name]:5.2f} s per step, at most {by_step[worst]:.2f} s ({worst}); "
            f"dataset {report['dataset_digest'][name][:12]}"
        )


def measure(profile: str, runs: dict[str, Callable[[str, Path], float]]) -> dict[str, Any]:
    """Mean `overhead_seconds` of a step, the same by step, and `dataset_digest`, each by orchestrator."""
    by_step, digests = {}, {}
    for name, run in runs.items():
        with tempfile.TemporaryDirectory(prefix=f"univigu-{name}-") as folder:
            root = Path(folder) / "uni-vigu"
            copy_repository(root, profile)
            print(f"{name}: running the profile '{profile}' in {root}", file=sys.stderr, flush=True)
            by_step[name] = overheads(root, run(profile, root))
            manifest = root / find_stage(DATASET).home / MANIFEST
            digests[name] = json.loads(manifest.read_text(encoding="utf-8"))["digest"]
    return {
        "profile": profile,
        "overhead_seconds": {name: round(sum(steps.values()) / len(steps), 2) for name, steps in by_step.items()},
        "overhead_seconds_by_step": by_step,
        "dataset_digest": digests,
    }


def overheads(root: Path, started: float) -> dict[str, float]:
    """Seconds outside each step's process, from the steps' records under `root`; `started`: Unix time."""
    found = {}
    for stage in STAGES:  # steps run one after another
        path = root / STATE / "runs" / f"{stage.name}.json"
        ended = path.stat().st_mtime
        process = json.loads(path.read_text(encoding="utf-8"))["process_seconds"]
        found[stage.name] = round(ended - started - process, 2)
        started = ended
    return found


def copy_repository(root: Path, profile: str) -> None:
    """Copy all tracked and untracked, not ignored files into a new repository that uses `profile`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (REPO / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes((REPO / name).read_bytes())
    use_profile(profile, root)
    who = ["-c", "user.name=univigu", "-c", "user.email=univigu@localhost"]
    for command in (["init", "--quiet"], ["add", "--all"], [*who, "commit", "--quiet", "--message", "Measure"]):
        call(["git", *command], root)


def run_dvc(profile: str, root: Path) -> float:
    started = time.time()
    call([sys.executable, "-m", "dvc", "repro", "--quiet"], root)
    return started


def run_kfp_local(profile: str, root: Path) -> float:
    started = time.time()
    call([sys.executable, "-m", "components.cli.main", "pipeline", "run", "--local", f"profile={profile}"], root)
    return started


def run_airflow(profile: str, root: Path) -> float:
    never = "0 0 29 2 *"  # no scheduled run beside this one
    settings = {"UNIVIGU_PROFILE": profile, "AIRFLOW_VAR_UNIVIGU_APPROVAL": "off", "UNIVIGU_RETRAIN_CRON": never}
    with AirflowServer(root / STATE / "airflow", root, free_port(), settings) as server:
        server.wait_until_ready()
        server.call("PATCH", "/api/v2/dags/retrain", {"is_paused": False})
        body = {"logical_date": None, "conf": {"profile": profile}}
        run = server.call("POST", "/api/v2/dags/retrain/dagRuns", body)["dag_run_id"]
        path = f"/api/v2/dags/retrain/dagRuns/{run}"
        while (state := server.call("GET", path)["state"]) not in ("success", "failed"):
            time.sleep(1)
        if state == "failed":
            raise UniViGUError(f"The DAG run {run} failed; its logs were in {server.home}, run `make airflow` to see.")
        return datetime.fromisoformat(server.call("GET", f"{path}/taskInstances/begin")["end_date"]).timestamp()


RUNS = {"dvc": run_dvc, "kfp_local": run_kfp_local, "airflow": run_airflow}


def call(command: list[str], root: Path) -> None:
    """Run a command with this environment's packages and the copy's code; its output is shown only if it fails."""
    environment = {
        **{key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join([str(root / "model"), str(root)]),
        "DVC_NO_ANALYTICS": "1",
    }
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise UniViGUError(f"`{' '.join(command[-3:])}` failed (exit code {done.returncode}): {said}")


if __name__ == "__main__":
    typer.run(main)
