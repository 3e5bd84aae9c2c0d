import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from components.bench import train_step


def toy():
    layer = nn.Linear(256, 256, bias=False)
    x = torch.randn(64, 256)
    return layer, lambda: layer(x).square().sum()


def test_saved_bytes_are_what_autograd_keeps_without_the_weights():
    layer, step = toy()
    # the layer keeps its input, the square keeps the layer's output
    assert train_step.saved_bytes(layer, step) == 2 * 64 * 256 * 4


def test_peak_bytes_count_what_the_backward_pass_makes_on_top_but_no_gradients():
    layer, step = toy()
    tensor, weight = 64 * 256 * 4, 256 * 256 * 4
    peak = train_step.peak_bytes(layer, step)
    assert 3 * tensor <= peak <= 5 * tensor + weight + 4096


def test_both_sides_have_the_same_tokens_and_attend_to_the_same_condition():
    ours, _ = train_step.our_step(1, 16, 1)
    wan, _ = train_step.wan_step(1, 16, 1)
    frames, height, width = ours.grid(train_step.OUR_LATENTS)
    assert frames * height * width == train_step.VIDEO_TOKENS
    assert torch.Size(train_step.WAN_LATENTS).numel() // 4 == train_step.VIDEO_TOKENS + train_step.TEXT_TOKENS
    assert {name for name, _ in wan.named_parameters()} < {name for name, _ in ours.named_parameters()}


@pytest.mark.slow
def test_a_comparison_says_times_and_bytes_of_both_sides(monkeypatch):
    monkeypatch.setattr(train_step, "PAIRS", 1)
    figures = train_step.compare(1, 16, 1)
    assert figures["ratio"] == pytest.approx(figures["ours_seconds"] / figures["wan_seconds"], rel=0.02)
    assert 0.9 < figures["saved_ratio"] < 1.2
    assert figures["ours_peak_bytes"] > figures["ours_saved_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("size", train_step.SIZES.values(), ids=str)
def test_our_step_peaks_at_most_a_twentieth_above_wans(size):
    with FakeTensorMode():  # the same bytes as of real tensors, and nothing is computed
        ours, theirs = (train_step.peak_bytes(*side(*size)) for side in (train_step.our_step, train_step.wan_step))
    assert ours <= 1.05 * theirs
