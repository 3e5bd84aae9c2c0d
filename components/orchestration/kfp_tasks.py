"""What each task of the Kubeflow pipeline does; `kfp_pipeline.py` says how the tasks hang together.

A task works below a work root that all of them share (a volume in a cluster, a folder under `kfp.local`). A step is run
by the same command that people use, `univigu run STEP`, so its promises, its messages and its exit codes are the same.
What a task hands on is the digest of the output that it left: data stay below the work root. Each line that a task
prints begins with its name.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from components.captions.caption_videos import open_captioner
from components.orchestration import notifications
from components.pipeline.manifests import inside
from components.pipeline.processes import read_lines, shell_code, start_child
from components.pipeline.profiles import load_profile
from components.pipeline.stages import STAGES, find_stage
from components.pipeline.state import STATE
from components.pipeline.workspace import Part
from components.tracking import open_tracking, tracking_uri
from univigu.errors import (
    BadInputError,
    ConfigError,
    DiskFullError,
    MissingInputError,
    UniViGUError,
)
from univigu.files import write_json
from univigu.mlflow_store import first_contact

BACKENDS = ("pod", "trainjob")  # where a training step runs: in the task's own pod, or as a TrainJob that it starts
MAX_PARTS = 1000
STOP_S = 300  # how long a step that is told to stop may take to save its state
RUN_ID = "UNIVIGU_RUN_ID"
FAILURE = "failure"  # the note of what failed
SUCCEEDED = "SUCCEEDED"  # KFP's word
PROMOTION = "UNIVIGU_PROMOTION"  # what register-model reads


def check_prerequisites(
    profile: str,
    root: str,
    parts: int,
    train_backend: str,
    required_env: Sequence[str],
    free_gib: float,
    asked: Mapping[str, str],
    trainjob: Mapping[str, str] | None = None,
) -> list[str]:
    """Fail in one sentence for whatever would fail later, on a node with GPUs; returns the parts of a sharded step.

    Checked are the parameters, `asked` of Kubernetes among them (``training_gpus`` and so on), the work root, the
    profile's sources, the environment, the disk, MLflow's tracking server and model registry if MLFLOW_TRACKING_URI
    names them, the captioner unless its captions are there, whether the GPUs can share out the profile's batches, and
    with `trainjob` (the options of `univigu train-job`) whether the cluster would take the TrainJobs.
    """
    with _failing_as_a_task("check-prerequisites", root):
        if not 1 <= parts <= MAX_PARTS:
            raise ConfigError(f"A step can't be split in {parts} parts; give 'parts' a number from 1 to {MAX_PARTS}.")
        if train_backend not in BACKENDS:
            raise ConfigError(f"There is no train_backend '{train_backend}'; choose one of {', '.join(BACKENDS)}.")
        _check_quantities(asked)
        _check_sources(profile, Path(root))
        if trainjob is None and int(asked["training_gpus"]) > 1:
            _check_batches(profile, int(asked["training_gpus"]))
        if missing := [name for name in required_env if not os.environ.get(name)]:
            raise MissingInputError(
                f"The environment lacks {', '.join(missing)}; put them into a Secret that the pods get, "
                "or take them out of 'required_env'."
            )
        _check_disk(Path(root), free_gib)
        _check_tracking(Path(root))
        _check_captioner(profile, Path(root))
        if trainjob is not None:
            _check_train_jobs(profile, root, trainjob)
    _say("check-prerequisites", f"all prerequisites are there; a step in shards is made in {parts} parts")
    return [f"{number}/{parts}" for number in range(1, parts + 1)]


def cache_keys(profile: str, root: str) -> dict[str, str]:
    """For each step a key that is the same as the last time only if its output would be, and still lies below the root.

    An orchestrator that keeps results by the inputs of a task would otherwise skip a step whose output has been
    replaced or wiped since.
    """
    from components.pipeline.freshness import committed, recipes

    with _failing_as_a_task("cache-keys", root):
        known = recipes(load_profile(profile), Path(root).resolve())
        keys = {}
        for step, recipe in known.items():
            kept = _read(_note(root, step))
            still_there = kept.get("digest") is not None and kept["digest"] == committed(step, Path(root)).get("digest")
            same = kept.get("cache_key", "").startswith(f"{recipe}.")
            keys[step] = kept["cache_key"] if same and still_there else f"{recipe}.{uuid4().hex}"
    return keys


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

    `declared` is what the compiled pipeline says of the step; an image that says otherwise is refused. inputs: each
    step that it reads with the digest that this run's task left, as ``curate-prompts=e3b0…``, separated by blanks;
    where another run has replaced one of them, the task fails. `trainjob`, the options of `univigu train-job`, has the
    step run there. promotion: ``manual`` where somebody else decides who is champion; without one the profile says.
    """
    from components.pipeline.freshness import committed, finished, require_inputs

    expected = {name: digest for name, _, digest in (pair.partition("=") for pair in inputs.split()) if digest}
    with _failing_as_a_task(step, root, part):
        if declared != declaration(step):
            raise ConfigError(
                f"The pipeline was compiled for another version of '{step}' than the image has; "
                "run `univigu pipeline compile` with the image's version, and submit that."
            )
        require_inputs(step, Path(root), expected)
        if not find_stage(step).external and (manifest := finished(step, load_profile(profile), Path(root))):
            _say(step, "finished before, with the same inputs, parameters and code")
        else:
            whole = not part or Part.parse(part).of == 1  # one part of one has nothing to leave to another task
            arguments = command(step, profile, root, "" if whole else part, gpus, trainjob)
            _call(step, root, arguments, part, {PROMOTION: promotion} if promotion else {})
            if not whole:
                return ""
            require_inputs(step, Path(root), expected, made=True)
            manifest = committed(step, Path(root))
        if not part:
            _write(_note(root, step), {"cache_key": cache_key, "digest": manifest["digest"]})
    return str(manifest["digest"])


def declaration(step: str) -> dict[str, list[str]]:
    """What the table says of a step, and a compiled pipeline repeats."""
    stage = find_stage(step)
    return {"inputs": sorted(set(stage.inputs.values())), "parameters": [*stage.sources.values(), *stage.parameters]}


def command(
    step: str, profile: str, root: str, part: str = "", gpus: int = 1, trainjob: Mapping[str, str] | None = None
) -> list[str]:
    """The command that runs a step: the one that people use, under torchrun if it has several GPUs to itself."""
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
    """Say how a run ended, on standard output and to whoever `notifications` tells."""
    failure = last_failure(root) if state != SUCCEEDED else {}  # which a later try has mended
    report = {
        "pipeline": pipeline,
        "run_id": _run_id(),
        "state": state,
        "failed_step": failure.get("step"),
        "exit_code": failure.get("exit_code"),
        "message": failure.get("message") or message or None,
    }
    _say("notify", json.dumps(report, ensure_ascii=False))
    _say("notify", notifications.send(report))


def last_failure(root: str) -> dict[str, Any]:
    """The step, exit code and message of the task that failed in the present run, or nothing."""
    failure = _read(_note(root, FAILURE))
    return failure if failure.get("run_id") == _run_id() else {}


# --- what is checked before anything is computed ---------------------------------------------------------------------


def _check_sources(profile: str, root: Path) -> None:

    if not root.is_dir():
        raise MissingInputError(f"There is no work root {root}; mount the volume there, or give another 'root'.")
    if not os.access(root, os.W_OK | os.X_OK):
        raise BadInputError(f"The work root {root} can't be written to; mend its owner, or give another 'root'.")
    values = load_profile(profile)
    for key in sorted({key for stage in STAGES for key in stage.sources.values()}):
        if not inside(root, values[key]).exists():
            raise MissingInputError(
                f"There is no {values[key]} below {root}, which the profile names as '{key}'; copy it there."
            )


_QUANTITY = re.compile(r"(?=.*[1-9])\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?")  # Kubernetes', above zero, without exponents


def _check_quantities(asked: Mapping[str, str]) -> None:
    for name, text in asked.items():
        gpus = name.endswith("gpus")
        if not (text.isdecimal() if gpus else _QUANTITY.fullmatch(text)):
            example = "a whole number of GPUs, such as 8" if gpus else "a quantity of Kubernetes', such as 500m or 64Gi"
            raise ConfigError(f"'{name}' is '{text}'; give it {example}.")


def _check_batches(profile: str, gpus: int) -> None:
    from univigu.training.engine import TrainingConfig, micro_batches

    values = load_profile(profile)
    for stage in STAGES:
        if stage.resources.pool == "training":
            section = values[stage.parameters[-1]]
            micro_batches(TrainingConfig.from_section(section, values["seed"]), gpus)


def _check_disk(root: Path, free_gib: float) -> None:
    import shutil

    free = shutil.disk_usage(root).free / 2**30
    if free < free_gib:
        raise DiskFullError(
            f"Only {free:.1f} GiB are free below {root}, and 'free_gib' asks for {free_gib:g}; make room."
        )


def _check_tracking(root: Path) -> None:
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return

    open_tracking(root)
    import mlflow

    with first_contact(tracking_uri(root)):
        mlflow.MlflowClient().search_registered_models(max_results=1)


def _check_captioner(profile: str, root: Path) -> None:
    from components.pipeline.freshness import finished

    values = load_profile(profile)
    with suppress(BadInputError):  # of the step's inputs, which may have to be made
        if finished("caption-videos", values, root):
            return
    open_captioner(values, root).check()


def _check_train_jobs(profile: str, root: str, options: Mapping[str, str]) -> None:

    for stage in STAGES:
        if stage.resources.pool == "training":
            arguments = command(stage.name, profile, root, trainjob=options)
            _call("check-prerequisites", root, [*arguments, "--dry-run"])


# --- running a command, and saying why it failed ---------------------------------------------------------------------


def _say(task: str, line: str) -> None:
    print(f"{task} | {line.rstrip()}", flush=True)


def _call(
    step: str, root: str, arguments: Sequence[str], part: str = "", environment: Mapping[str, str] | None = None
) -> None:
    """Run a command, passing on a request to stop; exits as it does where it fails."""
    with start_child(arguments, environment) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            said = read_lines(process, lambda line: _say(f"{step} {part}".strip(), line))
        finally:
            signal.signal(signal.SIGTERM, before)
    if process.returncode:
        code = shell_code(process.returncode)
        _exit(step, root, code, said or f"'{step}' ended with exit code {code}; its log says why.")


@contextmanager
def _failing_as_a_task(step: str, root: str, part: str = "") -> Iterator[None]:
    """Turn an expected failure into one sentence, a note for whoever notifies, and the exit code.

    A task that succeeds takes back an earlier try's note; one of several parts leaves that to the task that commits.
    """
    try:
        yield
    except UniViGUError as error:
        _say(step, f"univigu: {error}")
        _exit(step, root, error.exit_code, str(error))
    if not part and last_failure(root).get("step") == step:
        _note(root, FAILURE).unlink(missing_ok=True)


def _exit(step: str, root: str, code: int, message: str) -> None:
    note = {"run_id": _run_id(), "step": step, "exit_code": code, "message": message}
    try:
        _write(_note(root, FAILURE), note)
    except OSError as error:
        _say(step, f"the failure could not be noted below {root} ({error.strerror})")
    sys.exit(code)


def _run_id() -> str:
    return os.environ.get(RUN_ID, "")


def _note(root: str, name: str) -> Path:

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
