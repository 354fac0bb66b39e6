"""p-values by hand, by enumeration of all signs, and as McNemar's test of tables has them."""

import itertools
import math

import numpy as np
import pytest

from alignjax.core.permutation import (
    MAX_SUM,
    sign_flip,
    sign_flip_exact,
    sign_flip_sampled,
)


def enumerated(differences):
    """The share of all 2^P assignments of signs whose sum is as large."""
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    seen = abs(sum(differences))
    return sum(total >= seen for total in sums) / len(sums)


def test_mcnemar_by_hand() -> None:
    """10 discordant pairs, 9 one way: 2 (C(10, 9) + C(10, 10)) / 2^10 = 22 / 1024."""
    d = np.array([1] * 9 + [-1] + [0] * 50)
    assert sign_flip_exact(d) == pytest.approx(22 / 1024, abs=1e-15)
    # 5 to 5 says nothing.
    assert sign_flip_exact(np.array([1, -1] * 5)) == 1.0
    # 6 to 0: 2 / 2^6.
    assert sign_flip_exact(np.array([-1] * 6)) == pytest.approx(2 / 64, abs=1e-15)


@pytest.mark.parametrize("seed", range(5))
def test_exact_is_the_enumeration(seed: int) -> None:
    rng = np.random.default_rng(seed)
    d = rng.integers(-4, 6, size=11)
    assert sign_flip_exact(d) == pytest.approx(enumerated(d.tolist()), abs=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_sampled_is_near_the_exact_one(seed: int) -> None:
    d = np.random.default_rng(seed).integers(-4, 6, size=12)
    exact = enumerated(d.tolist())
    found = sign_flip_sampled(d / 7)  # Sevenths: sums differ in their last bits.
    assert abs(found - exact) < 4 * math.sqrt(exact * (1 - exact) / 19_999) + 1 / 20_000
    assert found == sign_flip_sampled(d / 7)
    assert exact == 1 or found != sign_flip_sampled(d / 7, seed=1)


def test_no_p_value_is_zero() -> None:
    assert sign_flip_sampled(np.ones(60) * 0.3, num_samples=99) == 1 / 100
    assert sign_flip_sampled(np.zeros(5)) == 1.0
    assert sign_flip_exact(np.zeros(5, np.int64)) == 1.0


def test_shares_of_samples_are_counted_and_other_values_drawn() -> None:
    d = np.array([0.75, 0.25, -0.5, 0.0, 0.25, 0.5])
    p, is_exact = sign_flip(d, 4)
    assert is_exact and p == pytest.approx(enumerated([3, 1, -2, 0, 1, 2]), abs=1e-14)
    assert sign_flip(d + 0.1, 4)[1] is False
    # As whole numbers they would be 4.5 million: drawn.
    assert sign_flip(np.array([4.5e6]), 1) == (1.0, False)


def test_under_the_null_small_p_values_are_as_rare_as_they_say() -> None:
    rng = np.random.default_rng(0)
    p = [sign_flip_exact(rng.integers(-3, 4, size=40)) for _ in range(2000)]
    assert 0.035 < np.mean(np.array(p) <= 0.05) <= 0.065  # 0.05 +- 3 standard deviations


def test_faults() -> None:
    with pytest.raises(ValueError, match="differences are float64; expected integers"):
        sign_flip_exact(np.array([0.5]))
    with pytest.raises(ValueError, match=f"add up to 2000000; expected at most {MAX_SUM}"):
        sign_flip_exact(np.array([2_000_000]))
