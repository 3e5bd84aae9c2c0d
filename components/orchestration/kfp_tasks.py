"""The bodies of the Kubeflow pipeline's tasks; `kfp_pipeline.py` connects the tasks.

All tasks share a work root (a volume in a cluster, a folder under `kfp.local`). A task runs a step with the command
that users run, `univigu run STEP`, so messages, exit codes and guarantees are the same. Tasks pass on only the digest
of their output: data stay in the work root. Each line that a task prints begins with the task's name.

`univigu rehearse` is another preflight, which stays separate: it checks a profile, without a cluster or a server.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from components.orchestration import notifications
from components.orchestration.prerequisites import (
    check_batches,
    check_captioner,
    check_disk,
    check_gpu_driver,
    check_quantities,
    check_sources,
    check_tracking,
    disk_of_one_node,
    registry_login,
)
from components.pipeline.processes import ChildProcesses, read_lines, shell_code
from components.pipeline.profiles import load_profile
from components.pipeline.stages import STAGES, find_stage
from components.pipeline.state import STATE
from components.pipeline.workspace import Part
from univigu.errors import ConfigError, MissingInputError, TransientError, UniViGUError
from univigu.files import write_json

BACKENDS = ("pod", "trainjob")  # where a training step runs: in the task's own pod, or as a TrainJob
MAX_PARTS = 1000
STOP_S = 300  # how long a step may take to save its state after SIGTERM
PATIENCE = "UNIVIGU_PATIENCE_S"  # the variable that replaces PATIENCE_S
PATIENCE_S = 900.0  # seconds for which a step that ended with exit code 75 is run again, before Argo's retries
FIRST_WAIT_S = 30.0
RUN_ID = "UNIVIGU_RUN_ID"
FAILURE = "failure"  # name of the file that records a failed task
SUCCEEDED, FAILED = "SUCCEEDED", "FAILED"  # KFP's terms
TERMINATION_LOG = Path("/dev/termination-log")  # what a container writes here becomes the message of its end
PROMOTION = "UNIVIGU_PROMOTION"  # the variable that register-model reads


def check_prerequisites(
    profile: str,
    root: str,
    parts: int,
    train_backend: str,
    required_env: Sequence[str],
    free_gib: float,
    resources: Mapping[str, str],
    trainjob: Mapping[str, str] | None = None,
) -> list[str]:
    """Check early what would otherwise fail later, on a node with GPUs; returns the parts of a sharded step.

    Checks the parameters, including the Kubernetes `resources` (``training_gpus`` and so on), the work root, the
    profile's sources, the environment, the disk, MLflow's tracking server and model registry if MLFLOW_TRACKING_URI
    is set, the captioner unless all captions are made, whether the GPUs divide the profile's batches evenly, and with
    `trainjob` (the options of `univigu train-job`) whether the cluster accepts the TrainJobs.
    """
    with _report_failure("check-prerequisites", root):
        if not 1 <= parts <= MAX_PARTS:
            raise ConfigError(f"'parts' is {parts}; set it to a number from 1 to {MAX_PARTS}.")
        if train_backend not in BACKENDS:
            raise ConfigError(f"There is no train_backend '{train_backend}'; choose one of {', '.join(BACKENDS)}.")
        check_quantities(resources)
        check_sources(profile, Path(root))
        if os.environ.get("KUBERNETES_SERVICE_HOST") and (kind := disk_of_one_node(Path(root))):
            _log(
                "check-prerequisites",
                f"the work root is on {kind}, a disk of one node: pods on another node would wait for it without end; "
                "unless all steps fit on this node, use a ReadWriteMany volume",
            )
        if trainjob is None and int(resources["training_gpus"]) > 1:
            check_batches(profile, int(resources["training_gpus"]))
        if missing := [name for name in required_env if not os.environ.get(name)]:
            raise MissingInputError(
                f"The environment variables {', '.join(missing)} are not set; add them to a Secret of the pods, or "
                "remove them from 'required_env'."
            )
        check_disk(Path(root), free_gib)
        check_tracking(Path(root))
        check_captioner(profile, Path(root))
        if trainjob is not None:
            _check_train_jobs(profile, root, trainjob)
    _log("check-prerequisites", f"all prerequisites are met; sharded steps run in {parts} parts")
    return [f"{number}/{parts}" for number in range(1, parts + 1)]


# pyrefly: ignore[bad-class-definition]  (its fields are the steps of the table)
CacheKeys = NamedTuple("CacheKeys", [(stage.name.replace("-", "_"), str) for stage in STAGES])  # outputs of a task


def cache_keys(profile: str, root: str) -> CacheKeys:
    """A cache key per step: the same as last time only if the output is still in the root and would be the same.

    An orchestrator that caches results by a task's inputs would otherwise skip a step whose output was replaced or
    deleted.
    """
    from components.pipeline.freshness import committed, recipes

    with _report_failure("cache-keys", root):
        known = recipes(load_profile(profile), Path(root).resolve())
        keys = {}
        for step, recipe in known.items():
            last = _read(_state_file(root, step))
            is_present = last.get("digest") is not None and last["digest"] == committed(step, Path(root)).get("digest")
            is_same = last.get("cache_key", "").startswith(f"{recipe}.")
            key = last["cache_key"] if is_same and is_present else f"{recipe}.{uuid4().hex}"
            keys[step.replace("-", "_")] = key
    return CacheKeys(**keys)


def run_step(
    step: str,
    profile: str,
    root: str,
    cache_key: str,
    declared: Mapping[str, Sequence[str]],
    inputs: str = "",
    part: str = "",
    gpus: int = 1,
    trainjob: Mapping[str, str] | None = None,
    promotion: str = "",
) -> str:
    """Run a step, or one part of it, unless it is finished; returns the digest of its output ("" for a part).

    declared: the step's `declaration` in the compiled pipeline; it must match the image's. inputs: each step that it
    reads with the digest of this run's output, as ``curate-prompts=e3b0…``, separated by spaces; if another run has
    replaced one of them, the task fails. trainjob: options of `univigu train-job`; the step then runs as a TrainJob.
    A step that ends with exit code 75, because a server doesn't answer, is run again for `PATIENCE_S` seconds.
    promotion: ``manual`` if a person or an orchestrator promotes the model; by default the profile decides.
    """
    from components.pipeline.freshness import committed, finished, require_inputs

    expected = {name: digest for name, _, digest in (pair.partition("=") for pair in inputs.split()) if digest}
    with _report_failure(step, root, part):
        if declared != declaration(step):
            raise ConfigError(
                f"The pipeline was compiled for another version of '{step}' than the image has; run "
                "`univigu pipeline compile` with the image's version, and submit the result."
            )
        require_inputs(step, Path(root), expected)
        if not find_stage(step).external and (manifest := finished(step, load_profile(profile), Path(root))):
            _log(step, "finished before, with the same inputs, parameters and code")
        else:
            if trainjob is None and find_stage(step).resources.gpus:
                check_gpu_driver()
            whole = not part or Part.parse(part).of == 1  # a single part commits the output itself
            arguments = command(step, profile, root, "" if whole else part, gpus, trainjob)
            environment = registry_login() | ({PROMOTION: promotion} if promotion else {})
            _run_command(step, root, arguments, part, environment, float(os.environ.get(PATIENCE) or PATIENCE_S))
            if not whole:
                return ""
            require_inputs(step, Path(root), expected, made=True)
            manifest = committed(step, Path(root))
        if not part:
            _write(_state_file(root, step), {"cache_key": cache_key, "digest": manifest["digest"]})
    return str(manifest["digest"])


def declaration(step: str) -> dict[str, list[str]]:
    """The inputs and parameters of a step in stages.py, which the compiled pipeline contains."""
    stage = find_stage(step)
    return {"inputs": sorted(set(stage.inputs.values())), "parameters": [*stage.sources.values(), *stage.parameters]}


def command(
    step: str, profile: str, root: str, part: str = "", gpus: int = 1, trainjob: Mapping[str, str] | None = None
) -> list[str]:
    """The command line that runs a step, under torchrun if it has several GPUs."""
    module = ["-m", "components.cli.main"]
    where = ["--profile", profile, "--root", root]
    if trainjob is not None:
        options = [text for name, value in trainjob.items() if value for text in (f"--{name}", value)]
        return [sys.executable, *module, "train-job", step, *where, *options]
    if gpus > 1:
        launcher = ["-m", "univigu.training.launch", "--standalone", f"--nproc-per-node={gpus}"]
        return [sys.executable, *launcher, *module, "run", step, *where]
    return [sys.executable, *module, "run", step, *where, *(["--part", part] if part else [])]


def notify(pipeline: str, root: str, state: str, message: str) -> None:
    """Report how a run ended, on standard output and with a notification.

    This task also runs when a run was cancelled. KFP then gives it the last state that the run's tasks have reported,
    RUNNING (Kubeflow Pipelines 2.17.0, backend/src/v2/driver/resolve.go).
    """
    if state not in (SUCCEEDED, FAILED):
        message = message or "The run was cancelled, or a pod was lost before it could report its end."
    failure = last_failure(root) if state != SUCCEEDED else {}  # a retry has succeeded
    report = {
        "pipeline": pipeline,
        "run_id": _run_id(),
        "state": state,
        "failed_step": failure.get("step"),
        "exit_code": failure.get("exit_code"),
        "message": failure.get("message") or message or None,
    }
    _log("notify", json.dumps(report, ensure_ascii=False))
    _log("notify", notifications.send(report))


def last_failure(root: str) -> dict[str, Any]:
    """The step, exit code and message of the task that failed in this run; empty if none failed."""
    failure = _read(_state_file(root, FAILURE))
    return failure if failure.get("run_id") == _run_id() else {}


def _check_train_jobs(profile: str, root: str, options: Mapping[str, str]) -> None:
    for stage in STAGES:
        if stage.resources.pool == "training":
            arguments = command(stage.name, profile, root, trainjob=options)
            _run_command("check-prerequisites", root, [*arguments, "--dry-run"])


# --- running a command, and reporting failures -----------------------------------------------------------------------


def _log(task: str, line: str) -> None:
    print(f"{task} | {line.rstrip()}", flush=True)


def _run_command(
    step: str,
    root: str,
    arguments: Sequence[str],
    part: str = "",
    environment: Mapping[str, str] | None = None,
    patience_s: float = 0.0,
) -> None:
    """Run a command and forward SIGTERM to it; if it fails, exit with its exit code.

    If it ends with exit code 75, it is run again after doubled waits, until `patience_s` seconds have passed since.
    """
    task, give_up, wait_s = f"{step} {part}".strip(), 0.0, FIRST_WAIT_S
    while True:
        with ChildProcesses() as children, children.start(arguments, environment) as process:
            message = read_lines(process, lambda line: _log(task, line))
        code = shell_code(process.returncode)
        if code != TransientError.exit_code or children.received:
            break
        give_up = give_up or time.monotonic() + patience_s
        wait_s = min(wait_s, give_up - time.monotonic())
        if wait_s <= 0:
            break
        _log(task, f"tries again in {wait_s:.3g} s, because this failure may be temporary")
        time.sleep(wait_s)
        wait_s *= 2
    if code:
        _exit(step, root, code, message or f"'{step}' ended with exit code {code}; see its log.")


@contextmanager
def _report_failure(step: str, root: str, part: str = "") -> Iterator[None]:
    """For an expected error, print its message, record it for `notify`, and exit with its exit code.

    A task that succeeds deletes the record of its earlier attempt; parts leave that to the task that commits.
    """
    try:
        yield
    except UniViGUError as error:
        _log(step, f"univigu: {error}")
        _exit(step, root, error.exit_code, str(error))
    if not part and last_failure(root).get("step") == step:
        _state_file(root, FAILURE).unlink(missing_ok=True)


def _exit(step: str, root: str, code: int, message: str) -> None:
    """Record a failure for `notify` and for Argo, and exit with the code.

    KFP's launcher replaces each exit code with 1, but Argo also sees the message of the container's end, by which
    infra/kustomize/kubeflow-pipelines decides whether to retry.
    """
    failure = {"run_id": _run_id(), "step": step, "exit_code": code, "message": message}
    try:
        _write(_state_file(root, FAILURE), failure)
    except OSError as error:
        _log(step, f"the failure could not be recorded in {root} ({error.strerror})")
    if TERMINATION_LOG.exists():
        with suppress(OSError):
            TERMINATION_LOG.write_text(f"univigu exit code {code}: {message}"[:1000], encoding="utf-8")
    sys.exit(code)


def _run_id() -> str:
    return os.environ.get(RUN_ID, "")


def _state_file(root: str, name: str) -> Path:
    return Path(root) / STATE / "kfp" / f"{name}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)
