"""What a run says of itself while it goes on."""

from types import SimpleNamespace

import pytest

from univigu.training import records
from univigu.training.engine import TrainingConfig

FIGURES = {"samples_per_second": 0.5, "tokens_per_second": 16508.0, "tflops_per_process": 431.0, "loading_share": 0.0}


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set: `clock.now`, in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(records, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def new_line(first=0, steps=10):
    return records.ProgressLine(first, TrainingConfig(steps=steps, batch_size=1, learning_rate=1.0))


def test_a_line_says_where_training_stands_how_fast_it_is_and_what_is_left_by_the_clock(clock, capsys):
    line = new_line(first=2)  # goes on after step 2
    clock.now += 60
    line.show(4, {"loss": 0.51234, "grad_norm": 1.0}, FIGURES)
    assert capsys.readouterr().err == (
        "step 4/10 loss 0.5123 grad_norm 1 0.5 samples/s 1.651e+04 tokens/s 431 TFLOP/s 0:03:00 left\n"
    )


def test_the_share_of_the_peak_is_said_where_it_is_known_and_waiting_where_it_is_worth_a_word(clock, capsys):
    line = new_line()
    clock.now += 60
    line.show(1, {}, FIGURES | {"mfu": 0.4356, "loading_share": 0.0049})
    said = capsys.readouterr().err
    assert "431 TFLOP/s MFU 43.6% 0:09:00 left" in said
    clock.now += 60
    line.show(2, {}, FIGURES | {"loading_share": 0.012})
    said = capsys.readouterr().err
    assert "waiting for data 1.2%" in said
    assert "MFU" not in said


def test_a_line_comes_every_few_seconds_and_at_the_last_step(clock, capsys):
    line = new_line()
    shown = []
    for step in range(1, 11):
        clock.now += 2
        line.show(step, {}, FIGURES)
        shown += [step] if capsys.readouterr().err else []
    assert shown == [1, 4, 7, 10]
