"""Intervals of means, and of statistics of a whole set."""

import numpy as np
import pytest

from univigu.errors import BadInputError
from univigu.evaluation.intervals import jackknife, mean


def test_the_interval_of_a_mean_covers_the_true_mean_about_19_times_in_20():
    rng = np.random.default_rng(0)
    scores = [mean(rng.normal(size=60), seed) for seed in range(200)]
    assert 0.9 <= np.mean([one["low"] <= 0 <= one["high"] for one in scores]) <= 0.99


def test_the_jackknife_of_a_mean_has_the_standard_error_of_a_mean():
    values = np.random.default_rng(1).normal(size=30)
    score = jackknife(lambda chosen: float(values[chosen].mean()), len(values))
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert score["high"] - score["low"] == pytest.approx(2 * 1.959964 * error, abs=1e-5)
    assert score["n"] == 30


def test_one_item_has_no_interval():
    with pytest.raises(BadInputError, match="at least two"):
        mean([1.0])
