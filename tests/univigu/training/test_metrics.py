"""The records and the progress line of a run."""

from types import SimpleNamespace

import pytest

from univigu import files
from univigu.training import metrics
from univigu.training.engine import TrainingConfig
from univigu.training.metrics import Curves, Evaluations

FIGURES = {"samples_per_second": 0.5, "tokens_per_second": 16508.0, "tflops_per_process": 431.0, "loading_share": 0.0}


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set: `clock.now`, in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def new_line(first=0, steps=10):
    return metrics.ProgressLine(first, TrainingConfig(steps=steps, batch_size=1, learning_rate=1.0))


def test_the_progress_line_has_step_metrics_speed_and_remaining_time(clock, capsys):
    line = new_line(first=2)  # resumes after step 2
    clock.now += 60
    line.show(4, {"loss": 0.51234, "grad_norm": 1.0}, FIGURES)
    assert capsys.readouterr().err == (
        "step 4/10 loss 0.5123 grad_norm 1 0.5 samples/s 1.651e+04 tokens/s 431 TFLOP/s 0:03:00 left\n"
    )


def test_the_progress_line_has_the_mfu_if_known_and_the_loading_time_if_notable(clock, capsys):
    line = new_line()
    clock.now += 60
    line.show(1, {}, FIGURES | {"mfu": 0.4356, "loading_share": 0.0049})
    line_text = capsys.readouterr().err
    assert "431 TFLOP/s MFU 43.6% 0:09:00 left" in line_text
    clock.now += 60
    line.show(2, {}, FIGURES | {"loading_share": 0.012})
    line_text = capsys.readouterr().err
    assert "waiting for data 1.2%" in line_text
    assert "MFU" not in line_text


def test_a_line_comes_every_few_seconds_and_at_the_last_step(clock, capsys):
    line = new_line()
    shown = []
    for step in range(1, 11):
        clock.now += 2
        line.show(step, {}, FIGURES)
        shown += [step] if capsys.readouterr().err else []
    assert shown == [1, 4, 7, 10]


ROW = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0}


def steps_in(path):
    return [int(line.split(",")[0]) for line in path.read_text().splitlines()[1:]]


def test_curves_continue_after_the_resumed_step(tmp_path):
    path = tmp_path / "curves.csv"
    before = Curves(path, 0)
    for step in range(1, 7):
        before.add(step, ROW)
    after = Curves(path, 4)
    for step in range(5, 9):
        after.add(step, ROW)
    assert steps_in(path) == list(range(1, 9))


def test_curves_survive_a_kill_while_a_run_resumes(tmp_path, monkeypatch):
    path = tmp_path / "curves.csv"
    before = Curves(path, 0)
    for step in range(1, 7):
        before.add(step, ROW)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            Curves(path, 4).add(5, ROW)
    assert steps_in(path) == list(range(1, 7))


def test_a_row_cut_off_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "curves.csv"
    before = Curves(path, 0)
    for step in range(1, 4):
        before.add(step, ROW)
    with path.open("a") as stream:
        stream.write("4,1")
    Curves(path, 4).add(5, ROW)
    assert steps_in(path) == [1, 2, 3, 5]


def test_evaluations_are_written_again_from_the_checkpoint(tmp_path):
    first = Evaluations(tmp_path, 0)
    for step in (2, 4, 6):
        first.add(step, {"tau": [0.25, 0.75], "text_ce": [1.0, 2.0], "video_gain": 0.5})
    for name in ("heldout.json", "heldout.csv"):
        (tmp_path / name).write_text("half")
    Evaluations(tmp_path, 4).write()
    assert steps_in(tmp_path / "heldout.csv") == [2, 2, 4, 4]
    assert '"step": 4' in (tmp_path / "heldout.json").read_text()


def test_a_resumed_run_writes_the_same_table_of_evaluations(tmp_path):
    scores = {"tau": [0.25, 0.75], "text_ce": [1.0, 2.0], "entropy": [0.5, 0.5], "video_gain": 0.5}
    Evaluations(tmp_path, 0).add(2, scores)
    before = (tmp_path / "heldout.csv").read_bytes()
    Evaluations(tmp_path, 2).write()
    assert (tmp_path / "heldout.csv").read_bytes() == before
