"""Training runs of a work root: held-out losses by tau, stop and resume."""

import subprocess
import sys

import pytest

from components.cli.studio import runs, training
from components.cli.studio.work import Studio, render
from components.pipeline.state import STATE
from univigu.errors import BadInputError, BusyError

HOLD = """
import signal, sys, time
from pathlib import Path
from components.pipeline.state import lock
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
with lock(Path(sys.argv[1]), "train-stage-1", ""):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def holder(root):
    """A process that holds the lock of train-stage-1, and ends with 7 at SIGTERM."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_process_that_trains_is_stopped_and_no_other(root, holder):
    with pytest.raises(BadInputError, match="No process of this machine runs 'train-stage-2'"):
        training.stop(root, "train-stage-2")
    assert holder.poll() is None
    assert "saves its progress" in training.stop(root, "train-stage-1")
    assert holder.wait(timeout=30) == 7
    with pytest.raises(BadInputError, match="No process of this machine runs 'train-stage-1'"):
        training.stop(root, "train-stage-1")


def test_what_runs_or_has_not_begun_is_not_resumed(root, holder, tmp_path):
    studio = Studio(root, "uni-vigu", tmp_path, "smoke")
    for step, said in (("train-stage-1", "has not begun here yet"), ("evaluate-model", "Choose a training step")):
        with pytest.raises(BadInputError, match=said):
            training.resume(studio, step)
    note = root / STATE / "monitor/training/train-stage-1.json"
    note.parent.mkdir(parents=True)
    note.write_text("{}")
    with pytest.raises(BusyError, match="is running already"):
        training.resume(studio, "train-stage-1")


def test_losses_by_tau_are_those_of_the_newest_evaluation_also_while_it_trains(root):
    assert training.read_losses(root) == []
    text = "step,tau,text_ce,video_mse\n4,0.5,9,9\n8,0.25,2,0.5\n8,0.75,1,0.25\n"
    (root / "data/stage1").mkdir(parents=True)
    (root / "data/stage1/heldout.csv").write_text(text)
    (found,) = training.read_losses(root)
    assert (found.name, found.step, found.rows) == ("train-stage-1", 8, [(0.25, [0.5, 2.0]), (0.75, [0.25, 1.0])])
    scratch = root / STATE / "scratch/train-stage-1"
    scratch.mkdir(parents=True)
    (scratch / "heldout.csv").write_text(text.replace("8,", "12,"))
    assert training.read_losses(root)[0].step == 12
    assert "after step 12" in render("results.html.j2", **runs.read_results(root))
    (scratch / "heldout.csv").write_text("step,tau\n12,0.2")
    assert training.read_losses(root) == []
