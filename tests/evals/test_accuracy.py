"""Accuracy and its intervals against enumeration, textbook values and simulated coverage."""

import itertools
import math

import numpy as np
import pytest

from alignjax.evals.accuracy import (
    clustered_interval,
    maj_at_k,
    paired_difference,
    pass_at_1,
    pass_at_k,
)


def test_wilson_with_one_sample_per_problem() -> None:
    """Wilson's interval solves (x - p)^2 = z^2 x (1 - x) / N for x; here N = 10, p = 0.2."""
    correct = np.zeros((10, 1), bool)
    correct[:2] = True
    got = pass_at_1(correct)
    z2 = 3.841458820694124  # 95% quantile of chi squared with one degree of freedom
    roots = np.roots([1 + z2 / 10, -(2 * 0.2 + z2 / 10), 0.2**2])
    assert got.mean == pytest.approx(0.2)
    assert [got.low, got.high] == pytest.approx(sorted(roots), abs=1e-12)
    # Brown, Cai and DasGupta (2001) and every table: 2 of 10 is 5.7% to 51.0%
    assert [got.low, got.high] == pytest.approx([0.0567, 0.5098], abs=5e-5)


def test_copies_of_a_sample_add_no_certainty() -> None:
    one = np.random.default_rng(0).random((50, 1)) < 0.3
    got, copied = pass_at_1(one), pass_at_1(np.repeat(one, 8, axis=1))
    assert copied.mean == got.mean
    assert [copied.low, copied.high] == pytest.approx([got.low, got.high], abs=0.002)


def test_the_effective_size_is_that_of_the_standard_error() -> None:
    """N p-hat's own variance is p (1 - p): solve Wilson's equation with SE^2 from the formula."""
    shares = np.array([0.0, 0.25, 0.25, 0.5, 1.0, 0.75])
    correct = np.array([[i < 4 * s for i in range(4)] for s in shares])
    p = sum(shares) / 6
    se2 = sum((s - p) ** 2 for s in shares) / 5 / 6
    N = p * (1 - p) / se2
    assert 5 < N < 24  # neither bound applies
    z2 = 3.841458820694124
    roots = np.roots([1 + z2 / N, -(2 * p + z2 / N), p**2])
    got = pass_at_1(correct)
    assert [got.low, got.high] == pytest.approx(sorted(roots), abs=1e-12)


@pytest.mark.parametrize("value", [False, True])
def test_all_or_nothing_is_no_certainty(value: bool) -> None:
    """P = 20 problems, none right: Wilson's upper limit z^2 / (P + z^2), however many samples."""
    bound = 3.841458820694124 / (20 + 3.841458820694124)
    for n in (1, 16):
        got = pass_at_1(np.full((20, n), value))
        expected = (1 - bound, 1.0) if value else (0.0, bound)
        assert (got.low, got.high) == pytest.approx(expected, abs=1e-12)


def test_equal_shares_are_worth_at_most_all_samples() -> None:
    correct = np.tile([True, False], (30, 2))
    half = 1.959964 * math.sqrt(0.25 / 120 + 3.841459 / (4 * 120**2)) / (1 + 3.841459 / 120)
    got = pass_at_1(correct)
    assert (got.low, got.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)


def test_pass_at_k_is_worth_fewer_samples() -> None:
    """All 30 problems alike: 8 samples make 4 independent pairs, so N = 120, not 240."""
    correct = np.tile([True, False, False, False], (30, 2))
    p = 1 - (6 / 8) * (5 / 7)
    half = 1.959964 * math.sqrt(p * (1 - p) / 120 + 3.841459 / (4 * 120**2)) / (1 + 3.841459 / 120)
    got = pass_at_k(correct, 2)
    assert got.mean == pytest.approx(p)
    assert (got.high - got.low) / 2 == pytest.approx(half, abs=1e-6)


def test_one_problem_says_nothing_of_others() -> None:
    assert clustered_interval(np.array([0.5]), 8) == (0.0, 1.0)


@pytest.mark.parametrize(("a", "b"), [(0.5, 2.0), (5.0, 5.0)])
def test_coverage(a: float, b: float) -> None:
    """95% intervals of 60 problems x 8 samples with beta-distributed difficulty hold the truth."""
    rng = np.random.default_rng(1)
    truth, hits, naive_hits = a / (a + b), 0, 0
    for _ in range(1000):
        correct = rng.random((60, 8)) < rng.beta(a, b, (60, 1))
        got = pass_at_1(correct)
        hits += got.low <= truth <= got.high
        p = correct.mean()
        naive_hits += abs(p - truth) <= 1.96 * math.sqrt(p * (1 - p) / correct.size)
    assert 930 <= hits <= 975  # 950 +- 3 standard deviations
    assert naive_hits < 930  # what a count of samples as independent would give


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_pass_at_k_is_the_mean_over_all_subsets(k: int) -> None:
    correct = np.random.default_rng(2).random((7, 6)) < np.linspace(0, 1, 7)[:, None]
    subsets = list(itertools.combinations(range(6), k))
    per_problem = [np.mean([row[list(s)].any() for s in subsets]) for row in correct]
    assert pass_at_k(correct, k).mean == pytest.approx(np.mean(per_problem), abs=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    correct = np.zeros((2, 2000), bool)
    correct[:, 0] = True
    assert pass_at_k(correct, 1000).mean == pytest.approx(0.5)


def test_majority() -> None:
    answers = [
        ["7", "7", "8", "9"],  # 7 wins, right
        ["7", "8", "8", None],  # 8 wins, wrong
        ["7", "8", "", None],  # a tie of 7 and 8: half
        [None, None, None, ""],  # nobody votes: wrong
        ["7", None, None, None],  # silence is no majority: right
    ]
    correct = np.array([[a == "7" for a in row] for row in answers])
    assert maj_at_k(answers, correct, 4).mean == pytest.approx((1 + 0 + 0.5 + 0 + 1) / 5)
    # groups of two: (1, 0), (.5, 0), (.5, 0), (0, 0), (1, 0)
    assert maj_at_k(answers, correct, 2).mean == pytest.approx((0.5 + 0.25 + 0.25 + 0 + 0.5) / 5)
    # groups of three drop the last sample: 1, 0, 0.5, 0, 1
    assert maj_at_k(answers, correct, 3).mean == pytest.approx(0.5)
    assert maj_at_k(answers, correct, 1).mean == pytest.approx(correct.mean())


def test_majority_of_an_answer_that_is_right_only_in_format() -> None:
    correct = np.array([[True, False, False]])
    assert maj_at_k([["7", "7", "8"]], correct, 3).mean == pytest.approx(0.5)


def test_paired_difference_by_hand() -> None:
    """Ten problems: five gained, one lost. Agresti and Min: (b - c) / (n + 2) and its variance."""
    before = np.array([[0]] * 5 + [[1]] + [[1]] * 2 + [[0]] * 2, bool)
    after = np.array([[1]] * 5 + [[0]] + [[1]] * 2 + [[0]] * 2, bool)
    got = paired_difference(before, after)
    assert got.mean == pytest.approx(0.4)
    center = (5.5 - 1.5) / 12
    half = 1.959964 * math.sqrt((5.5 + 1.5) - (5.5 - 1.5) ** 2 / 12) / 12
    assert (got.low, got.high) == pytest.approx((center - half, center + half), abs=1e-6)
    flipped = paired_difference(after, before)
    assert (flipped.mean, flipped.low) == pytest.approx((-0.4, -got.high))


def test_pairing_sees_what_separate_intervals_do_not() -> None:
    rng = np.random.default_rng(3)
    before = rng.random((200, 1)) < 0.5
    after = before.copy()
    after[np.flatnonzero(~before)[:12]] = True
    a, b = pass_at_1(before), pass_at_1(after)
    assert a.high > b.low
    assert paired_difference(before, after).low > 0


def test_no_change_is_no_certainty_of_none() -> None:
    correct = np.ones((50, 4), bool)
    got = paired_difference(correct, correct)
    assert got.mean == 0 and -0.06 < got.low < -0.01 and got.high == -got.low


def test_paired_coverage() -> None:
    """The mean gain is 0.1 - 0.4 E[p] + 0.3 = 0.2 for p uniform: p -> 0.6 p + 0.4."""
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(1000):
        p = rng.random((80, 1))
        got = paired_difference(rng.random((80, 2)) < p, rng.random((80, 3)) < 0.6 * p + 0.4)
        hits += got.low <= 0.2 <= got.high
    assert 930 <= hits <= 975


def test_text() -> None:
    text = str(pass_at_1(np.zeros((20, 4), bool)))
    assert text == "0.0% [0.0, 16.1], bootstrap [0.0, 0.0] (20 problems x 4)"
    assert str(pass_at_1(np.ones((1, 4), bool))) == "100.0% [0.0, 100.0] (1 problems x 4)"


def test_bad_input() -> None:
    good = np.ones((3, 4), bool)
    with pytest.raises(ValueError, match=r"correct is int64\[3, 4\]; expected bool"):
        pass_at_1(good.astype(np.int64))
    with pytest.raises(ValueError, match=r"correct is bool\[3\]"):
        pass_at_1(good[:, 0])
    with pytest.raises(ValueError, match=r"bool\[0, 4\]"):
        pass_at_1(good[:0])
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k={k} with 4 samples"):
            pass_at_k(good, k)
    with pytest.raises(ValueError, match="3 problems before, 2 after"):
        paired_difference(good, good[:2])
    with pytest.raises(ValueError, match=r"answers must be \[3\]\[4\]"):
        maj_at_k([["a"] * 4] * 2, good, 2)
