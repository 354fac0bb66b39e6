"""Scores of ranked completions -> how well they agree with the ranks: NumPy, on the host."""

import numpy as np

from alignjax.core.intervals import clustered_interval

NUM_BINS = 10
LENGTH_RATIOS = {
    "much_shorter": (0.0, 1 / 2), "shorter": (1 / 2, 1 / 1.1), "similar": (1 / 1.1, 1.1),
    "longer": (1.1, 2.0), "much_longer": (2.0, np.inf),
}  # fmt: skip
"""Name -> from (included) and up to (excluded) which length of the better completion, divided by
that of the worse one."""


def pair_quality(scores: np.ndarray, ranks: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """What a reward model is worth, on P prompts with up to K completions each.

    A pair is two completions of one prompt and of unlike rank. Means are over prompts of the mean
    over the prompt's pairs, so that one with many responses weighs no more; prompts without a pair
    have no part.

    Args:
      scores: [P, K] float; the higher the better.
      ranks: [P, K] int; 1 the best; 0 where there is no completion.
      lengths: [P, K] int, tokens.
    Returns:
      `loss`: -log sigmoid of the difference of scores, better less worse, nats. `accuracy`: share
      of pairs of which the better one has the higher score; an equal score is half right.
      `accuracy_low`, `accuracy_high`: its 95% interval, with the prompt as the unit. `margin`: the
      difference of scores. `ece`: expected calibration error, 0 to 1: how far the probability of
      the likelier answer, sigmoid(|difference|), is from the share that is right, in `NUM_BINS`
      bins of equal width from 1/2 to 1. `accuracy_by_length/NAME` of `LENGTH_RATIOS`, over the
      pairs of such lengths, nan where there are none. `num_pairs`. All are nan if there is no pair.
    Source: ECE: arXiv:1706.04599 sec. 2.
    """
    there = ranks > 0
    is_pair = there[:, :, None] & there[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
    num = is_pair.sum((1, 2))
    prompt, better, worse = np.nonzero(is_pair)
    if not len(prompt):
        names = ("loss", "accuracy", "accuracy_low", "accuracy_high", "margin", "ece")
        names += tuple(f"accuracy_by_length/{name}" for name in LENGTH_RATIOS)
        return dict.fromkeys(names, np.nan) | {"num_pairs": 0.0}
    margin = np.subtract(scores[prompt, better], scores[prompt, worse], dtype=np.float64)
    is_right = np.where(margin == 0, 0.5, margin > 0)
    weight = 1 / (num[prompt] * np.count_nonzero(num))  # Adds up to 1.
    values = np.bincount(prompt, is_right, minlength=len(num))[num > 0] / num[num > 0]
    low, high = clustered_interval(values, int(num.max()))
    ratio = lengths[prompt, better] / lengths[prompt, worse]
    found = {
        "loss": np.sum(weight * np.logaddexp(0, -margin)),
        "accuracy": values.mean(),
        "accuracy_low": low,
        "accuracy_high": high,
        "margin": np.sum(weight * margin),
        "ece": calibration_error(margin, is_right, weight),
        "num_pairs": len(prompt),
    }
    for name, (start, stop) in LENGTH_RATIOS.items():
        chosen = (start <= ratio) & (ratio < stop)
        total = weight[chosen].sum()
        mean = np.sum(weight[chosen] * is_right[chosen]) / total if total else np.nan
        found[f"accuracy_by_length/{name}"] = mean
    return {name: float(value) for name, value in found.items()}


def calibration_error(margin: np.ndarray, is_right: np.ndarray, weight: np.ndarray) -> float:
    """Sum over bins of |sum of weight (is_right - confidence)|; [N] each; see `pair_quality`."""
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    bins = np.minimum((2 * confidence - 1) * NUM_BINS, NUM_BINS - 1).astype(int)
    return float(np.abs(np.bincount(bins, weight * (is_right - confidence))).sum())
