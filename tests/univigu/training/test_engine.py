"""The settings of a training run: rates, parameter groups, and what is refused."""

import importlib.util
from pathlib import Path

import pytest

from univigu.errors import ConfigError
from univigu.training.engine import TrainingConfig, learning_rate, parameter_groups

spec = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("tiny_run.py"))
tiny_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_run)


def test_the_learning_rate_warms_up_and_decays():
    config = TrainingConfig(steps=110, batch_size=1, learning_rate=1.0, warmup_steps=10)
    rates = [learning_rate(step, config) for step in range(1, 111)]
    assert rates[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    assert rates[60] == pytest.approx(0.5)
    assert rates[-1] < 0.001
    constant = TrainingConfig(steps=110, batch_size=1, learning_rate=1.0, warmup_steps=10, schedule="constant")
    assert learning_rate(110, constant) == 1.0


def test_tables_norms_and_biases_do_not_decay_and_the_video_side_has_its_own_rate(tmp_path):
    objective = tiny_run.make_objective(tiny_run.open_data(tmp_path)[0])
    config = TrainingConfig(steps=1, batch_size=1, learning_rate=1.0, weight_decay=0.1, video_lr_factor=0.5)
    found = {
        id(p): (g["weight_decay"], g["lr_factor"]) for g in parameter_groups(objective, config) for p in g["params"]
    }
    named = {name: found[id(parameter)] for name, parameter in objective.transformer.named_parameters()}
    assert named["blocks.0.ffn.net.2.weight"] == (0.1, 0.5)
    assert named["blocks.0.ffn_text.net.2.weight"] == (0.1, 1.0)
    assert named["blocks.0.ffn_text.net.2.bias"] == (0.0, 1.0)
    assert named["text_space.weight"] == (0.0, 1.0)
    assert named["blocks.0.scale_shift_table"] == (0.0, 0.5)
    assert named["blocks.0.attn1.norm_q.weight"] == (0.0, 0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedule": "steps"},
        {"precision": "fp8"},
        {"zero_stage": 4},
        {"precision": "bf16"},
        {"steps": 0},
        {"learning_rate": 0.0},
        {"offload": ("optimizer",)},
        {"offload": ("parameters",), "zero_stage": 2},
        {"offload": ("gradients",), "zero_stage": 3},
        {"ema_decay": 1.0},
        {"gradient_checkpointing": -1},
    ],
)
def test_invalid_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        TrainingConfig(**{"steps": 1, "batch_size": 1, "learning_rate": 1.0, **wrong})
