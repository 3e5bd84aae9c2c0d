"""The tasks of training samples, and their random choices."""

import pytest
import torch

from univigu import flow
from univigu.errors import ConfigError
from univigu.tasks import TASKS, ObjectiveConfig, draw_plan, draw_step


def test_tasks_are_drawn_by_their_shares_with_their_corners():
    plan = draw_plan([(0, 0, i) for i in range(4000)], ObjectiveConfig())
    for i, task in enumerate(TASKS.values()):
        rows = plan.task == i
        assert rows.float().mean() == pytest.approx(task.share, abs=0.03)
        for times, fixed in ((plan.video_tau[rows], task.video_tau), (plan.text_tau[rows], task.text_tau)):
            if fixed is None:
                assert times.mean() == pytest.approx(0.5, abs=0.05)
                assert times.unique().numel() > 500
            else:
                assert (times == fixed).float().mean() == pytest.approx(0.9, abs=0.03)
                assert ((times == fixed) | (times == 0)).all()
    understand, joint, generate = (plan.task == i for i in range(3))
    assert plan.drop_condition[understand].all()
    assert plan.drop_condition[joint].float().mean() == pytest.approx(0.5, abs=0.05)
    with_text = generate & (plan.text_tau == 1)
    assert plan.drop_condition[with_text].float().mean() == pytest.approx(0.1, abs=0.03)
    assert plan.drop_condition[generate & ~with_text].all()  # the unconditional branch of guidance
    assert plan.text_is_prompt[generate].float().mean() == pytest.approx(0.5, abs=0.06)
    assert not plan.text_is_prompt[understand | joint].any()


def test_a_shift_moves_times_towards_noise_and_keeps_the_corners():
    keys = [(0, 0, i) for i in range(4000)]
    plain, shifted = (draw_plan(keys, ObjectiveConfig(video_shift=s, text_shift=t)) for s, t in ((1, 1), (3, 8)))
    joint = plain.task == list(TASKS).index("joint")
    torch.testing.assert_close(shifted.video_tau[joint], flow.shift_tau(plain.video_tau[joint], 3))
    torch.testing.assert_close(shifted.text_tau[joint], flow.shift_tau(plain.text_tau[joint], 8))
    assert (shifted.text_tau[joint] <= plain.text_tau[joint]).all()
    for name, corner in (("understand", "video_tau"), ("generate", "text_tau")):
        rows = plain.task == list(TASKS).index(name)
        assert torch.equal(getattr(shifted, corner)[rows], getattr(plain, corner)[rows])


@pytest.mark.parametrize("step_task", [None, "joint"])
def test_coupled_times_are_the_shifts_of_one_draw_in_their_share_of_joint_samples(step_task):
    """Shifts compose: a text's shift of 8 is the video's of 4, shifted once more by 2."""
    keys = [(0, 0, i) for i in range(4000)]
    shifts = {"video_shift": 4.0, "text_shift": 8.0}
    free, half, whole = (
        draw_plan(keys, ObjectiveConfig(coupled_times=share, **shifts), step_task) for share in (0.0, 0.5, 1.0)
    )
    joint = free.task == list(TASKS).index("joint")
    torch.testing.assert_close(whole.text_tau[joint], flow.shift_tau(whole.video_tau[joint], 2))
    equal = draw_plan(keys, ObjectiveConfig(coupled_times=1.0, video_shift=3.0, text_shift=3.0), step_task)
    assert torch.equal(equal.video_tau[joint], equal.text_tau[joint])
    changed = (half.text_tau != free.text_tau)[joint]
    assert changed.float().mean() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(half.text_tau[joint][changed], whole.text_tau[joint][changed])
    # alone, the text's times are distributed as before: shifted back, they are uniform
    quantiles = torch.arange(1, 10) / 10
    uniform = flow.shift_tau(whole.text_tau[joint], 1 / 8).quantile(quantiles)
    torch.testing.assert_close(uniform, quantiles, atol=0.04, rtol=0)


def test_coupled_times_change_nothing_else():
    keys = [(0, 0, i) for i in range(1000)]
    free, coupled = (draw_plan(keys, ObjectiveConfig(coupled_times=share, text_shift=8.0)) for share in (0.0, 1.0))
    joint = free.task == list(TASKS).index("joint")
    for name in vars(free):
        rows = ~joint if name == "text_tau" else slice(None)
        assert torch.equal(getattr(free, name)[rows], getattr(coupled, name)[rows])
    alone = draw_plan(keys[500:501], ObjectiveConfig(coupled_times=1.0, text_shift=8.0))
    assert torch.equal(alone.text_tau, coupled.text_tau[500:501])  # it doesn't depend on the batch


@pytest.mark.parametrize(
    "wrong",
    [
        {"shares": {"understand": 0.0}},
        {"shares": {"dream": 1.0}},
        {"text_shift": 0.0},
        {"prompt_dropout": {"joint": 0.5}},
        {"prompt_dropout": 0.5},
        {"form": "literal", "shares": {"joint": 1.0}, "text_shift": 8.0},
        {"prompt_dropout": {"joint": 2, "generate": 0}},
        {"form": "exact"},
        {"coupled_times": 1.5},
        {"coupled_times": 0.5, "shares": {"understand": 1.0}},
        {"form": "literal", "shares": {"joint": 1.0}, "coupled_times": 0.5},
        {"text_draws": 0},
        {"text_draws": 2, "shares": {"joint": 0.3, "generate": 0.7}},
        {"form": "literal"},
    ],
)
def test_invalid_choices_are_refused(wrong):
    with pytest.raises(ConfigError):
        ObjectiveConfig(**wrong)


def draws(count, **settings):
    config = ObjectiveConfig(task_draw="step", shares={"understand": 0.5, "joint": 0.3, "generate": 0.2}, **settings)
    return [draw_step(step, config) for step in range(1, count + 1)]


def test_a_block_of_steps_has_the_tasks_shares_and_their_guesses():
    found = draws(400, self_conditioning=0.5)
    for start in range(0, 400, 20):
        block = found[start : start + 20]
        for task, share in (("understand", 10), ("joint", 6), ("generate", 4)):
            drawn = [draw for draw in block if draw.task == task]
            assert abs(len(drawn) - share) <= 1
            assert abs(sum(draw.self_conditioned for draw in drawn) - share / 2) <= 1
    assert sum(draw.task == "understand" for draw in found) == pytest.approx(200, abs=2)
    assert found[:20] != found[20:40]  # in another order


def test_the_draw_of_a_step_depends_on_the_seed_and_the_step_alone():
    assert draws(40) == draws(60)[:40]
    assert draws(40) != draws(40, seed=1)
    assert {draw.self_conditioned for draw in draws(40, self_conditioning=0.0)} == {False}
    assert {draw.self_conditioned for draw in draws(40, self_conditioning=1.0)} == {True}


def test_a_task_without_a_share_is_never_drawn():
    config = ObjectiveConfig(task_draw="step", shares={"understand": 1.0, "generate": 1.0, "joint": 0.0})
    assert {draw_step(step, config).task for step in range(200)} == {"understand", "generate"}


def test_all_samples_of_a_step_have_its_task_and_their_own_times():
    keys = [(0, 0, i) for i in range(64)]
    plan = draw_plan(keys, ObjectiveConfig(), "generate")
    assert set(plan.task.tolist()) == {list(TASKS).index("generate")}
    assert plan.video_tau.unique().numel() == 64
    assert 10 < plan.text_is_prompt.sum() < 54
