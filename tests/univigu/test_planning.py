"""Cost estimates, compared with torch's own counts and with random draws."""

import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from univigu import ObjectiveConfig, UniViGUTransformer3DModel, planning, wan
from univigu.errors import ConfigError, MissingInputError
from univigu.hardware import GPUS, find_gpu, recognise_gpu
from univigu.training.memory import training_loss_without_data

TOKENS = planning.Tokens(video=4 * 16 * 16, text=64, context=32)
LATENTS = (1, 16, 4, 32, 32)
SHARES = {"understand": 0.5, "joint": 0.3, "generate": 0.2}


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return UniViGUTransformer3DModel(**(wan.WAN_1_3B | {"num_layers": 12}), vocab_size=64, tokenizer_length=64)


@pytest.fixture(scope="module")
def costs(model):
    return planning.task_costs(model, TOKENS, ObjectiveConfig(shares=SHARES))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["understand", "joint"])
def test_a_training_step_costs_what_torch_counts(model, costs, task):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        training_loss_without_data(model, task, LATENTS, TOKENS.text, TOKENS.context).backward()
    # most of the last of 12 blocks, whose video no text reads, is estimated and not computed
    assert costs[task].step(0, 0) == pytest.approx(counter.get_total_flops(), rel=1 / 12)


def test_self_conditioning_beside_a_cached_video_costs_the_text_alone(model, costs):
    with torch.device("meta"):
        cache = model.prefill_video(torch.empty(LATENTS), torch.empty(1), torch.empty(1, TOKENS.context, 4096))
        text, tau = torch.empty(1, TOKENS.text, 64), torch.empty(1)
    counted = planning.count_flops(model.denoise_text, text, tau, cache, text)
    assert costs["understand"].guess == pytest.approx(counted, rel=0.03)
    assert costs["joint"].guess == costs["joint"].forward
    assert costs["generate"].guess == 0
    assert costs["understand"].first_guess(1) == costs["understand"].forward


@pytest.mark.slow
def test_another_draw_of_a_text_costs_the_text_alone(model, costs):
    several = planning.task_costs(model, TOKENS, ObjectiveConfig(shares=SHARES, text_draws=3))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        training_loss_without_data(model, "understand", LATENTS, TOKENS.text, TOKENS.context, 3).backward()
    assert several["understand"].step(0, 0) == pytest.approx(counter.get_total_flops(), rel=1 / 12)
    assert several["understand"].guess == 3 * costs["understand"].guess
    more = several["understand"].forward - costs["understand"].forward
    assert more == 2 * costs["understand"].guess
    assert (several["joint"], several["generate"]) == (costs["joint"], costs["generate"])


def test_at_wans_size_eight_draws_cost_a_twentieth_more():
    with torch.device("meta"):
        wan_sized = UniViGUTransformer3DModel(**wan.WAN_1_3B)
    once, often = (
        planning.task_costs(wan_sized, planning.Tokens(32_760, 256, 512), ObjectiveConfig(text_draws=draws))
        for draws in (1, 8)
    )
    assert often["understand"].forward / once["understand"].forward == pytest.approx(1.055, abs=0.002)


def test_the_mean_step_weighs_tasks_by_their_shares(costs):
    assert planning.mean_step(costs, 0, 0) == pytest.approx(sum(3 * SHARES[t] * costs[t].forward for t in SHARES))
    assert planning.mean_step(costs, 0, 1) == pytest.approx(planning.mean_step(costs, 0, 0) * 4 / 3)


@pytest.mark.parametrize(("samples", "gpus"), [(1, 1), (1, 4), (3, 2)])
def test_a_step_takes_as_long_as_its_busiest_gpu(costs, samples, gpus):
    draw = random.Random(0)
    tasks, total = list(SHARES), 0.0
    for _ in range(20_000):
        guessing = draw.random() < 0.5
        loads = (draw.choices(tasks, list(SHARES.values()), k=samples) for _ in range(gpus))
        total += max(sum(costs[task].step(guessing, 1) for task in load) for load in loads)
    assert planning.slowest_step(costs, 0.5, 1, samples, gpus) == pytest.approx(total / 20_000, rel=0.005)


def test_wans_published_configs_are_found_by_name_and_give_the_published_sizes():
    published = {
        "Wan2.1-T2V-1.3B-Diffusers": 1.419,
        "Wan2.1-T2V-14B-Diffusers": 14.288,
        "Wan2.1-I2V-14B-480P-Diffusers": 16.395,
        "Wan2.1-I2V-14B-720P-Diffusers": 16.395,
        "Wan2.2-TI2V-5B-Diffusers": 5.0,
    }
    for name, billions in published.items():
        folder = wan.config_folder(f"model/{name}")
        config = wan.read_json(wan.transformer_folder(folder) / "config.json")
        with torch.device("meta"):
            base = UniViGUTransformer3DModel.from_config(config)
        theirs = sum(p.numel() for key, p in base.named_parameters() if not wan.is_text_side(key))
        assert theirs == pytest.approx(billions * 1e9, abs=1e6)
    with pytest.raises(MissingInputError, match="T2V-1"):
        wan.config_folder("model/nobody-knows-this")


def test_gpu_names_ignore_case_and_an_unknown_one_gets_a_list():
    assert find_gpu("H800") == GPUS["h800"]
    assert all(gpu.tflops > 100 and gpu.memory_gib >= 24 for gpu in GPUS.values())
    with pytest.raises(ConfigError, match=r"no GPU 'abacus'.*h100"):
        find_gpu("abacus")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_a_gpu_is_recognised_by_its_device_name(device, name):
    assert recognise_gpu(device) == GPUS[name]
    assert recognise_gpu("NVIDIA GeForce GT 1030") is None
