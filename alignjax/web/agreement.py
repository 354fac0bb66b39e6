"""Rankings by several people -> Krippendorff's alpha: how far they agree beyond chance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Agreement(NamedTuple):
    """How far the people who ranked the same responses agree."""

    alpha: float | None
    """1 is full agreement, 0 that of chance, below 0 worse. None while nothing can be compared."""
    num_tasks: int
    """Tasks that at least two people ranked."""
    num_annotators: int
    """People who ranked at least one of those."""


def agreement(rankings: Iterable[tuple[int, str, Sequence[int]]]) -> Agreement:
    """Ordinal alpha, each response of a task being a unit and its rank the value.

    Args:
      rankings: (task, annotator, ranks), the ranks 1 (best) and up, one for each response of the
        task in the task's own order; at most one ranking of a task by a person.
    """
    by_task: dict[int, list[tuple[str, Sequence[int]]]] = defaultdict(list)
    for task, annotator, ranks in rankings:
        by_task[task].append((annotator, ranks))
    shared = [found for found in by_task.values() if len(found) > 1]
    units = [unit for found in shared for unit in zip(*(r for _, r in found), strict=True)]
    people = {annotator for found in shared for annotator, _ in found}
    return Agreement(krippendorff_alpha(units), len(shared), len(people))


def krippendorff_alpha(units: Sequence[Sequence[int]]) -> float | None:
    """alpha = 1 - D_observed / D_expected with the ordinal difference.

    With n_v the number of values v, the ordinal difference of the values c < k is
    (n_c / 2 + n_(c+1) + ... + n_(k-1) + n_k / 2)^2.

    Args:
      units: of each unit the values that were given to it, by however many people.
    Returns:
      alpha, at most 1; None if no unit has two values, or if all values are the same, where
      chance would agree as well and nothing is learned.
    Source: K. Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), sec. D and E.
    """
    pairable = [np.asarray(unit, np.int64) for unit in units if len(unit) > 1]
    if not pairable:
        return None
    values = np.unique(np.concatenate(pairable))
    coincidences = np.zeros((len(values), len(values)))
    for unit in pairable:
        counts = (unit[:, None] == values).sum(0)
        pairs = np.outer(counts, counts) - np.diag(counts)
        coincidences += pairs / (len(unit) - 1)
    totals = coincidences.sum(0)
    middle = np.cumsum(totals) - totals / 2
    differences = (middle[:, None] - middle) ** 2
    expected = (np.outer(totals, totals) * differences).sum() / (totals.sum() - 1)
    if expected == 0:
        return None
    return float(1 - (coincidences * differences).sum() / expected)
