"""The memory of one GPU at scale."""

import pytest

from components.bench import scale
from components.pipeline.profiles import load_profile


@pytest.mark.slow
def test_more_gpus_need_less_each_and_64_take_a_batch_that_divides():
    profile = load_profile("tiny")
    profile["train_stage_1"]["zero_stage"] = profile["train_stage_2"]["zero_stage"] = 3
    few, many = (scale.count(profile, gpus) for gpus in (8, 64))
    assert few["gib"].keys() == {"training step", "evaluation", "caption", "generate"}
    assert few["peak"] == max(few["gib"].values())
    assert few["fits"]
    assert many["gib"]["training step"] <= few["gib"]["training step"]


@pytest.mark.slow
@pytest.mark.parametrize(("most", "sharing"), [(1, 1), (2, 2), (99, 4)])
def test_where_a_clip_is_too_large_gpus_share_its_tokens_until_it_fits(monkeypatch, most, sharing):
    tried = []
    monkeypatch.setattr(scale, "fits", lambda gib: tried.append(gib) or len(tried) >= most)
    found = scale.count(load_profile("tiny"), 8)  # whose model has 4 heads
    assert found["sequence_parallel"] == sharing
    assert found["fits"] == (most < 99)


def test_a_cell_fits_only_with_a_tenth_to_spare():
    assert scale.fits(66.6)
    assert not scale.fits(66.7)


def test_a_profile_whose_base_is_not_here_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "ROOT", tmp_path)
    assert scale.profiles_with_base(["tiny", "wan-1.3b"]) == (["wan-1.3b"], ["tiny"])
