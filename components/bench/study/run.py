"""Run the arms of a study: each with the pipeline's own steps, in a work root of its own.

Under ``.univigu/study/<profile>`` of the work root:

* ``data``: one run of the steps from prompts to latents, which every arm reads;
* ``trained/<key>``: a work root for each distinct training; the key is a digest of all that decides it, so arms that
  share the settings of a stage share its output;
* ``arms/<name>-<budget>-<seed>``: a work root for each arm and seed, with its evaluation in ``reports``, and with
  ``probes`` of its model;
* ``data-without/<key>``: ``data`` without the pairs of a block, for the arms that leave it out.

Inputs are hard links. Steps run as ``univigu run``, so they resume from checkpoints, verify what they read, and skip
what is finished. An arm that fails is recorded, and the others go on. Probes measure seconds, so they run at the end,
one arm at a time.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from components.bench.study import blocks, probes
from components.bench.study.arms import DATA, STEPS, Arm, Study, arm_profile, data_profile, write_profile
from components.pipeline.digests import json_digest, source_digest
from components.pipeline.fingerprint import code_digest, stage_code
from components.pipeline.freshness import finished
from components.pipeline.manifests import MANIFEST, inside, read_manifest
from components.pipeline.processes import read_lines, sentence, shell_code, start_child, usable_cores
from components.pipeline.profiles import load_profile
from components.pipeline.stages import find_stage
from components.pipeline.state import STATE, lock
from univigu.errors import BusyError, PreemptedError, UniViGUError, first_line
from univigu.files import link_or_copy, read_json_object, write_json
from univigu.threads import side_threads

PROFILE, FAILED = "profile.yaml", "failed.json"  # in the work root of an arm
SOURCES = ("raw_prompts", "base", "generator", "heldout")
PAIRS = "validate-pairs"  # the first step that people's edits change
_KEY_LENGTH = 16
_THREADS = "OMP_NUM_THREADS"
_BUSY_TRIES, _BUSY_S = 20, 3.0


class Outcome(NamedTuple):
    """What became of one arm, and of its probes, with one seed."""

    arm: str
    seed: int
    failure: str = ""  # a sentence; "" if they have finished


def study_folder(root: Path, study: Study) -> Path:
    """Where everything of a study is kept."""
    return root.resolve() / STATE / "study" / Path(study.profile).stem


def arm_root(root: Path, study: Study, arm: Arm, budget: str, seed: int) -> Path:
    """The work root of an arm with one seed."""
    return study_folder(root, study) / "arms" / f"{arm.name}-{budget}-{seed}"


def read_failure(folder: Path) -> str:
    """Why the last run of an arm failed; "" if it didn't."""
    try:
        return str(read_json_object(folder / FAILED)["failure"])
    except (OSError, ValueError, KeyError):
        return ""


def run_study(study: Study, budget: str, arms: Sequence[Arm], root: Path, jobs: int = 1) -> list[Outcome]:
    """Run the arms with every seed of the budget, `jobs` at a time; finished ones are verified and kept.

    All arms run with the first seed before any runs with the second. Raises an error of `univigu.errors` if the shared
    data can't be made, if another study runs under `root`, or, after all processes have ended, when this process
    receives SIGTERM. A failure of an arm is in its outcome.
    """
    root = root.resolve()
    refusal = f"Another study is running under {root}; wait for it, or use another --root."
    with lock(root, "study", refusal), _Processes(jobs) as processes:
        runner = _Runner(study, budget, root, processes)
        runner.make_data()
        work = [(arm, seed) for seed in study.plan(budget).seeds for arm in arms]
        with side_threads(jobs, "arms") as pool:
            try:
                waiting = [pool.submit(runner.run_arm, arm, seed) for arm, seed in work]
                outcomes = [one.result() for one in waiting]
                ran = zip(work, outcomes, strict=True)
                return [outcome if outcome.failure else runner.run_probes(*pair) for pair, outcome in ran]
            except BaseException:
                processes.stop()
                pool.shutdown(cancel_futures=True)
                raise


class _Processes:
    """The steps' processes. When this process ends, in whatever way, they end too, and can be resumed."""

    def __init__(self, jobs: int) -> None:
        cores = usable_cores()
        self.environment = {} if jobs == 1 or _THREADS in os.environ else {_THREADS: str(max(1, cores // jobs))}
        self._running: set[subprocess.Popen[str]] = set()
        self._guard, self.stopped = Lock(), False

    def __enter__(self) -> "_Processes":
        self._before = signal.signal(signal.SIGTERM, _preempted)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        signal.signal(signal.SIGTERM, self._before)

    def stop(self) -> None:
        """Send SIGTERM to all steps; they save their state. No further step starts."""
        with self._guard:
            self.stopped = True
            for process in self._running:
                process.terminate()

    def run(
        self, arguments: Sequence[str], show: Callable[[str], object], environment: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        """Run a command to its end; returns its exit code, and its last message to the user."""
        with self._guard:
            if self.stopped:
                raise PreemptedError("The study is being stopped; run it again to resume.")
            process = start_child(arguments, environment or self.environment)
            self._running.add(process)
        try:
            said = read_lines(process, show)
            return shell_code(process.wait()), said
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            with self._guard:
                self._running.discard(process)


class _Runner:
    """Runs the arms of one study with one budget."""

    def __init__(self, study: Study, budget: str, root: Path, processes: _Processes) -> None:
        self.study, self.budget, self.root, self.processes = study, budget, root, processes
        self.folder = study_folder(root, study)
        self.data = self.folder / "data"
        self._guard = Lock()  # of what the pipeline's own functions keep in memory
        self._trained: dict[str, Lock] = {}

    # --- the shared data ---

    def make_data(self) -> None:
        """Run the steps from prompts to latents, unless they are finished."""
        profile = write_profile(self.data / PROFILE, data_profile(self.study))
        values = load_profile(str(profile))
        for key in SOURCES:
            source = inside(self.root, values[key])
            if source.exists():  # the step that needs it says so otherwise
                _refresh(source, inside(self.data, values[key]))
        self.base = values["base"]
        for step in DATA:
            self.run_step(step, self.data, "data")

    def data_of(self, arm: Arm) -> Path:
        """The work root with the data that an arm is trained on: the shared one, or the same without its block."""
        if not arm.left_out:
            return self.data
        folder = self.folder / "data-without" / json_digest(arm.left_out)[:_KEY_LENGTH]
        with self._holding(folder.name):
            values = load_profile(str(write_profile(folder / PROFILE, data_profile(self.study))))
            for key in SOURCES:
                if (source := inside(self.data, values[key])).exists():
                    _refresh(source, inside(folder, values[key]), link_or_copy)
            for step in DATA[: DATA.index(PAIRS)]:
                _link(self.data, folder, step)
            blocks.exclude(folder, arm.left_out)
            for step in DATA[DATA.index(PAIRS) :]:
                self.run_step(step, folder, f"data of {arm.name}")
        return folder

    # --- arms ---

    def run_arm(self, arm: Arm, seed: int) -> Outcome:
        """Train and evaluate one arm; a failure is recorded in its folder."""
        folder, label = arm_root(self.root, self.study, arm, self.budget, seed), f"{arm.name} {seed}"
        try:
            declared = arm_profile(self.study, arm, self.budget, seed, self.base)
            profile = write_profile(folder / PROFILE, declared)
            (folder / FAILED).unlink(missing_ok=True)
            values = load_profile(str(profile))
            if arm.weights == "random":
                self._make_random_base(values["base"], seed)
            data = self.data_of(arm)
            self._link_sources(folder, values, data)
            made: list[Path] = []
            for step in STEPS[:-1]:
                made.append(self._train(step, declared, values, made, data, label))
                _link(made[-1], folder, step)
            self.run_step(STEPS[-1], folder, label)
        except Exception as error:
            if self.processes.stopped:
                raise
            failure = str(error) if isinstance(error, UniViGUError) else f"{type(error).__name__}: {first_line(error)}"
            write_json(folder / FAILED, {"failure": failure})
            print(f"{label} | failed: {failure}", file=sys.stderr, flush=True)
            return Outcome(arm.name, seed, failure)
        return Outcome(arm.name, seed)

    def _train(
        self,
        step: str,
        declared: Mapping[str, Any],
        values: Mapping[str, Any],
        before: Sequence[Path],
        data: Path,
        label: str,
    ) -> Path:
        """Make a training step's output, or find it; returns its work root. before: those of the steps before it."""
        stage = find_stage(step)
        with self._guard:
            code = code_digest(stage_code(stage, values))
        came_from = before[-1].name if before else source_digest(inside(self.data, values["base"]))
        latents = read_manifest(data / find_stage(DATA[-1]).home, DATA[-1])["digest"]
        own = {name: values[name] for name in stage.parameters}
        folder = self.folder / "trained" / json_digest([step, came_from, latents, own, code])[:_KEY_LENGTH]
        with self._holding(folder.name):
            write_profile(folder / PROFILE, declared)
            self._link_sources(folder, values, data)
            if before:
                _link(before[-1], folder, STEPS[len(before) - 1])
            self.run_step(step, folder, label)
        return folder

    def _link_sources(self, folder: Path, values: Mapping[str, Any], data: Path) -> None:
        """Link an arm's data, the base and the held-out set into a work root."""
        for step in DATA:
            _link(data, folder, step)
        for key in ("base", "heldout"):
            _refresh(inside(self.data, values[key]), inside(folder, values[key]), link_or_copy)

    def _make_random_base(self, name: str, seed: int) -> None:
        """Make the base whose transformer has new weights, drawn with `seed`, unless it is there."""
        with self._holding(name):
            target = inside(self.data, name)
            if not target.exists():
                with_random_weights(inside(self.data, self.base), target, seed)

    @contextmanager
    def _holding(self, name: str) -> Iterator[None]:
        """Make what several arms share only once at a time."""
        with self._guard:
            guard = self._trained.setdefault(name, Lock())
        with guard:
            yield

    # --- probes ---

    def run_probes(self, arm: Arm, seed: int) -> Outcome:
        """Run the probes of a finished arm; returns what became of it with them."""
        folder, label = arm_root(self.root, self.study, arm, self.budget, seed), f"{arm.name} {seed}"
        wanted = self.study.probes_of(arm, self.budget)
        if not wanted:
            return Outcome(arm.name, seed)
        probes.declare(folder, wanted, arm.name == self.study.reference)
        log = folder / "log-probes.txt"
        command = [sys.executable, "-m", probes.__name__, str(folder)]
        # on one thread, so that seconds don't depend on --jobs
        code, said = self._run(command, log, f"{label} | probes", {_THREADS: "1"})
        failure = f"its probes failed: {said or f'exit code {code}, with the output in {log}'}" if code else ""
        return Outcome(arm.name, seed, failure)

    # --- steps ---

    def run_step(self, step: str, folder: Path, label: str) -> None:
        """Run a step of the pipeline in a work root, unless it is finished there; its lines go to ``log-<step>.txt``.

        Raises `UniViGUError` with the step's own message if it fails.
        """
        profile = str(folder / PROFILE)
        with self._guard:
            if finished(step, load_profile(profile), folder):
                print(f"{label} | {step}: finished", file=sys.stderr, flush=True)
                return
        command = [
            sys.executable,
            "-m",
            "components.cli.main",
            "run",
            step,
            "--profile",
            profile,
            "--root",
            str(folder),
        ]
        log = folder / f"log-{step}.txt"
        for _ in range(_BUSY_TRIES):
            code, said = self._run(command, log, label)
            if code != BusyError.exit_code:
                break
            time.sleep(_BUSY_S)  # a process of a killed study still saves its state
        if code:
            raise UniViGUError(said or f"{step} ended with exit code {code}; its output is in {log}.")

    def _run(
        self, command: Sequence[str], log: Path, label: str, environment: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        with log.open("w", encoding="utf-8") as stream:

            def show(line: str) -> None:
                print(line, file=stream, flush=True)
                if not sentence(line):
                    print(f"{label} | {line}", file=sys.stderr, flush=True)

            return self.processes.run(command, show, environment)


def with_random_weights(base: Path, target: Path, seed: int) -> None:
    """Copy a base in diffusers' Wan layout to `target`, with a transformer of the same size and new weights.

    The weights are those of a new `WanTransformer3DModel`, drawn with `seed`: what the base's own pretraining began
    with. The text encoder, the autoencoder and the tokenizer stay.
    """
    import torch
    from diffusers import WanTransformer3DModel

    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(base, partial, copy_function=link_or_copy)
    config = WanTransformer3DModel.load_config(partial / "transformer")
    shutil.rmtree(partial / "transformer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WanTransformer3DModel.from_config(config)
    model.save_pretrained(partial / "transformer", safe_serialization=True)
    partial.rename(target)


def _preempted(*_: object) -> None:
    raise PreemptedError("The study received SIGTERM; run it again to resume at the arm and step where it was.")


def _link(source: Path, folder: Path, step: str) -> None:
    """Link a finished output of one work root into another, in place of an older one."""
    home = find_stage(step).home
    manifest = (source / home / MANIFEST).read_bytes()
    there = folder / home / MANIFEST
    if not there.is_file() or there.read_bytes() != manifest:
        _copy(source / home, folder / home, link_or_copy)


def _refresh(source: Path, target: Path, copy: Callable[..., Any] = shutil.copy2) -> None:
    """Copy a file or a folder, unless its content is there."""
    if not target.exists() or source_digest(target) != source_digest(source):
        _copy(source, target, copy)


def _copy(source: Path, target: Path, copy: Callable[..., Any]) -> None:
    """Replace a file or a folder by a copy, which is complete as soon as it has its name."""
    partial = target.with_name(f".{target.name}.partial")
    for path in (partial, target):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, partial, copy_function=copy) if source.is_dir() else copy(source, partial)
    partial.rename(target)
