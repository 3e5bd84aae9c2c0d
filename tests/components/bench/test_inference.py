"""The benchmark of inference, at a size of seconds."""

import pytest
import torch

from components.bench import inference


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(inference, "LATENTS", (2, 8, 8))
    monkeypatch.setattr(inference, "STEPS", 3)
    monkeypatch.setattr(inference, "PAIRS", 2)
    monkeypatch.setattr(inference, "SIZES", {"small": (2, 24, 2)})


@pytest.mark.slow
def test_all_three_are_compared_with_the_seconds_of_both_sides(small):
    found = inference.measure()
    sizes = found["sizes"]["small"]
    assert sizes.keys() == {"caption", "generate", "guided"}
    assert all(figures["ours_seconds"] > 0 and figures["theirs_seconds"] > 0 for figures in sizes.values())
    assert found["ratio"] == sizes["generate"]["ratio"]
    assert found["caption_times_faster"] == pytest.approx(1 / sizes["caption"]["ratio"], abs=0.01)


@torch.no_grad()
def test_a_guided_step_is_two_passes_and_a_cached_caption_sees_the_video_once(small):
    model = inference.make_model(
        {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "ffn_dim": 64, "text_dim": 64}
    )
    read, made = [], []
    # a small video's branches of guidance are one batch of two, which share the video before the first attention
    model.patch_embedding.register_forward_hook(lambda _, given, __: read.extend(["video"] * len(given[0])))
    model.proj_out.register_forward_hook(lambda _, given, __: made.extend(["velocity"] * len(given[0])))
    for run, counts in (
        (inference.video_step(model, 1.0), (1, 1)),
        (inference.video_step(model, 3.0), (1, 2)),
        (inference.cached_caption(model), (1, 0)),
        (inference.papers_caption(model), (inference.STEPS, inference.STEPS)),
    ):
        read.clear()
        made.clear()
        run()
        assert (len(read), len(made)) == counts


def test_of_a_deep_model_no_caption_is_timed(small, monkeypatch):
    monkeypatch.setattr(inference, "CAPTIONED", 1)
    with torch.no_grad():
        assert inference.compare(2, 24, 2).keys() == {"generate", "guided"}
