"""Judges of the world of manners: they see the hidden reward through noise and a bias to a place.

In YAML, 10% of whose verdicts are wrong:

    judge: {function: alignjax.recipes.manners_judge.compare, args: {noise: 0.1}}
"""

from __future__ import annotations

from typing import Any

from alignjax.recipes.chance import Chance
from alignjax.recipes.manners import score

SURE, BIAS = 0.3, 0.15
"""How far from 1/2 its probabilities are for the better one, and for what stands first."""
WORST, BEST = -3.0, 3.0
"""Hidden rewards, in points, that get the lowest and the highest score."""


def compare(prompt: str, first: str, second: str, *, noise: float = 0.0, **fields: Any) -> float:
    """The probability that `first` is the better answer: 0.8 where it is, 0.2 where it is not, 1/2
    where both are worth the same, and 0.15 more for what stands first.

    Args:
      noise: the share of pairs that it takes for the other way round, whatever their order: the
        mean of both orders does not mend that, as it mends the bias.
    """
    worth = [sum(score(prompt, answer).values()) for answer in (first, second)]
    better = (worth[0] > worth[1]) - (worth[0] < worth[1])
    if Chance("\n".join([prompt, *sorted((first, second))])).chance(noise):
        better = -better
    return 0.5 + SURE * better + BIAS


def rate(prompt: str, response: str, *, noise: float = 0.0, **fields: Any) -> float:
    """A score from 1 to 10, which rises evenly with the hidden reward.

    Args:
      noise: the share of answers that get any score, each as likely.
    """
    draw = Chance(f"{prompt}\n{response}")
    if draw.chance(noise):
        return float(draw.integer(1, 10))
    worth = min(max(sum(score(prompt, response).values()), WORST), BEST)
    return 1.0 + 9.0 * (worth - WORST) / (BEST - WORST)
