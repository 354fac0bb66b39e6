"""The metrics of RL runs -> frontier.png: reward against KL from the reference, over training.

What a policy earns for how far it moves: the higher and the further to the left the better. Two
runs are compared at equal KL, not at equal steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alignjax.core.errors import UserError
from alignjax.report import style

Metrics = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl: a `step` and any of the metrics; None where not finite."""


class Way(NamedTuple):
    """Where a line of metrics has both, and how many tokens the KL is to be multiplied by."""

    reward: str
    kl: str
    length: str | None = None


WAYS = (
    Way("eval/sampled/reward", "eval/sampled/kl"),
    Way("reward", "objective/kl"),
    Way("reward", "kl", "completions/mean_length"),
)
"""The first one that a run has is taken: held-out prompts, those of ppo, and those of grpo, whose
KL is per token."""
BEST_OF_N = Way("eval/best_of_n/reward", "eval/best_of_n/kl")
_START, _END = 28, 64


class Frontier(NamedTuple):
    """Of one run."""

    steps: np.ndarray
    """[N], N at least 2."""
    kl: np.ndarray
    """[N] float64, nats per completion."""
    reward: np.ndarray
    """[N] float64."""
    is_held_out: bool
    best_of_n: tuple[float, float] | None
    """KL and reward of the best of n samples of the reference, where the run measured it."""


def frontier_of(metrics: Metrics) -> Frontier | None:
    """Reward and KL of a run, by step; None if no two lines have both."""
    for way in WAYS:
        points = _points(metrics, way)
        if len(points) >= 2:
            best = _points(metrics, BEST_OF_N)
            steps, kl, reward = np.array(points, np.float64).T
            return Frontier(
                steps, kl, reward,
                is_held_out=way.reward.startswith("eval/"),
                best_of_n=best[-1][1:] if best else None,
            )  # fmt: skip
    return None


def frontier_picture(runs: Mapping[str, Metrics], path: str | Path) -> None:
    """Draws the way of each run, from a small dot to a large one.

    Args:
      runs: metrics by the name to show.
      path: PNG file to write.
    Raises:
      UserError: if a run has not measured both.
    """
    found = {}
    for name, metrics in runs.items():
        line = frontier_of(metrics)
        if line is None:
            needed = " or ".join(f"{way.reward} and {way.kl}" for way in WAYS)
            raise UserError(
                f"{name}: no two lines of its metrics have {needed}; it needs a reward and a "
                "reference (kl_coef above 0)"
            )
        found[name] = line
    if not found:
        raise UserError(f"{path}: nothing to draw; name at least one run")
    picture = style.figure(7.2, 4.6)
    axes = picture.add_subplot(1, 1, 1)
    places = {line.is_held_out for line in found.values()}
    where = "held-out prompts" if places == {True} else "training prompts"
    title = "Reward against KL" + (f", {where}" if len(places) == 1 else "")
    style.tidy(axes, title)
    ends = []
    for colour, (name, line) in zip(style.COLOURS * 9, found.items(), strict=False):
        axes.plot(line.kl, line.reward, color=colour, lw=1.4, alpha=0.7, label=name)
        sizes = np.linspace(_START, _END, len(line.kl)) * (6 if len(line.kl) <= 40 else 1) / 6
        axes.scatter(line.kl, line.reward, s=sizes, color=colour, zorder=3)
        ends.append((float(line.kl[-1]), float(line.reward[-1]), name, colour))
        if line.best_of_n is not None:
            axes.scatter(*line.best_of_n, marker="*", s=130, color=colour, zorder=4)
            axes.annotate(
                "best of n", line.best_of_n, xytext=(8, 5), textcoords="offset points",
                fontsize=8, color=colour,
            )  # fmt: skip
    axes.set_xlabel("KL from the reference, nats per completion", fontsize=9, color=style.GREY)
    axes.set_ylabel("reward", fontsize=9, color=style.GREY)
    axes.margins(0.04, 0.08)
    style.label_ends(axes, ends, gap=0.06)
    picture.tight_layout(rect=(0, 0, 0.86, 1))
    style.save(picture, path)


def _points(metrics: Metrics, way: Way) -> list[tuple[float, float, float]]:
    """Step, KL per completion and reward of each line that has them."""
    names = [name for name in way if name is not None]
    return [
        (
            row["step"],
            row[way.kl] * (1.0 if way.length is None else row[way.length]),
            row[way.reward],
        )
        for row in metrics
        if all(row.get(name) is not None for name in names)
    ]
