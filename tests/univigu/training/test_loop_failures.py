"""Steps whose loss is not finite, and evaluations that fail: neither costs the work that was done."""

import csv
import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from univigu.errors import CorruptDataError, PreemptedError

spec = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("tiny_run.py"))
tiny_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_run)


def spoil(*steps):
    """A hook that makes the latents of these steps NaN."""

    def change(module, arguments):
        batch, step = arguments
        return ({**batch, "latents": batch["latents"] * float("nan")}, step) if step in steps else None

    return change


def read_rows(folder):
    with (folder / "curves.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    """The folder and the weights of a run whose steps 3 and 5 were skipped."""
    folder = tmp_path_factory.mktemp("skipping")
    return folder, tiny_run.run(folder, before_forward=spoil(3, 5))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_whose_loss_is_not_finite_is_skipped_alike_in_every_zero_stage(tmp_path, skipping, stage):
    weights = tiny_run.run(tmp_path, before_forward=spoil(3, 5), zero_stage=stage)
    for name, expected in skipping[1].items():
        assert weights[name].isfinite().all(), name
        torch.testing.assert_close(weights[name], expected, atol=1e-4, rtol=1e-3)


def test_a_skipped_step_changes_no_weight_and_has_a_row_without_a_loss(tmp_path, capsys):
    rows, weights = [], []

    def keep(step, _):
        weights.append([parameter.clone() for parameter in module[0].parameters()])

    module = []

    def hook(objective, arguments):
        module[:] = [objective]
        return spoil(3)(objective, arguments)

    tiny_run.run(tmp_path, keep, hook, steps=4, heldout_every=99)
    rows = read_rows(tmp_path)
    assert all(torch.equal(before, after) for before, after in zip(weights[1], weights[2], strict=True))
    assert not all(torch.equal(before, after) for before, after in zip(weights[2], weights[3], strict=True))
    assert [bool(row["loss"]) for row in rows] == [True, True, False, True]
    said = capsys.readouterr().err
    assert "Step 3 is skipped: its loss is nan, the norm of its gradient inf." in said


def test_a_run_that_was_stopped_after_a_skipped_step_ends_with_the_same_bits(tmp_path, skipping):
    def stop(step, _):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PreemptedError):
        tiny_run.run(tmp_path, stop, spoil(3, 5))
    weights = tiny_run.run(tmp_path, before_forward=spoil(3, 5))
    assert all(torch.equal(weights[name], expected) for name, expected in skipping[1].items())
    assert (tmp_path / "curves.csv").read_bytes() == (skipping[0] / "curves.csv").read_bytes()


def test_five_such_steps_in_a_row_end_the_run_and_its_checkpoint_is_kept(tmp_path):
    with pytest.raises(CorruptDataError, match=r"The loss is nan at step 8, and the 4 steps before it were skipped"):
        tiny_run.run(tmp_path, before_forward=spoil(*range(4, 9)))
    assert json.loads((tmp_path / "checkpoints/latest").read_text())["step"] >= 3
    tiny_run.run(tmp_path)  # with better data


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_an_evaluation_that_fails_costs_no_step_and_is_made_up_for(tmp_path, stage):
    settings = {"checkpoint_every": 4, "zero_stage": stage}
    whole = tiny_run.run(tmp_path / "whole", **settings)

    def fail(step, metrics):
        if "heldout_video_gain" in metrics:
            raise RuntimeError("no memory for this")

    with pytest.raises(RuntimeError, match="no memory"):
        tiny_run.run(tmp_path / "failed", fail, **settings)
    assert json.loads((tmp_path / "failed/checkpoints/latest").read_text())["step"] == 4
    weights = tiny_run.run(tmp_path / "failed", **settings)
    assert all(torch.equal(weights[name], expected) for name, expected in whole.items())
    for name in ("curves.csv", "heldout.csv", "evaluations.json"):
        assert (tmp_path / "failed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
