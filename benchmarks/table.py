"""Figures of several seeds -> Markdown: a line for each model, means over seeds with the range."""

import statistics
from collections.abc import Mapping, Sequence


def cell(values: Sequence[float], form: str) -> str:
    """The mean, and the range where there are several.

    Args:
      form: of each figure, such as ".2f" or ".1%".
    """
    mean = f"{statistics.mean(values):{form}}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):{form}} to {max(values):{form}})"


def table(
    rows: Mapping[str, Sequence[Mapping[str, float]]],
    columns: Mapping[str, str],
    *,
    title: str = "model",
) -> str:
    """A table with a head.

    Args:
      rows: name -> the figures of each seed, by column.
      columns: figure -> form, of `cell`.
    """
    lines = [f"| {title} | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for name, found in rows.items():
        cells = [cell([one[key] for one in found], form) for key, form in columns.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
