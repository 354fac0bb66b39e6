"""One look for every picture: quiet axes, few colours, text large enough to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#2563a8", "#d97706", "#15803d", "#b91c1c", "#6b7280"
COLOURS = (BLUE, ORANGE, GREEN, RED, "#7c3aed", "#0891b2")
INK, FAINT = "#1f2937", "#e5e7eb"


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, apart from pyplot: no global state, no display."""
    result = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(result)
    return result


def tidy(axes: Axes, title: str) -> None:
    """Two spines, a faint grid, the title at the left."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.tick_params(colors="#4b5563", labelsize=9, length=3)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float) -> None:
    """Names lines at their last points, pushed apart so that no two names overlap.

    Args:
      axes: with its final limits.
      ends: x, y, text and colour of each.
      gap: smallest distance between two names, as a share of the axes' height.
    """
    low, high = axes.get_ylim()
    floor = -1.0
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        height = max((y - low) / (high - low), floor + gap)
        floor = height
        axes.annotate(
            text, (x, low + height * (high - low)), xytext=(6, 0), textcoords="offset points",
            color=colour, fontsize=9, fontweight="bold", va="center", annotation_clip=False,
        )  # fmt: skip


def save(picture: Figure, path: str | Path, **options: Any) -> None:
    """Writes a PNG; makes its directory."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=130, **options)
