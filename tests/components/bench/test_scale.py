"""The memory of one GPU at scale."""

from components.bench import scale
from components.pipeline.profiles import load_profile


def test_more_gpus_need_less_each_and_64_take_a_batch_that_divides():
    profile = load_profile("tiny")
    profile["train_stage_1"]["zero_stage"] = profile["train_stage_2"]["zero_stage"] = 3
    few, many = (scale.count(profile, gpus) for gpus in (8, 64))
    assert few["gib"].keys() == {"training step", "evaluation", "caption", "generate"}
    assert few["peak"] == max(few["gib"].values())
    assert few["fits"]
    assert many["gib"]["training step"] <= few["gib"]["training step"]


def test_a_cell_fits_only_with_a_tenth_to_spare():
    assert scale.fits(66.6)
    assert not scale.fits(66.7)
