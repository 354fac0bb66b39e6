"""`Preference` -> `Comparison`: completions of one prompt that a loss takes together.

A view of preferences is a source; its places, 0 to `len`, stay the same from run to run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from alignjax.core.errors import UserError
from alignjax.data.preferences import Preference
from alignjax.data.sources import Source


@dataclass(frozen=True)
class Comparison:
    """One element: a prompt with completions that are judged together."""

    prompt: str | list[dict[str, Any]]
    responses: list[str]
    ranks: tuple[int, ...]
    """One for each response: 1 the best; equal ones are not compared."""
    margin: float = 0.0
    """Of a pair: how much better the first is, in reward units; of one with a probability that the
    first is the better one, this."""
    label: bool | None = None
    """Of a single response: whether it is good."""


class View:
    """A source of `Comparison`, made of the preferences when they are asked for.

    Attributes:
      num_responses: K, the most that one of them has.
      num_left_out: preferences that say nothing of the kind that the view shows.
    """

    def __init__(
        self, preferences: Source, expand: Callable[[Preference], list[Comparison]], remedy: str
    ):
        """Reads all preferences once.

        Args:
          preferences: of `Preference`.
          expand: the comparisons that one makes.
          remedy: what is said if none makes any.
        Raises:
          UserError: if none does, or `expand` refuses one; its place is named.
        """
        self._preferences, self._expand = preferences, expand
        places: list[tuple[int, int]] = []  # Preference, number of the comparison among its own.
        self.num_responses = self.num_left_out = 0
        for index in range(len(preferences)):
            try:
                found = expand(preferences[index])
            except UserError as error:
                raise UserError(f"{preferences.where(index)}: {error}") from error
            places += [(index, number) for number in range(len(found))]
            self.num_left_out += not found
            self.num_responses = max(self.num_responses, *(len(c.responses) for c in found), 0)
        if not places:
            raise UserError(
                f"data: {preferences.where(0)} and the {len(preferences) - 1} others: {remedy}"
            )
        self._places = np.array(places, np.int32)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Comparison:
        of, number = self._places[index]
        return self._expand(self._preferences[int(of)])[number]

    def where(self, index: int) -> str:
        return self._preferences.where(int(self._places[index, 0]))


def rankings(preferences: Source) -> View:
    """All judged responses of a prompt in one comparison; each of `choices` is one of two.

    What says nothing on which of two responses is better, such as nothing but ties, is left out.
    """

    def expand(preference: Preference) -> list[Comparison]:
        return [one for one in _ranked(preference) if len(set(one.ranks)) > 1]

    return View(preferences, expand, "none says of two responses which is better")


def pairs(
    preferences: Source,
    which: Literal["all", "best_worst"] = "all",
    *,
    margin: str | None = None,
    margin_scale: float = 1.0,
    prob: str | None = None,
    ties: bool = False,
) -> View:
    """Comparisons of two responses, the better one first.

    Args:
      preferences: a source of `Preference`.
      which: all pairs of unlike rank; or the best response against the worst, and where several
        are, the first best against the last worst.
      margin: of `bradley_terry_margin`: "scores", the difference of both scores; or the name of a
        field of the records that holds a number; None: 0.
      margin_scale: what that is multiplied by.
      prob: instead of a margin, the name of the field that says how likely it is, 0 to 1, that the
        better one is better.
      ties: of "all": two responses of one rank are a pair, too, as they stand, with 1/2.
    Raises:
      UserError: if no preference has a pair, or one lacks its margin or probability.
    """

    def expand(preference: Preference) -> list[Comparison]:
        found = []
        for ranking in _ranked(preference):
            for i, j in _of_unlike_rank(ranking.ranks, which):
                pair = [ranking.responses[i], ranking.responses[j]]
                value = 0.0 if margin is None else margin_scale * _margin(preference, pair, margin)
                value = value if prob is None else _prob(preference, prob)
                found.append(Comparison(preference.prompt, pair, (1, 2), value))
            for i, j in _of_one_rank(ranking.ranks) if ties else ():
                pair = [ranking.responses[i], ranking.responses[j]]
                found.append(Comparison(preference.prompt, pair, (1, 1), 0.5))
        return found

    return View(preferences, expand, "none says of two responses which is better")


def unpaired(preferences: Source) -> View:
    """Single responses with a label.

    Of other judgements the best response (each better one of `choices`) counts as good and the
    worst as bad; those in between, and ties of all, say neither.
    """

    def expand(preference: Preference) -> list[Comparison]:
        return [
            Comparison(preference.prompt, [response], (1,), label=label)
            for response, label in dict.fromkeys(labelled(preference))
        ]

    return View(preferences, expand, "none says of a response whether it is good")


def all_responses(preferences: Source) -> View:
    """All responses of a prompt in one comparison, whatever was said of them: all of rank 1."""

    def expand(preference: Preference) -> list[Comparison]:
        ranks = (1,) * len(preference.responses)
        return [Comparison(preference.prompt, preference.responses, ranks)]

    return View(preferences, expand, "none has a response")


def ranked_pairs(preference: Preference) -> list[tuple[str, str]]:
    """All two responses of unlike rank, the better one first."""
    return [
        (ranking.responses[i], ranking.responses[j])
        for ranking in _ranked(preference)
        for i, j in _of_unlike_rank(ranking.ranks, "all")
    ]


def _ranked(preference: Preference) -> Iterator[Comparison]:
    """The rankings that a preference makes, without the responses that nobody judged."""
    if preference.choices is not None:
        for pair in preference.choices:
            responses = [preference.responses[i] for i in pair]
            yield Comparison(preference.prompt, responses, (1, 2))
        return
    values: Sequence[float | None]
    if preference.ranks is not None:
        values = [-rank for rank in preference.ranks]
    else:
        values = preference.labels if preference.scores is None else preference.scores  # type: ignore[assignment]
    judged = [i for i, value in enumerate(values) if value is not None]
    order = sorted({values[i] for i in judged}, reverse=True)  # type: ignore[type-var]
    yield Comparison(
        preference.prompt,
        [preference.responses[i] for i in judged],
        tuple(1 + order.index(values[i]) for i in judged),
    )


def _of_unlike_rank(ranks: Sequence[int], which: str) -> list[tuple[int, int]]:
    """Places of (better, worse)."""
    places = range(len(ranks))
    if which == "all":
        return [(i, j) for i, j in itertools.product(places, places) if ranks[i] < ranks[j]]
    best = min(places, key=lambda i: ranks[i])
    worst = max(reversed(places), key=lambda i: ranks[i])
    return [(best, worst)] if ranks[best] < ranks[worst] else []


def _of_one_rank(ranks: Sequence[int]) -> list[tuple[int, int]]:
    return [(i, j) for i, j in itertools.combinations(range(len(ranks)), 2) if ranks[i] == ranks[j]]


def labelled(preference: Preference) -> Iterator[tuple[str, bool]]:
    """Responses of which it is said whether they are good; see `unpaired`."""
    if preference.labels is not None:
        for response, label in zip(preference.responses, preference.labels, strict=True):
            if label is not None:
                yield response, label
        return
    for ranking in _ranked(preference):
        best, worst = min(ranking.ranks), max(ranking.ranks)
        for response, rank in zip(ranking.responses, ranking.ranks, strict=True):
            if best < worst and rank in (best, worst):
                yield response, rank == best


def _margin(preference: Preference, pair: Sequence[str], name: str) -> float:
    if name != "scores":
        return _number(preference, name, "margin")
    if preference.scores is None:
        raise UserError('margin: "scores" needs records that are judged by scores')
    better, worse = (preference.scores[preference.responses.index(text)] for text in pair)
    assert better is not None and worse is not None, "only what is judged is ranked"
    return better - worse


def _prob(preference: Preference, name: str) -> float:
    value = _number(preference, name, "probability")
    if not 0 <= value <= 1:
        raise UserError(f"{name}: expected a probability, 0 to 1, came {value}")
    return value


def _number(preference: Preference, name: str, what: str) -> float:
    value = preference.fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        there = ", ".join(map(repr, preference.fields)) or "none"
        raise UserError(
            f"{what}: expected a number in field {name!r}, came {value!r} (fields there: {there})"
        )
    return float(value)
