"""Judgements by others on the responses that a judge ranked -> how far the judge agrees with each.

Two records are of the same task if prompt and responses are equal, in whatever order the responses
stand.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from alignjax.core.errors import UserError
from alignjax.core.intervals import clustered_interval
from alignjax.data import open_source
from alignjax.data.native import from_native
from alignjax.data.preferences import JUDGEMENTS, Preference, check
from alignjax.web import krippendorff_alpha

NOBODY = "no annotator"
"""Who judged a record that does not say it, such as rewards."""
Orders = Mapping[str, float]
"""Response -> how good it is: only the order counts."""


def same_task(prompt: Any, responses: Iterable[str]) -> str:
    """Equal for records of the same task."""
    return json.dumps([prompt, sorted(responses)], sort_keys=True)


def judgements_of(spec: str | list[str], *, named: Any) -> dict[str, dict[str, Orders]]:
    """Task -> annotator -> their order, of records of preferences; the last one where several are.

    Args:
      spec: source or sources of native records; those without a judgement are left out.
      named: if true, the user asked for these judgements, so that there have to be some.
    Raises:
      UserError: naming the place of a record that is wrong.
    """
    source = open_source(spec)
    found: dict[str, dict[str, Orders]] = defaultdict(dict)
    for i in range(len(source)):
        record = source[i]
        if all(record.get(name) is None for name in JUDGEMENTS):
            continue
        try:
            preference = from_native(record)
            check(preference)
        except UserError as error:
            raise UserError(f"{source.where(i)}: {error}") from error
        if (order := order_of(preference)) is not None:
            task = same_task(preference.prompt, preference.responses)
            found[task][preference.annotator or NOBODY] = order
    if named and not found:
        raise UserError(f"compare_with: {spec}: no record has {' or '.join(JUDGEMENTS)}")
    return found


def order_of(preference: Preference) -> dict[str, float] | None:
    """Of each response that was judged; None of choices, which are no order of all."""
    if preference.choices is not None:
        return None
    if preference.ranks is not None:
        values: Sequence[float | None] = [-rank for rank in preference.ranks]
    else:
        values = preference.scores or preference.labels or []  # type: ignore[assignment]
    pairs = zip(preference.responses, values, strict=True)
    return {text: float(value) for text, value in pairs if value is not None}


def agreement_with(
    others: Mapping[str, Mapping[str, Orders]], records: Iterable[dict[str, Any]], judge: str
) -> dict[str, dict[str, Any]]:
    """Of each other annotator what they and the judge have in common.

    Args:
      others: of `judgements_of`.
      records: native records of the judge.
      judge: its annotator id, of which nothing is compared with itself.
    Returns:
      Annotator -> `num_prompts` that both judged; `num_pairs`, those that both have an order of;
      `same_order`, the share of them that is the same, by prompt, with its 95% interval (`low`,
      `high`; the prompt is the unit); and `alpha`, Krippendorff's, of both rankings, null where
      there is none.
    """
    pairs: dict[str, list[list[bool]]] = defaultdict(list)
    units: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for record in records:
        own = order_of(from_native(record))
        assert own is not None
        for name, theirs in others.get(
            same_task(record["prompt"], record["responses"]), {}
        ).items():
            if name == judge:
                continue
            both = [text for text in record["responses"] if text in theirs]
            units[name] += zip(_ranked(own, both), _ranked(theirs, both), strict=True)
            signs = [
                (np.sign(own[x] - own[y]), np.sign(theirs[x] - theirs[y]))
                for x, y in itertools.combinations(both, 2)
            ]
            pairs[name].append([a == b for a, b in signs if a != 0 and b != 0])
    return {name: _figures(pairs[name], units[name]) for name in sorted(pairs)}


def _ranked(order: Orders, texts: Sequence[str]) -> list[int]:
    levels = sorted({order[text] for text in texts}, reverse=True)
    return [1 + levels.index(order[text]) for text in texts]


def _figures(pairs: list[list[bool]], units: list[tuple[int, int]]) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "num_prompts": len(pairs),
        "num_pairs": sum(map(len, pairs)),
        "alpha": krippendorff_alpha(units),
    }
    means = np.array([np.mean(one) for one in pairs if one])
    if len(means):
        low, high = clustered_interval(means, max(map(len, pairs)))
        figures |= {"same_order": float(means.mean()), "low": low, "high": high}
    return figures
