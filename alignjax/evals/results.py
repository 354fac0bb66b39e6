"""What an evaluation found -> its files: the figures, the problems and the samples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignjax.core import digest
from alignjax.core.intervals import (
    bootstrap_interval,
    ends_as_json,
    mean_by_row,
    or_null,
    row_means,
)
from alignjax.evals.provenance import Provenance


def write_results(
    folder: Path,
    figures: Mapping[str, Any],
    samples: Iterable[Mapping[str, Any]],
    problems: Mapping[str, np.ndarray] | None = None,
    made_of: Provenance | None = None,
    *,
    name: str = "eval",
) -> None:
    """Writes NAME.json, NAME_samples.jsonl and, where the figures are to be compared with others,
    NAME_problems.jsonl.

    Args:
      folder: created if need be.
      figures: a JSON value.
      samples: JSON values, one for each line.
      problems: by the name of a figure [P], its value for each problem; nan where it has none.
      made_of: the digests of the same problems, and of all that the figures depend on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = dict(figures)
    if made_of is not None:
        lines = _problem_lines(made_of.problems, problems or {})
        whole["provenance"] = {**made_of.values, "problems": {"digest": digest.of_value(lines)}}
        _write_lines(folder / f"{name}_problems.jsonl", lines)
    text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
    with (folder / f"{name}.json").open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
    _write_lines(folder / f"{name}_samples.jsonl", samples)


def row_figure(values: np.ndarray) -> dict[str, Any]:
    """JSON of the mean over P problems, with both intervals.

    Args:
      values: [P, n] float; nan where there is none.
    """
    mean = mean_by_row(values).as_json()
    return {**mean, "bootstrap": ends_as_json(bootstrap_interval(row_means(values)))}


def _problem_lines(
    digests: Sequence[str], problems: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    return [
        {"problem": one, **{name: or_null(values[i]) for name, values in problems.items()}}
        for i, one in enumerate(digests)
    ]


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    # Half of a surrogate pair is no UTF-8; escaped, it is JSON.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
