"""Intervals by hand; more of them in tests/evals/test_accuracy.py."""

import numpy as np
import pytest

from alignjax.core.intervals import (
    bootstrap_interval,
    clustered_interval,
    mean_by_row,
    row_means,
)


def test_one_sample_each_is_wilsons_interval():
    """8 of 10: center (0.8 + 0.19207) / 1.38415 = 0.71674, half-width 0.22659."""
    low, high = clustered_interval(np.array([1.0] * 8 + [0.0] * 2), 1)
    assert (low, high) == (pytest.approx(0.49015, abs=1e-4), pytest.approx(0.94333, abs=1e-4))


def test_values_that_agree_are_worth_more():
    """Halves from many samples each, against coins."""
    halves = np.linspace(0.4, 0.6, 10)
    narrow = np.diff(clustered_interval(halves, 100))
    assert narrow < 0.5 * np.diff(clustered_interval(np.array([0.0, 1.0] * 5), 100))
    assert clustered_interval(np.array([0.5]), 8) == (0.0, 1.0)


def test_bootstrap_of_two_values_by_hand():
    """Of 0 and 1 the mean is 0, 1/2 or 1 in 1/4, 1/2 and 1/4 of the resamples."""
    assert bootstrap_interval(np.array([0.0, 1.0])) == (0.0, 1.0)
    assert bootstrap_interval(np.array([3.0, 3.0, 3.0])) == (3.0, 3.0)


def test_bootstrap_quantiles_are_those_of_the_binomial():
    """3 of 10 right: resampled counts are Binomial(10, 0.3), whose quantiles at 2.5% and 97.5% are
    1 and 6: P(X <= 0) = 0.0282 is above 2.5%, so the lower one is 0."""
    low, high = bootstrap_interval(np.array([1.0] * 3 + [0.0] * 7))
    assert (low, high) == (pytest.approx(0.0), pytest.approx(0.6))


def test_bootstrap_covers_the_mean_of_skewed_values():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        low, high = bootstrap_interval(rng.exponential(size=80), num_resamples=1000)
        hits += low <= 1.0 <= high
    assert 0.90 <= hits / 400 <= 0.97


def test_bootstrap_leaves_out_what_is_not_there_and_repeats_itself():
    values = np.random.default_rng(1).random(30)
    with_gaps = np.insert(values, [3, 9], np.nan)
    assert bootstrap_interval(with_gaps) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)
    assert np.isnan(bootstrap_interval(np.array([0.5, np.nan]))).all()


def test_means_of_rows_with_gaps():
    values = np.array([[1.0, np.nan, 3.0], [np.nan] * 3, [4.0, 4.0, 4.0]])
    np.testing.assert_array_equal(row_means(values), [2.0, np.nan, 4.0])
    found = mean_by_row(values)
    assert found.mean == 3.0
    assert found.high - found.mean == pytest.approx(1.959964 * np.sqrt(2) / np.sqrt(2), abs=1e-5)
