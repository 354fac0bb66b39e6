"""The metrics of a run -> report.png: loss, reward, lengths and the step itself, over the steps."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter

from alignjax.core.errors import UserError
from alignjax.report import style

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Loss", ("loss", "eval/loss")),
    ("Reward", ("reward", "eval/reward", "rewards/*/mean")),
    (
        "Accuracy",
        ("mean_token_accuracy", "eval/mean_token_accuracy", "eval/*/accuracy", "accuracy",
         "eval/accuracy", "eval/accuracy_low", "eval/accuracy_high"),
    ),
    ("Accuracy, better one is", ("eval/accuracy_by_length/*",)),
    ("Scores", ("min_reward", "mean_reward", "max_reward")),
    ("Entropy, nats", ("entropy",)),
    ("Completion length, tokens", ("completions/mean_length", "completions/max_length")),
    (
        "Share",
        ("completions/clipped_ratio", "frac_reward_zero_std", "clip_ratio/region_mean"),
    ),
    ("Completions that reflect, share", ("rewards/reflects/mean", "eval/*/reflects")),
    ("Preference accuracy", ("rewards/accuracies", "eval/rewards/accuracies*")),
    ("Implicit rewards", ("rewards/chosen", "rewards/rejected")),
    ("Margin", ("margin", "rewards/margins", "reward_margin", "eval/rewards/margins")),
    ("Log-prob of a response, nats", ("logps/chosen", "logps/rejected")),
    ("KL to the reference, nats", ("kl",)),
    ("KL to the reference, nats per completion", ("objective/kl", "eval/sampled/kl")),
    ("KL coefficient", ("kl_coef",)),
    ("PPO: losses", ("loss/policy_avg", "loss/value_avg", "loss/ptx_avg")),
    ("PPO: clipped share", ("policy/clipfrac_avg", "val/clipfrac_avg")),
    ("Critic: explained variance", ("val/explained_variance",)),
    ("Sampler against trainer, nats", ("sampling/sampling_logp_difference/max",)),
    ("Gradient norm", ("grad_norm",)),
    ("Learning rate", ("learning_rate",)),
    ("Tokens per second", ("tokens_per_second",)),
)  # fmt: skip
"""Title and names of metrics (with wildcards) of each panel; a panel without data is left out."""

LOGARITHMIC = ("Gradient norm", "Sampler against trainer, nats")


def training_report(
    metrics: Sequence[Mapping[str, Any]], path: str | Path, title: str = ""
) -> None:
    """Draws what a run measured.

    Args:
      metrics: lines of metrics.jsonl: a `step` and any of the metrics; None where not finite.
      path: PNG file to write.
      title: name of the run.
    Raises:
      UserError: if no line holds a metric that has a panel.
    """
    names = list(dict.fromkeys(name for row in metrics for name in row))
    panels = []
    for heading, patterns in PANELS:
        wanted = dict.fromkeys(n for p in patterns for n in fnmatch.filter(names, p))
        lines = {name: _series(metrics, name) for name in wanted}
        lines = {name: line for name, line in lines.items() if len(line[0])}
        if lines:
            panels.append((heading, lines))
    if not panels:
        raise UserError(f"{path}: nothing to draw; the run has no metrics yet")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    picture = style.figure(4.4 * columns, 2.7 * rows + 0.5)
    for place, (heading, lines) in enumerate(panels, start=1):
        axes = picture.add_subplot(rows, columns, place)
        _draw(axes, heading, lines)
        if place > len(panels) - columns:
            axes.set_xlabel("step", fontsize=9, color=style.GREY)
    picture.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=style.INK)
    picture.tight_layout(rect=(0, 0, 1, 0.99 if title else 1.0), h_pad=1.6, w_pad=1.6)
    style.save(picture, path)


def _draw(axes: Axes, heading: str, lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    style.tidy(axes, heading)
    for colour, (name, (steps, values)) in zip(style.COLOURS * 4, lines.items(), strict=False):
        is_sparse = len(steps) <= 40
        if is_sparse:
            axes.plot(steps, values, color=colour, lw=1.8, marker="o", ms=3.5, label=name)
        else:
            axes.plot(steps, values, color=colour, lw=0.8, alpha=0.3)
            axes.plot(steps, smooth(values), color=colour, lw=1.8, label=name)
    if heading in LOGARITHMIC and all((v > 0).all() for _, v in lines.values()):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=True)
        if heading != "Loss" and all(v.min() >= 0 for _, v in lines.values()):
            top = max(v.max() for _, v in lines.values())
            axes.set_ylim(0, 1.1 * top or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(x=0.02)
    axes.legend(fontsize=8, framealpha=0.75, edgecolor="none", labelcolor="#374151")


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
    steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
    return steps, values


def smooth(values: np.ndarray) -> np.ndarray:
    """[N] -> [N]; the mean over a centred window of a twentieth of the run, shorter at the ends."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    start = np.maximum(np.arange(len(values)) - half, 0)
    end = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[end] - total[start]) / (end - start)
