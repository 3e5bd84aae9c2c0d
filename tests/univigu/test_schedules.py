"""The steps of a video: our own, and those of diffusers' flow-matching schedulers."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from univigu import UniViGUPipeline
from univigu.errors import BadInputError
from univigu.schedules import EulerSteps, JointPath, SchedulerSteps

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
GOOD = [
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    FlowMatchHeunDiscreteScheduler(shift=3.0),
    UniPCMultistepScheduler(**FLOW),
    DPMSolverMultistepScheduler(**FLOW),
]


@pytest.fixture
def pipeline(speaking_model):
    pipeline = UniViGUPipeline.from_pretrained(speaking_model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("scheduler", GOOD, ids=lambda one: type(one).__name__)
def test_every_flow_scheduler_solves_the_same_equation(scheduler):
    """z' = -z from z(0) = 1 ends at exp(-1); a wrong sign or time would end elsewhere."""
    steps = SchedulerSteps(scheduler, 200)
    z = torch.ones(1, 2, 1, 2, 2)
    for i in range(len(steps)):
        z = steps.step(i, z, -z)
    torch.testing.assert_close(z, torch.full_like(z, np.exp(-1)), rtol=0.01, atol=0)
    assert (float(steps.taus[0]), float(steps.taus[-1])) == (pytest.approx(0, abs=2e-3), 1)
    assert (steps.taus.diff() >= 0).all()


def test_our_steps_solve_it_too():
    steps = EulerSteps(200, shift=3.0)
    z = torch.ones(1, 2)
    for i in range(len(steps)):
        z = steps.step(i, z, -z)
    torch.testing.assert_close(z, torch.full_like(z, np.exp(-1)), rtol=0.02, atol=0)


@pytest.mark.parametrize("task", ["call", "in turn", "in step"])
def test_a_scheduler_replaces_the_steps_of_a_video_in_every_task(pipeline, task):
    def sample():
        if task == "call":
            return pipeline("a red five", seed=1).frames
        return pipeline.joint("a red five", seed=1, in_step=task == "in step").frames

    own = sample()
    pipeline.scheduler = UniPCMultistepScheduler(**FLOW)
    first = sample()
    assert np.abs(first - own).max() > 1e-4
    np.testing.assert_array_equal(sample(), first)  # the scheduler keeps nothing from one call to the next
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    assert np.isfinite(sample()).all()
    pipeline.scheduler = None
    np.testing.assert_array_equal(sample(), own)


def test_both_times_move_in_an_interval_between_a_point_and_all_of_the_videos_times():
    taus = torch.linspace(0, 1, 11)

    def span(text_at, in_step):
        return JointPath(text_at, in_step, 1.0, 1.0).span(taus)

    for text_at, step in ((0.0, 0), (0.25, 3), (1.0, 10)):
        assert (len(span(text_at, 0.0)), span(text_at, 0.0).start) == (0, step)
        assert span(text_at, 1.0) == range(10)
    assert [span(text_at, 0.5) for text_at in (0.0, 0.5, 1.0)] == [range(5), range(3, 8), range(5, 10)]


def test_a_scheduler_is_saved_with_the_pipeline_and_may_be_replaced_when_it_is_loaded(pipeline, tmp_path):
    pipeline.scheduler = UniPCMultistepScheduler(**FLOW)
    pipeline.save_pretrained(tmp_path / "with")
    loaded = UniViGUPipeline.from_pretrained(tmp_path / "with")
    assert (type(loaded.scheduler), loaded.scheduler.config.flow_shift) == (UniPCMultistepScheduler, 3.0)
    euler = FlowMatchEulerDiscreteScheduler.from_config(loaded.scheduler.config)
    assert UniViGUPipeline.from_pretrained(tmp_path / "with", scheduler=euler).scheduler is euler
    loaded.scheduler = None
    loaded.save_pretrained(tmp_path / "without")
    assert UniViGUPipeline.from_pretrained(tmp_path / "without").scheduler is None


def test_a_folder_from_before_schedulers_still_loads(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["scheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "README.md").unlink()
    loaded = UniViGUPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(loaded.generate("a red five"), pipeline.generate("a red five"))


@pytest.mark.parametrize(
    "wrong",
    [
        DDIMScheduler(),
        UniPCMultistepScheduler(),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=500),
    ],
    ids=lambda one: type(one).__name__,
)
def test_a_scheduler_of_another_family_is_refused_in_one_sentence(pipeline, wrong):
    with pytest.raises(BadInputError, match=f"{type(wrong).__name__} is not set to integrate a flow") as caught:
        pipeline.scheduler = wrong
    assert "\n" not in str(caught.value)
    assert pipeline.scheduler is None


def test_a_shift_beside_a_scheduler_is_refused(pipeline):
    pipeline.scheduler = UniPCMultistepScheduler(**FLOW)
    with pytest.raises(BadInputError, match="flow_shift"):
        pipeline("a red five", shift=2.0)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(BadInputError, match="can't make 3 steps"):
        pipeline("a red five")
