"""Means -> their 95% confidence intervals. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""


def clustered_interval(values: np.ndarray, num_samples: int) -> tuple[float, float]:
    """95% interval for the mean of P values in [0, 1]: Wilson's, at the effective sample size.

    With p the mean of the P values and s^2 their variance (P - 1 below), p's standard error is
    s / sqrt(P), which holds however alike the samples of a problem are. The number of independent
    samples with this error is N = p (1 - p) P / s^2, never below P - 1 and taken as P num_samples
    if above. N = P with one sample per problem, and at p = 0 or 1, where s says nothing. The
    interval is Wilson's:
    (p + z^2 / 2N +- z sqrt(p (1 - p) / N + z^2 / 4N^2)) / (1 + z^2 / N).
    Of one problem nothing can be said: [0, 1].

    Args:
      values: [P] float64.
      num_samples: independent samples behind each value, at most.
    Source: Wilson, JASA 22 (1927), 209-212; the effective size: Korn and Graubard, Survey
      Methodology 24 (1998), 193-201.
    """
    P, p = len(values), float(np.mean(values))
    if P == 1:
        return 0.0, 1.0
    spread = p * (1 - p)
    variance = float(np.var(values, ddof=1))
    if spread <= 1e-12 or num_samples == 1:
        N = float(P)
    else:
        N = float(P * min(spread / max(variance, 1e-300), num_samples))
    center = (p + Z95**2 / (2 * N)) / (1 + Z95**2 / N)
    half = Z95 / (1 + Z95**2 / N) * np.sqrt(spread / N + Z95**2 / (4 * N**2))
    # p itself is always inside, but for the last bit at 0 and 1
    return max(0.0, min(p, center - half)), min(1.0, max(p, center + half))


class Mean(NamedTuple):
    """A mean and its 95% confidence interval, of values that may be any numbers."""

    mean: float
    low: float
    high: float

    def as_json(self) -> dict[str, float | None]:
        """Null where nothing can be said."""
        return {"mean": or_null(self.mean), **ends_as_json(self[1:])}

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ends_as_json(interval: Sequence[float]) -> dict[str, float | None]:
    """`low` and `high`; null where nothing can be said."""
    low, high = interval
    return {"low": or_null(low), "high": or_null(high)}


def or_null(value: float) -> float | None:
    """A number for JSON, which has no nan and no infinity."""
    return float(value) if np.isfinite(value) else None


def mean_by_row(values: np.ndarray) -> Mean:
    """The mean over rows of the means of their values, with m +- z s / sqrt(P).

    s is the standard deviation of the means of P rows (P - 1 below): the row is the unit, however
    alike its values are. Of one row nothing can be said: the interval is infinite.

    Args:
      values: [P, n] float; nan where there is none, rows without any are left out.
    """
    means = row_means(values)
    means = means[np.isfinite(means)]
    if not len(means):
        return Mean(np.nan, np.nan, np.nan)
    half = Z95 * np.std(means, ddof=1) / np.sqrt(len(means)) if len(means) > 1 else np.inf
    mean = float(means.mean())
    return Mean(mean, float(mean - half), float(mean + half))


def row_means(values: np.ndarray) -> np.ndarray:
    """[P, n] float, nan where there is none -> [P] float64: the means of the rows; nan of a row
    without any value."""
    known = np.isfinite(values)
    total, num = np.where(known, values, 0.0).sum(axis=1, dtype=np.float64), known.sum(axis=1)
    return np.where(num > 0, total / np.maximum(num, 1), np.nan)


def bootstrap_interval(
    values: np.ndarray, *, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95% interval for the mean of P values: the percentile bootstrap over them.

    P values are drawn with replacement, `num_resamples` times; the interval goes from the 2.5% to
    the 97.5% quantile of the means. It asks nothing of the values, but where all are equal it is a
    point, and with few of them it is too narrow: `clustered_interval` is neither.

    Args:
      values: [P] float; one for each problem, the unit that is drawn. nan where there is none.
      seed: of the resampling; the same values and seed give the same interval.
    Returns:
      low and high; nan if there are fewer than two values, of which nothing can be said.
    Source: Efron, Annals of Statistics 7 (1979), 1-26; the percentile interval: Efron and
      Tibshirani, "An Introduction to the Bootstrap" (1993), ch. 13.
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    P = len(values)
    if P < 2:
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    rows = max(1, _NUMBERS_AT_ONCE // P)
    for start in range(0, num_resamples, rows):
        part = means[start : start + rows]
        part[:] = values[rng.integers(P, size=(len(part), P))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


_NUMBERS_AT_ONCE = 1 << 21
