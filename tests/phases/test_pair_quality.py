"""Agreement of scores with ranks, by hand."""

import numpy as np
import pytest

from alignjax.phases.pair_quality import calibration_error, pair_quality

NAN = np.nan


def test_by_hand():
    """Three prompts: one of three responses with a tie, one pair that is wrong, one of ties."""
    scores = np.array([[2.0, 0.0, 1.0], [0.0, 1.0, NAN], [5.0, 7.0, NAN]])
    ranks = np.array([[1, 2, 2], [1, 2, 0], [1, 1, 0]])
    lengths = np.array([[4, 4, 10], [9, 3, 0], [1, 1, 0]])
    found = pair_quality(scores, ranks, lengths)
    loss = [np.log1p(np.exp(-2.0)), np.log1p(np.exp(-1.0)), np.log1p(np.exp(1.0))]
    assert found["loss"] == pytest.approx((loss[0] + loss[1]) / 4 + loss[2] / 2)
    assert found["accuracy"] == pytest.approx((1 + 0) / 2)
    assert found["margin"] == pytest.approx((1.5 - 1.0) / 2)
    assert found["num_pairs"] == 3
    # Of confidence 0.88 and 0.73, in other bins: right; of 0.73: wrong.
    sure, unsure = 1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(-1.0))
    ece = 0.25 * (1 - sure) + abs(0.25 * (1 - unsure) + 0.5 * (0 - unsure))
    assert found["ece"] == pytest.approx(ece)
    by_length = {name: found[f"accuracy_by_length/{name}"] for name in (
        "much_shorter", "shorter", "similar", "longer", "much_longer")}  # fmt: skip
    np.testing.assert_equal(
        by_length,
        {"much_shorter": 1.0, "shorter": NAN, "similar": 1.0, "longer": NAN, "much_longer": 0.0},
    )


@pytest.mark.parametrize(
    ("better", "name"),
    [(49, "much_shorter"), (50, "shorter"), (90, "shorter"), (95, "similar"), (109, "similar"),
     (111, "longer"), (199, "longer"), (200, "much_longer")],
)  # fmt: skip
def test_each_ratio_of_lengths_is_in_one_bucket(better, name):
    """Of the better response, the worse one having 100 tokens."""
    found = pair_quality(np.array([[1.0, 0.0]]), np.array([[1, 2]]), np.array([[better, 100]]))
    there = [k for k, v in found.items() if k.startswith("accuracy_by") and not np.isnan(v)]
    assert there == [f"accuracy_by_length/{name}"]


def test_the_interval_is_wilsons_over_prompts():
    """8 of 10 right: 0.4902 to 0.9433."""
    scores = np.zeros((10, 2))
    scores[:8, 0] = scores[8:, 1] = 1.0
    found = pair_quality(scores, np.tile([1, 2], (10, 1)), np.ones((10, 2), int))
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["accuracy_low"] == pytest.approx(0.4902, abs=1e-4)
    assert found["accuracy_high"] == pytest.approx(0.9433, abs=1e-4)


def test_equal_scores_are_half_right():
    found = pair_quality(np.ones((4, 2)), np.tile([2, 1], (4, 1)), np.ones((4, 2), int))
    assert found["accuracy"] == 0.5 and found["margin"] == 0
    assert found["loss"] == pytest.approx(np.log(2)) and found["ece"] == pytest.approx(0)


def test_scores_that_say_how_likely_they_are_right_are_calibrated():
    """sigmoid(log 3) = 3/4, of which three in four are right."""
    margin = np.log(3) * np.array([1, 1, 1, -1.0])
    is_right = (margin > 0).astype(float)
    assert calibration_error(margin, is_right, np.full(4, 0.25)) == pytest.approx(0, abs=1e-12)
    assert calibration_error(2 * margin, is_right, np.full(4, 0.25)) == pytest.approx(0.9 - 0.75)
    assert calibration_error(np.array([800.0]), np.ones(1), np.ones(1)) == pytest.approx(0)


def test_without_a_pair_nothing_is_said():
    found = pair_quality(np.ones((2, 2)), np.ones((2, 2), int), np.ones((2, 2), int))
    assert found.pop("num_pairs") == 0 and all(np.isnan(list(found.values())))
    assert (
        found.keys() | {"num_pairs"}
        == pair_quality(np.ones((1, 2)), np.array([[1, 2]]), np.ones((1, 2), int)).keys()
    )
