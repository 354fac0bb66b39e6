"""A run that learns to reason -> one picture: accuracy beside length and more, over transcripts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from alignjax.report import style


@dataclass(frozen=True)
class Curve:
    """Measurements on held-out problems; all of the same length.

    Attributes:
      steps: iterations of reinforcement learning before each measurement.
      sampled: accuracy at temperature 1, in [0, 1].
      greedy: accuracy at temperature 0, in [0, 1]; may be empty.
      lengths: mean tokens of a completion; may be empty.
      reflects: share of completions that look back at themselves, in [0, 1]; may be empty.
    """

    steps: Sequence[float]
    sampled: Sequence[float]
    greedy: Sequence[float] = field(default=())
    lengths: Sequence[float] = field(default=())
    reflects: Sequence[float] = field(default=())


@dataclass(frozen=True)
class Transcript:
    """One problem as the model answered it at some point of the run."""

    title: str
    prompt: str
    completion: str
    is_correct: bool


def reasoning_picture(
    path: str | Path,
    think: Curve,
    control: Curve | None = None,
    transcripts: Sequence[Transcript] = (),
    *,
    title: str = "Reinforcement learning elicits reasoning",
    subtitle: str = "",
) -> None:
    """Draws accuracy beside completion length and, where it was measured, the share of completions
    that reflect, over transcripts of the same problem.

    Args:
      path: PNG file to write.
      think: the run that may think.
      control: the same training without thinking.
      transcripts: drawn side by side in this order, three at most.
      title, subtitle: the headline and a line below it.
    """
    wrapped = [wrap(t) for t in transcripts[:3]]
    text_height = 0.164 * max((len(lines) for lines in wrapped), default=0)
    height = 4.7 + (text_height + 1.05 if wrapped else 0)
    picture = style.figure(11, height)
    picture.text(0.03, 1 - 0.34 / height, title, fontsize=16, fontweight="bold", color=style.INK,
                 va="center")  # fmt: skip
    picture.text(0.03, 1 - 0.68 / height, subtitle, fontsize=10, color=style.GREY, va="center")

    bottom, top = 1 - 4.35 / height, 1 - 1.3 / height
    panels = [_accuracy, _lengths, *([_reflections] if len(think.reflects) else [])]
    for draw, (left, width) in zip(panels, _PLACES[len(panels)], strict=True):
        draw(picture.add_axes((left, bottom, width, top - bottom)), think, control)
    for i, (transcript, lines) in enumerate(zip(transcripts, wrapped, strict=False)):
        low = 0.22 / height
        panel(picture, transcript, lines, 0.03 + 0.318 * i, low, (text_height + 0.6) / height)
    style.save(picture, path)


_PLACES = {2: ((0.065, 0.355), (0.56, 0.325)), 3: ((0.055, 0.19), (0.385, 0.19), (0.715, 0.165))}
"""Left end and width of each panel, beside which its lines are named; shares of the width."""


def _accuracy(axes: Axes, think: Curve, control: Curve | None) -> None:
    style.tidy(axes, "Accuracy on held-out problems")
    ends = [_line(axes, think.steps, think.sampled, "sampled", style.BLUE)]
    if len(think.greedy):
        ends.append(_line(axes, think.steps, think.greedy, "greedy", style.GREEN, dashes=(4, 2)))
    if control is not None:
        ends.append(_line(axes, control.steps, control.sampled, "no thinking", style.GREY))
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _finish(axes, [(x, y, f"{text} {y:.0%}", colour) for x, y, text, colour in ends])


def _lengths(axes: Axes, think: Curve, control: Curve | None) -> None:
    style.tidy(axes, "Mean length of a completion, tokens")
    ends = []
    if len(think.lengths):
        ends.append(_line(axes, think.steps, think.lengths, "thinking", style.ORANGE))
    if control is not None and len(control.lengths):
        ends.append(_line(axes, control.steps, control.lengths, "no thinking", style.GREY))
    axes.set_ylim(0, 1.12 * max((max(c.lengths) for c in (think, control) if c and len(c.lengths)),
                                default=1.0))  # fmt: skip
    _finish(axes, [(x, y, f"{text} {y:.0f}", colour) for x, y, text, colour in ends])


def _reflections(axes: Axes, think: Curve, control: Curve | None) -> None:
    style.tidy(axes, "Completions that reflect")
    ends = [_line(axes, think.steps, think.reflects, "thinking", style.ORANGE)]
    if control is not None and len(control.reflects):
        ends.append(_line(axes, control.steps, control.reflects, "no thinking", style.GREY))
    axes.set_ylim(0, max(0.02, 1.12 * max(y for line in axes.lines for y in line.get_ydata())))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _finish(axes, [(x, y, f"{text} {y:.1%}", colour) for x, y, text, colour in ends])


def _line(
    axes: Axes, x: Sequence[float], y: Sequence[float], text: str, colour: str,
    dashes: tuple[int, int] | None = None,
) -> tuple[float, float, str, str]:  # fmt: skip
    (line,) = axes.plot(x, y, color=colour, lw=2.2, marker="o", ms=4, clip_on=False, zorder=3)
    if dashes:
        line.set_dashes(dashes)
    return x[-1], y[-1], text, colour


def _finish(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    axes.set_xlabel("iterations of reinforcement learning", fontsize=9, color=style.GREY)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlim(0, max((end[0] for end in ends), default=0) or 1)
    style.label_ends(axes, ends, gap=0.075)


WIDTH, HEIGHT = 39, 14
"""Characters on a line of a transcript, and its lines."""


def wrap(transcript: Transcript) -> list[str]:
    """Breaks after a tag, a `;` or a space where one is near, else in the middle of a word."""
    lines = []
    for text in (transcript.prompt + "\n" + transcript.completion).splitlines():
        line = ""
        for piece in re.findall(r"<[^<>]*>|[^<;\s]*[;\s]+|[^<;\s]+|<", text):
            if line and len(line) + len(piece.rstrip()) > WIDTH:
                lines.append(line)
                line = ""
            line += piece
            while len(line.rstrip()) > WIDTH:
                lines.append(line[:WIDTH])
                line = line[WIDTH:]
        lines.append(line)
    return lines if len(lines) <= HEIGHT else [*lines[: HEIGHT - 1], "..."]


def panel(
    picture: Figure, transcript: Transcript, lines: Sequence[str], x: float, y: float, height: float
) -> None:
    """Draws a transcript, broken into lines by `wrap`, in a box; x, y, height as shares of the
    figure."""
    colour = style.GREEN if transcript.is_correct else style.RED
    axes = picture.add_axes((x, y, 0.304, height))
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.axvline(0.0, color=colour, lw=5)
    axes.axhspan(0, 1, color="#f9fafb", zorder=0)
    verdict = "right" if transcript.is_correct else "wrong"
    inches = height * picture.get_figheight()
    axes.text(0.035, 1 - 0.2 / inches, transcript.title, fontsize=10, fontweight="bold",
              color=style.INK, va="center")  # fmt: skip
    axes.text(0.975, 1 - 0.2 / inches, verdict, fontsize=10, fontweight="bold", color=colour,
              va="center", ha="right")  # fmt: skip
    axes.text(0.035, 1 - 0.45 / inches, "\n".join(lines), family="DejaVu Sans Mono", fontsize=8.6,
              color=style.INK, va="top", linespacing=1.35, parse_math=False)  # fmt: skip
