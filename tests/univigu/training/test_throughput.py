import pytest
import torch
from torch import nn

from univigu import ObjectiveConfig, TrainingObjective, UniViGUTransformer3DModel, wan
from univigu.training.engine import TrainingConfig, init_distributed
from univigu.training.throughput import Throughput, peak_tflops, sample_flops, trainable_share

LATENTS = (21, 60, 104)  # of 81 frames of 480x832
ALONE = {"joint": {"joint": 1.0}, "understand": {"understand": 1.0}}


@pytest.fixture(scope="module")
def wan_sized():
    with torch.device("meta"):
        return UniViGUTransformer3DModel(**wan.WAN_1_3B)


def flops(model, task, self_conditioning=0.0, share=1.0):
    config = ObjectiveConfig(shares=ALONE[task], self_conditioning=self_conditioning)
    return sample_flops(model, config, LATENTS, 512, share)


def test_a_sample_of_wan_1_3b_costs_the_known_number_of_flops(wan_sized):
    assert flops(wan_sized, "joint") == pytest.approx(0.86e15, rel=0.02)


def test_self_conditioning_costs_a_pass_under_joint_and_little_under_prefix(wan_sized):
    assert flops(wan_sized, "joint", 1.0) == pytest.approx(flops(wan_sized, "joint") * 4 / 3)
    assert flops(wan_sized, "understand", 1.0) < 1.02 * flops(wan_sized, "understand")


def test_frozen_weights_cost_a_third_less(wan_sized):
    assert flops(wan_sized, "joint", share=0.0) == pytest.approx(flops(wan_sized, "joint") * 2 / 3)
    layers = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 9, bias=False)])
    layers[1].requires_grad_(False)
    assert trainable_share(layers) == 0.25


def test_figures_are_rates_over_all_steps_with_an_mfu_where_the_peak_is_known(wan_sized):
    init_distributed()
    objective = TrainingObjective(wan_sized, ObjectiveConfig(shares=ALONE["joint"], self_conditioning=0.0))
    config = TrainingConfig(steps=2, batch_size=4, learning_rate=1.0, peak_tflops=1000.0)
    speed = Throughput(objective, config, torch.device("cpu"))
    speed.add(8.0, 0.5, LATENTS, 512)
    speed.add(8.0, 0.3, LATENTS, 512)
    figures = speed.figures()
    assert figures["samples_per_second"] == 0.5
    assert figures["tokens_per_second"] == 0.5 * (32760 + 256)
    assert figures["loading_share"] == pytest.approx(0.05)
    assert figures["tflops_per_process"] == pytest.approx(flops(wan_sized, "joint") * 0.5 / 1e12)
    assert figures["mfu"] == pytest.approx(figures["tflops_per_process"] / 1000)
    unknown = Throughput(objective, TrainingConfig(steps=2, batch_size=4, learning_rate=1.0), torch.device("cpu"))
    unknown.add(8.0, 0.5, LATENTS, 512)
    assert "mfu" not in unknown.figures()
    assert peak_tflops(torch.device("cpu")) is None


def test_every_draw_of_a_text_counts_as_tokens_and_flops(wan_sized):
    init_distributed()
    config = TrainingConfig(steps=1, batch_size=4, learning_rate=1.0)
    speeds = []
    for draws in (1, 8):
        shares = {"understand": 3.0, "joint": 1.0}
        objective = TrainingObjective(wan_sized, ObjectiveConfig(shares=shares, text_draws=draws))
        speeds.append(Throughput(objective, config, torch.device("cpu")))
        speeds[-1].add(4.0, 0.0, LATENTS, 512)
    once, often = (speed.figures() for speed in speeds)
    assert often["samples_per_second"] == once["samples_per_second"] == 1
    assert often["tokens_per_second"] == pytest.approx(32760 + (0.75 * 8 + 0.25) * 256)
    assert 1.02 < often["tflops_per_process"] / once["tflops_per_process"] < 1.06
