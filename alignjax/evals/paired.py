"""Two evaluations of the same problems -> their differences, with intervals and p-values.

They are read from what `alignjax eval` wrote. Those that are not of the same problems, prompts,
sampling and scoring are refused: a difference would not be one of the models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignjax.core import digest
from alignjax.core.config import diff
from alignjax.core.errors import UserError
from alignjax.core.intervals import bootstrap_interval, ends_as_json
from alignjax.core.permutation import sign_flip
from alignjax.evals.provenance import COMPARED


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation wrote."""

    path: Path
    provenance: Mapping[str, Any]
    problems: Sequence[Mapping[str, Any]]
    """Of each problem its digest and, by name, its values; null where it has none."""


@dataclass(frozen=True)
class Paired:
    """One figure of two models on the same problems."""

    a: float
    b: float
    low: float
    high: float
    """Of a - b: 95%, by the bootstrap over problems."""
    p_value: float
    """Two-sided, by flipping signs: how often chance alone would make a difference as large."""
    is_exact: bool
    """The p-value is counted; else 20,000 draws estimate it."""
    num_problems: int
    """With a value of both."""
    num_higher: int
    num_lower: int
    """Problems on which a is above b, and below."""

    def as_json(self) -> dict[str, Any]:
        return {
            "a": self.a,
            "b": self.b,
            "difference": {"mean": self.a - self.b, **ends_as_json((self.low, self.high))},
            "p_value": self.p_value,
            "p_value_is_exact": self.is_exact,
            "num_problems": self.num_problems,
            "num_higher": self.num_higher,
            "num_lower": self.num_lower,
        }

    def __str__(self) -> str:
        p = f"p = {self.p_value:.3g}" if self.p_value >= 1e-4 else f"p = {self.p_value:.1e}"
        return (
            f"{self.a:.4g} against {self.b:.4g}: {self.a - self.b:+.4g} "
            f"[{self.low:+.4g}, {self.high:+.4g}], {p} ({self.num_problems} problems: "
            f"{self.num_higher} higher, {self.num_lower} lower)"
        )


def read_evaluation(path: Path) -> Evaluation:
    """Reads eval.json and the problems beside it.

    Args:
      path: the file, its directory, or that of a run with eval/eval.json in it.
    Raises:
      UserError: if there is none, it is of an earlier version, or the two do not belong together.
    """
    places = [path / "eval.json", path / "eval" / "eval.json"] if path.is_dir() else [path]
    there = [place for place in places if place.is_file()]
    if not there:
        raise UserError(f"{path}: no {places[0].name}; expected what `alignjax eval` wrote")
    file = there[0]
    whole = _json(file, file.read_text(encoding="utf-8"))
    beside = file.with_name(f"{file.stem}_problems.jsonl")
    if not isinstance(whole, dict) or "provenance" not in whole or not beside.is_file():
        raise UserError(
            f"{file}: expected a provenance in it and {beside.name} beside it, so that it can be "
            "compared; evaluate again"
        )
    lines = [_json(beside, line) for line in beside.read_text(encoding="utf-8").splitlines()]
    if digest.of_value(lines) != whole["provenance"].get("problems", {}).get("digest"):
        raise UserError(
            f"{beside}: not what was written with {file.name}; evaluate again, or bring it back"
        )
    return Evaluation(file, whole["provenance"], lines)


def check_comparable(a: Evaluation, b: Evaluation) -> None:
    """Raises UserError, with what differs, unless both are of the same problems, prompts, sampling
    and scoring."""
    reasons = []
    for part in COMPARED:
        one, other = (dict(e.provenance.get(part, {})) for e in (a, b))
        if one.get("digest") == other.get("digest"):
            continue
        if part == "data":
            digests = [{line["problem"] for line in e.problems} for e in (a, b)]
            reasons.append(
                f"data: {len(digests[0] & digests[1])} problems in common, of "
                f"{len(a.problems)} and {len(b.problems)}: take the same ones, in one order"
            )
            continue
        changes = [c for c in diff(one, other) if not c.startswith("digest:")]
        reasons += [f"{part}.{change}" for change in changes] or [f"{part}: what its files hold"]
    if reasons:
        raise UserError(
            f"{a.path} and {b.path} do not compare; they differ in (first -> second):\n  "
            + "\n  ".join(reasons)
        )


def compare_evaluations(a: Evaluation, b: Evaluation) -> dict[str, Paired]:
    """Every figure that both have of the problems, by name.

    Raises:
      UserError: as `check_comparable`, or if they have no figure in common.
    """
    check_comparable(a, b)
    names = dict.fromkeys(name for line in a.problems for name in line if name != "problem")
    common = [name for name in names if any(name in line for line in b.problems)]
    samples = int(a.provenance["sampling"].get("num_samples", 1))
    found = {name: paired(_values(a, name), _values(b, name), samples) for name in common}
    known = {name: one for name, one in found.items() if one is not None}
    if not known:
        raise UserError(f"{a.path} and {b.path} have no figure in common")
    return known


def paired(a: np.ndarray, b: np.ndarray, num_samples: int) -> Paired | None:
    """One figure of both, or None if no problem has it from both.

    Args:
      a, b: [P] float64; nan where there is none.
      num_samples: that each value is a mean of, if it is one of ones and zeros.
    """
    known = np.isfinite(a) & np.isfinite(b)
    if not known.any():
        return None
    a, b = a[known], b[known]
    difference = a - b
    low, high = bootstrap_interval(difference)
    p_value, is_exact = sign_flip(difference, num_samples)
    return Paired(
        float(a.mean()),
        float(b.mean()),
        low,
        high,
        p_value,
        is_exact,
        num_problems=len(a),
        num_higher=int((difference > 0).sum()),
        num_lower=int((difference < 0).sum()),
    )


def _values(evaluation: Evaluation, name: str) -> np.ndarray:
    values = [line.get(name) for line in evaluation.problems]
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: broken JSON: {error.msg} (line {error.lineno})") from error
