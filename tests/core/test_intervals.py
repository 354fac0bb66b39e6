"""Intervals by hand; more of them in tests/evals/test_accuracy.py."""

import numpy as np
import pytest

from alignjax.core.intervals import clustered_interval


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
