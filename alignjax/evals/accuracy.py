"""Which of n samples of P problems are right -> pass@1, pass@k, maj@k and their 95% intervals.

Samples of one problem are alike, so the problem is the unit: P problems with n samples each are
worth between P and P n independent ones. NumPy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np

from alignjax.core.intervals import (
    Z95,
    Mean,
    bootstrap_interval,
    clustered_interval,
    ends_as_json,
)


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its 95% confidence interval."""

    mean: float
    low: float
    high: float
    num_problems: int
    num_samples: int
    """Samples of each problem."""
    values: np.ndarray = field(repr=False, compare=False)
    """[P] float64; of each problem."""

    @classmethod
    def of(cls, values: np.ndarray, num_samples: int, k: int = 1) -> Self:
        """The mean of P values in [0, 1], with `clustered_interval`.

        Args:
          values: [P] float64.
          num_samples: behind each value, k of them at a time.
        """
        low, high = clustered_interval(values, num_samples // k)
        return cls(float(np.mean(values)), low, high, len(values), num_samples, values)

    @cached_property
    def bootstrap(self) -> tuple[float, float]:
        """`bootstrap_interval` over the problems."""
        return bootstrap_interval(self.values)

    def as_json(self) -> dict[str, Any]:
        """The mean, and both intervals: `low` and `high`, and `bootstrap`."""
        mean = Mean(self.mean, self.low, self.high)
        return {**mean.as_json(), "bootstrap": ends_as_json(self.bootstrap)}

    def __str__(self) -> str:
        low, high = (100 * end for end in self.bootstrap)
        boot = f", bootstrap [{low:.1f}, {high:.1f}]" if self.num_problems > 1 else ""
        return (
            f"{100 * self.mean:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]{boot} "
            f"({self.num_problems} problems x {self.num_samples})"
        )


def pass_at_1(correct: np.ndarray) -> Estimate:
    """Probability that one sample is right.

    Args:
      correct: [P, n] bool; samples of each problem.
    Returns:
      The mean over problems of the share of right samples, with `clustered_interval`.
    """
    correct = _matrix(correct)
    return Estimate.of(correct.mean(axis=1), correct.shape[1])


def pass_at_k(correct: np.ndarray, k: int) -> Estimate:
    """Probability that at least one of k samples is right: mean of 1 - C(n - c, k) / C(n, k).

    Unbiased over the n samples, of which c are right; at k = 1 it is `pass_at_1`.

    Args:
      correct: [P, n] bool.
      k: 1 <= k <= n.
    Source: arXiv:2107.03374 eq. 1.
    """
    correct = _matrix(correct, k)
    n = correct.shape[1]
    num_wrong = n - correct.sum(axis=1)
    # C(n-c, k) / C(n, k) = prod over j < k of (n-c-j) / (n-j), which is 0 once n-c < k
    j = np.arange(k)
    all_wrong = np.prod(np.maximum(num_wrong[:, None] - j, 0) / (n - j), axis=1)
    return Estimate.of(1.0 - all_wrong, n, k)


def maj_at_k(answers: Sequence[Sequence[str | None]], correct: np.ndarray, k: int) -> Estimate:
    """Probability that the most frequent answer of k samples is right.

    The n samples are cut, in order, into floor(n / k) groups of k, and their results averaged.
    Samples without an answer do not vote; a group without votes is wrong. A tie is broken at
    random, so it counts as the mean over the tied answers.

    Args:
      answers: [P][n] answers, equal ones being the same string; None or "" for none.
      correct: [P, n] bool; where the same answer is right in one sample and not in another (by its
        format, say), it counts as the share of right ones among its votes.
      k: 1 <= k <= n.
    """
    correct = _matrix(correct, k)
    P, n = correct.shape
    if len(answers) != P or any(len(row) != n for row in answers):
        raise ValueError(f"answers must be [{P}][{n}] as `correct` is")
    starts = range(0, n - k + 1, k)
    values = [
        np.mean([_majority(row[s : s + k], right[s : s + k]) for s in starts])
        for row, right in zip(answers, correct, strict=True)
    ]
    return Estimate.of(np.array(values), n, k)


def paired_difference(before: np.ndarray, after: np.ndarray) -> Estimate:
    """after - before of pass@1 on the same problems; two separate intervals would not tell.

    With d the differences of the problems' means, the interval is that of the mean of d after
    adding two pseudo-problems (half a gain, half a loss, one tie), so that it does not shrink to a
    point when no problem changes:
    m +- z sqrt((sum d^2 + 1) / (P + 2) - m^2) / sqrt(P + 2), m = sum d / (P + 2).

    Args:
      before: [P, n] bool.
      after: [P, m] bool; row i is the problem of row i of `before`.
    Source: for n = m = 1, Agresti and Min, Statistics in Medicine 24 (2005), 729-740.
    """
    before, after = _matrix(before), _matrix(after)
    if len(before) != len(after):
        raise ValueError(f"{len(before)} problems before, {len(after)} after; expected the same")
    d = after.mean(axis=1) - before.mean(axis=1)
    P = len(d)
    center = d.sum() / (P + 2)
    half = Z95 * np.sqrt(((d**2).sum() + 1) / (P + 2) - center**2) / np.sqrt(P + 2)
    low, high = max(-1.0, center - half), min(1.0, center + half)
    return Estimate(float(d.mean()), float(low), float(high), P, after.shape[1], d)


def _matrix(correct: np.ndarray, k: int = 1) -> np.ndarray:
    correct = np.asarray(correct)
    if correct.dtype != bool or correct.ndim != 2 or 0 in correct.shape:
        raise ValueError(
            f"correct is {correct.dtype}{list(correct.shape)}; expected bool [problems, samples]"
        )
    if not 1 <= k <= correct.shape[1]:
        raise ValueError(f"k={k} with {correct.shape[1]} samples per problem; expected 1 <= k <= n")
    return correct


def _majority(answers: Sequence[str | None], correct: np.ndarray) -> float:
    votes: dict[str, list[bool]] = {}
    for answer, is_right in zip(answers, correct, strict=True):
        if answer:
            votes.setdefault(answer, []).append(bool(is_right))
    most = max((len(v) for v in votes.values()), default=0)
    winners = [float(np.mean(v)) for v in votes.values() if len(v) == most]
    return float(np.mean(winners)) if winners else 0.0
