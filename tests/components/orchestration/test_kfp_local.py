"""`univigu pipeline run --local`: the whole pipeline with kfp's local runner, as a user runs it."""

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from components.bench.orchestrators import overheads
from components.pipeline.manifests import verify
from components.pipeline.stages import STAGES, find_stage

REPO = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "components.cli.main", "pipeline", "run", "--local", "profile=smoke"]


def environment():
    kept = {key: value for key, value in os.environ.items() if key not in ("MLFLOW_TRACKING_URI", "UNIVIGU_NOTIFY_URL")}
    return {**kept, "PYTHONPATH": f"{REPO}/model:{REPO}"}


def run(root, *arguments):
    (root / "tmp").mkdir(exist_ok=True)
    env = environment() | {"TMPDIR": str(root / "tmp")}
    return subprocess.run([*COMMAND, *arguments], cwd=root, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def make_root(tmp_path_factory):
    def make(name):
        root = tmp_path_factory.mktemp(name)
        for source in ("data/prompts", "data/heldout.json", "model/tiny-wan"):
            (root / source).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (REPO / source).is_dir() else shutil.copyfile)(REPO / source, root / source)
        return root

    return make


@pytest.mark.slow
def test_a_missing_prerequisite_ends_the_run_before_any_step_with_its_own_exit_code(make_root):
    root = make_root("no-base")
    shutil.rmtree(root / "model")
    done = run(root)
    assert done.returncode == 66, done.stderr
    assert (
        done.stderr
        == f"univigu: The work root {root} has no model/tiny-wan, which the profile names as 'base'; "
        + ("copy it there.\n")
    )
    said = [line.split(" | ")[0] for line in done.stdout.splitlines()]
    assert said == ["check-prerequisites", "notify", "notify"]
    assert '"state": "FAILED", "failed_step": "check-prerequisites", "exit_code": 66' in done.stdout
    assert not (root / "data/curated").exists()


@pytest.mark.slow
def test_a_run_stopped_by_sigterm_leaves_no_process(make_root):
    root = make_root("stopped")
    process = subprocess.Popen(
        COMMAND, cwd=root, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("curate-prompts | curate-prompts:"):
            break
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate()
    assert process.returncode == 81, told
    assert told == "univigu: The pipeline was stopped by SIGTERM; run the same command to resume it.\n"
    deadline = time.monotonic() + 30
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_the_whole_pipeline_ends_with_the_dataset_of_dvc_repro_and_the_second_time_only_registers(
    make_root, reproduced
):
    root = make_root("pipeline")
    started = time.time()
    done = run(root, "parts=2", "free_gib=1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert done.stdout.splitlines()[-1] == "SUCCEEDED"
    assert "synthesize-videos 1/2 | synthesize-videos 1/2: 1 shards made, 0 kept" in done.stdout
    assert "KFP Executor" not in done.stdout
    added = overheads(root, started)
    assert statistics.median(added.values()) < 0.35 * (time.time() - started) / len(STAGES), added
    for stage in STAGES:
        manifest = verify(root / stage.home, stage.name)
        if stage in STAGES[: STAGES.index(find_stage("train-stage-1"))]:
            assert manifest == verify(reproduced.root / stage.home, stage.name)
    assert list((root / "tmp").iterdir()) == []
    shutil.rmtree(root / find_stage("register-model").home)
    again = run(root, "parts=2")
    assert again.returncode == 0, again.stderr
    assert {line.split(" | ")[0] for line in again.stdout.splitlines()} == {
        "check-prerequisites",
        "register-model",
        "notify",
        "SUCCEEDED",
    }
    assert "register-model | register-model: 1 rows in" in again.stdout
    assert verify(root / find_stage("register-model").home, "register-model")
