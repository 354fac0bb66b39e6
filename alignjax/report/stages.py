"""The stages of a recipe -> one page: what each is like, in bars, over transcripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from alignjax.report import style
from alignjax.report.reasoning import Transcript, panel, wrap

COLUMNS = 3
"""Transcripts side by side."""


def stages_picture(
    path: str | Path,
    shares: Mapping[str, Mapping[str, float]],
    rows: Sequence[Sequence[Transcript]],
    *,
    title: str,
    subtitle: str = "",
) -> None:
    """Draws a panel of bars for each measurement, over rows of transcripts.

    Args:
      path: PNG file to write.
      shares: by the title of a measurement the share of each stage, in [0, 1], by its name; the
        same stages in each.
      rows: transcripts of one prompt, side by side, three at most; rows of them, below each other.
      title, subtitle: the headline and a line below it.
    """
    texts = [[wrap(t) for t in row[:COLUMNS]] for row in rows]
    heights = [0.75 + 0.164 * max(map(len, row)) for row in texts]
    height = 3.6 + sum(heights) + 0.15
    picture = style.figure(11, height)
    picture.text(0.03, 1 - 0.34 / height, title, fontsize=16, fontweight="bold", color=style.INK,
                 va="center")  # fmt: skip
    picture.text(0.03, 1 - 0.68 / height, subtitle, fontsize=10, color=style.GREY, va="center")
    width = 0.94 / len(shares)
    for i, (name, by_stage) in enumerate(shares.items()):
        place = (0.05 + i * width, 1 - 3.2 / height, width - 0.055, 1.85 / height)
        _bars(picture.add_axes(place), name, by_stage)
    top = 3.6
    for row, lines, inches in zip(rows, texts, heights, strict=True):
        for i, (transcript, text) in enumerate(zip(row, lines, strict=False)):
            low = 1 - (top + inches - 0.12) / height
            panel(picture, transcript, text, 0.03 + 0.318 * i, low, (inches - 0.12) / height)
        top += inches
    style.save(picture, path)


def _bars(axes: Axes, name: str, by_stage: Mapping[str, float]) -> None:
    style.tidy(axes, name)
    places = range(len(by_stage))
    axes.bar(places, list(by_stage.values()), color=style.BLUE, width=0.7)
    for x, share in zip(places, by_stage.values(), strict=True):
        axes.text(x, share + 0.02, f"{share:.0%}", ha="center", va="bottom", fontsize=7.5,
                  color=style.INK)  # fmt: skip
    axes.set_xticks(list(places), list(by_stage), rotation=35, ha="right")
    axes.set_ylim(0, 1.12)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
