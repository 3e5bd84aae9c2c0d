"""Intervals have their nominal coverage, and a claim is correct only if it has one value, the true one."""

import numpy as np
import pytest
from scipy.stats import binomtest

from univigu.errors import BadInputError
from univigu.evaluation.claims import majority_values, score_item, single_values, summarise
from univigu.evaluation.intervals import clustered_mean, paired_difference, seeded_difference, seeded_mean, share


def test_share_gives_the_published_wilson_interval():
    # Newcombe 1998, table I: 81 of 263 -> 0.2553 to 0.3662
    score = share([True] * 81 + [False] * 182)
    assert score["n"] == 263
    assert score["value"] == pytest.approx(81 / 263, abs=1e-6)
    assert (score["low"], score["high"]) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))


@pytest.mark.parametrize("n", [1, 2, 7, 100, 4096])
def test_share_gives_the_interval_of_scipy(n):
    for hits in {0, 1, n // 3, n - 1, n}:
        low, high = binomtest(hits, n).proportion_ci(0.95, method="wilson")
        score = share([True] * hits + [False] * (n - hits))
        assert (score["low"], score["high"]) == pytest.approx((low, high), abs=1e-6)


def test_a_perfect_share_is_still_uncertain():
    score = share(np.ones(20, dtype=bool))
    assert score["value"] == score["high"] == 1.0
    assert 0.8 < score["low"] < 0.9


def test_share_of_nothing_is_refused():
    with pytest.raises(BadInputError):
        share([])


def test_clustered_mean_gives_attributes_equal_weight_and_is_repeatable():
    rng = np.random.default_rng(0)
    items = [{"a": bool(rng.random() < 0.8), **({"b": bool(rng.random() < 0.4)} if i % 4 else {})} for i in range(300)]
    score = clustered_mean(items, seed=3)
    by_hand = np.mean([np.mean([item[name] for item in items if name in item]) for name in "ab"])
    assert score["value"] == pytest.approx(by_hand, abs=1e-6)
    assert score["low"] < score["value"] < score["high"]
    assert score == clustered_mean(items, seed=3)


def test_repeating_a_claim_within_a_clip_does_not_narrow_the_interval():
    rng = np.random.default_rng(1)
    right = rng.random(200) < 0.5
    alone = clustered_mean([{"a": bool(r)} for r in right])
    repeated = clustered_mean([{name: bool(r) for name in "abcdefg"} for r in right])
    assert repeated["high"] - repeated["low"] == pytest.approx(alone["high"] - alone["low"], abs=1e-6)


def test_clustered_interval_has_its_nominal_coverage():
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        ability = rng.beta(4, 2, size=60)  # clips differ in difficulty, so claims about one clip are correlated
        right = rng.random((60, 5)) < ability[:, None]
        score = clustered_mean([dict(zip("abcde", map(bool, row), strict=True)) for row in right], seed=trial)
        covered += score["low"] <= 4 / 6 <= score["high"]
    assert 178 <= covered <= 199  # about 0.95 of 200


def test_a_claim_is_correct_only_if_it_is_the_one_true_value():
    truth = {"colour": "red", "speed": "slow", "digit": "two"}
    stated = {"colour": {"red"}, "speed": {"slow", "fast"}, "digit": set(), "start": {"top"}}
    assert single_values(stated) == {"colour": "red", "start": "top"}
    assert score_item(truth, single_values(stated)) == {"colour": True, "speed": False, "digit": False}


def test_summarise_counts_only_the_items_scored_on_an_attribute():
    scores = summarise([{"a": True, "b": False}, {"a": True}, {"a": False}])
    assert scores["a"]["n"] == 3
    assert scores["b"]["n"] == 1
    assert scores["mean"]["value"] == pytest.approx((2 / 3 + 0) / 2, abs=1e-6)


def test_majority_is_the_most_common_value_with_ties_resolved_by_name():
    truths = [{"c": "red"}, {"c": "blue"}, {"c": "red"}, {"c": "blue"}, {"c": "pink"}]
    assert majority_values(truths) == {"c": "blue"}


def test_the_paired_difference_is_antisymmetric():
    rng = np.random.default_rng(3)
    theirs, ours = (
        [{"a": bool(rng.random() < share), **({"b": bool(rng.random() < 0.4)} if i % 4 else {})} for i in range(300)]
        for share in (0.5, 0.8)
    )
    difference = paired_difference(ours, theirs, seed=1)
    means = [clustered_mean(side)["value"] for side in (ours, theirs)]
    assert difference["value"] == pytest.approx(means[0] - means[1], abs=2e-6)
    assert 0 < difference["low"] < difference["value"] < difference["high"]
    other = paired_difference(theirs, ours, seed=1)
    assert (other["value"], other["low"], other["high"]) == tuple(-difference[key] for key in ("value", "high", "low"))


def test_pairing_detects_a_gain_that_two_intervals_hide():
    rng = np.random.default_rng(4)
    theirs = [{"a": bool(rng.random() < 0.5)} for _ in range(200)]
    ours = [{"a": item["a"] or number % 20 == 0} for number, item in enumerate(theirs)]  # never worse, 5 more correct
    assert clustered_mean(ours)["low"] < clustered_mean(theirs)["high"]
    assert paired_difference(ours, theirs)["low"] > 0
    assert paired_difference(theirs, theirs) == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 200}


@pytest.mark.slow
def test_the_paired_interval_has_its_nominal_error_rate():
    rng = np.random.default_rng(5)
    promoted = 0
    for trial in range(200):
        ability = rng.beta(4, 2, size=80)[:, None]
        ours, theirs = (
            [dict(zip("abc", map(bool, row), strict=True)) for row in rng.random((80, 3)) < ability] for _ in range(2)
        )
        promoted += paired_difference(ours, theirs, seed=trial)["low"] > 0
    assert promoted <= 12  # of two equal models, one in forty is found better: about 5 of 200


def test_only_the_same_claims_are_paired():
    with pytest.raises(BadInputError, match="same items"):
        paired_difference([{"a": True}], [{"a": True, "b": False}])
    with pytest.raises(BadInputError, match="same items"):
        paired_difference([{"a": True}], [{"a": True}, {"a": True}])


def training(right, items=6):
    """A training that is right on all of its items, or on none."""
    return [{"colour": right} for _ in range(items)]


def test_the_interval_over_seeds_is_the_one_computed_by_hand():
    # All variation is between trainings: a resample's mean is Binomial(8, 1/2) / 8. P(0 of 8) = 0.4 % and P(at most 1)
    # = 3.5 %, so the 2.5 % quantile is 1/8, and by symmetry the 97.5 % quantile 7/8.
    score = seeded_mean([training(number < 4) for number in range(8)])
    assert score == {"value": 0.5, "low": 0.125, "high": 0.875, "n": 6, "seeds": 8}


def test_the_interval_over_clips_is_the_one_computed_by_hand():
    # The same where all variation is between clips, in one training or in three equal ones.
    items = [{"colour": number < 4} for number in range(8)]
    for count in (1, 3):
        assert seeded_mean([items] * count) == {"value": 0.5, "low": 0.125, "high": 0.875, "n": 8, "seeds": count}


def test_a_difference_between_seeds_that_is_the_same_in_each_is_certain():
    better, worse = [training(True), training(True)], [training(False), training(False)]
    assert seeded_difference(better, worse) == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 6, "seeds": 2}
    mixed = [training(True), training(False)]  # resamples draw 0, 1 or 2 times the first: P(0) = P(2) = 25 %
    assert seeded_difference(mixed, worse) == {"value": 0.5, "low": 0.0, "high": 1.0, "n": 6, "seeds": 2}


def test_seeds_that_are_all_right_are_still_uncertain():
    assert seeded_mean([training(True, 20)] * 3) == {**share([True] * 20), "seeds": 3}


def test_trainings_on_other_items_or_seeds_are_not_compared():
    with pytest.raises(BadInputError, match="same items"):
        seeded_mean([training(True, 5), training(True, 6)])
    with pytest.raises(BadInputError, match="same items"):
        seeded_mean([])
    with pytest.raises(BadInputError, match="different seeds"):
        seeded_difference([training(True)], [training(True), training(True)])
