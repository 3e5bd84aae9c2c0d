"""The Fréchet distance between sets of vectors."""

import numpy as np
import pytest
import scipy.linalg

from univigu.evaluation.frechet import frechet_distance


def test_it_is_the_formula_with_the_root_of_the_product_of_covariances():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(50, 4)), 2 * rng.normal(size=(40, 4)) + 1
    one, other = np.cov(ours.T), np.cov(theirs.T)
    root = scipy.linalg.sqrtm(one @ other).real
    apart = ours.mean(0) - theirs.mean(0)
    assert frechet_distance(ours, theirs) == pytest.approx(apart @ apart + np.trace(one + other - 2 * root))


def test_it_is_zero_between_equal_sets_and_grows_with_a_shift_alone():
    vectors = np.random.default_rng(1).normal(size=(6, 20))  # fewer vectors than dimensions
    assert frechet_distance(vectors, vectors) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(vectors, vectors + 0.5) == pytest.approx(20 * 0.25)
