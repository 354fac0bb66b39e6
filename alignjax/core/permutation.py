"""Paired differences -> a p-value, by flipping their signs. NumPy only."""

from __future__ import annotations

import math

import numpy as np

MAX_SUM = 1_000_000
"""Largest sum of whole numbers of which all sums are counted."""


def sign_flip_exact(differences: np.ndarray) -> float:
    """Two-sided p-value of P paired differences that are whole numbers, by counting.

    If it does not matter which of a pair is which, each difference is as likely with the other
    sign: P(|sum of +-d| >= |sum of d|) over all 2^P assignments of signs, all equally likely. Of
    differences -1, 0 and 1 it is McNemar's test in its exact form (the sign test).

    Args:
      differences: [P] int. Zeros change nothing. The sum of their sizes is at most MAX_SUM.
    Raises:
      ValueError: if they are no integers, or too large.
    Source: Fisher, "The Design of Experiments" (1935), sec. 21; McNemar, Psychometrika 12 (1947),
      153-157.
    """
    if not np.issubdtype(differences.dtype, np.integer):
        raise ValueError(f"differences are {differences.dtype}; expected integers")
    sizes = np.abs(differences[differences != 0])
    total = int(sizes.sum())
    if total > MAX_SUM:
        raise ValueError(f"the differences add up to {total}; expected at most {MAX_SUM}")
    # chance[s] of a sum of s - total: each size moves half of it down and half up.
    chance = np.zeros(2 * total + 1)
    chance[total], reach = 1.0, 0
    for size in sizes.tolist():
        new = np.zeros_like(chance)
        here = slice(total - reach, total + reach + 1)
        new[here.start - size : here.stop - size] += 0.5 * chance[here]
        new[here.start + size : here.stop + size] += 0.5 * chance[here]
        chance, reach = new, reach + size
    sums = np.abs(np.arange(-total, total + 1))
    return min(1.0, float(chance[sums >= abs(int(differences.sum()))].sum()))


def sign_flip_sampled(
    differences: np.ndarray, *, num_samples: int = 19_999, seed: int = 0
) -> float:
    """The p-value of `sign_flip_exact` of any differences, by drawing signs.

    (b + 1) / (num_samples + 1), where b of the draws give a sum at least as large as what was seen:
    what was seen counts as one, so that no p-value is 0 and none is too small on average.

    Args:
      differences: [P] float.
      seed: the same differences and seed give the same p-value.
    Source: Phipson and Smyth, Statistical Applications in Genetics 9 (2010), art. 39.
    """
    d = np.asarray(differences, np.float64)
    d = d[d != 0]
    # Sums in another order differ in their last bits; an equal one must count.
    seen = abs(math.fsum(d)) - 1e-9 * float(np.abs(d).sum())
    rng = np.random.default_rng(seed)
    rows, num_extreme, left = max(1, (1 << 21) // max(1, len(d))), 0, num_samples
    while left:
        signs = 2 * rng.integers(2, size=(min(rows, left), len(d))) - 1
        num_extreme += int((np.abs(signs @ d) >= seen).sum())
        left -= len(signs)
    return (num_extreme + 1) / (num_samples + 1)


def sign_flip(differences: np.ndarray, num_samples: int) -> tuple[float, bool]:
    """The p-value of differences of shares, exact where they are multiples of 1 / num_samples.

    Args:
      differences: [P] float.
      num_samples: such as how many samples each share is of.
    Returns:
      the p-value, and whether it is exact.
    """
    scaled = np.asarray(differences, np.float64) * num_samples
    whole = np.rint(scaled)
    if np.abs(scaled - whole).max(initial=0.0) < 1e-6 and np.abs(whole).sum() <= _FEW:
        return sign_flip_exact(whole.astype(np.int64)), True
    return sign_flip_sampled(differences), False


_FEW = 50_000
"""Above, counting takes longer than drawing."""
