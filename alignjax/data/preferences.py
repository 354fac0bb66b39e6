"""Records of what people preferred -> `Preference`, every one checked before anything is trained.

How records spell it is a matter of `data.layouts`.
"""

from __future__ import annotations

import datetime
import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from alignjax.core.errors import UserError
from alignjax.data.schema import check_messages, kind
from alignjax.data.sources import Record, Source

JUDGEMENTS = ("ranks", "choices", "labels", "scores")
Faulty = Literal["error", "drop"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preference:
    """A prompt, its responses, and exactly one of four kinds of judgement on them."""

    prompt: str | list[dict[str, Any]]
    """Text, or the messages of a conversation that the assistant is to go on with."""
    responses: list[str]
    """K of them: at least 2; with labels at least 1. None empty, no two equal."""
    ranks: list[int] | None = None
    """One for each response: 1 the best; equal ones are a tie."""
    choices: list[list[int]] | None = None
    """Pairs [better, worse] of places in `responses`, from 0."""
    labels: list[bool | None] | None = None
    """One for each response: whether it is good; None where nobody said."""
    scores: list[float | None] | None = None
    """One for each response: the higher the better; None where nobody said."""
    annotator: str | None = None
    time: str | None = None
    """ISO 8601."""
    comment: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The other keys of the record."""


OPTIONAL = ("annotator", "time", "comment")
Reader = Callable[[Record], Preference]


class Preferences:
    """A source of `Preference`; every record was read once, and found right, when it was made.

    Attributes:
      num_faulty: records that were left out, with `faulty="drop"`.
    """

    def __init__(
        self,
        source: Source,
        read: Reader,
        *,
        annotators: Collection[str] | None = None,
        faulty: Faulty = "error",
    ):
        """Checks all records.

        Args:
          source: of records.
          read: record -> `Preference`, such as `data.native.from_native`.
          annotators: who may have judged; None: anybody.
          faulty: whether a record that is wrong is an error, or left out, counted and logged.
        Raises:
          UserError: on the first record that is wrong, naming its place and the remedy; with "drop"
            if all are.
        """
        self._source, self._read = source, read
        self._annotators = annotators
        self._kept: list[int] = []
        first: UserError | None = None
        for index in range(len(source)):
            try:
                self._at(index)
            except UserError as error:
                if faulty == "error":
                    raise
                log.info("%s; dropped", error)
                first = first or error
                continue
            self._kept.append(index)
        self.num_faulty = len(source) - len(self._kept)
        if not self._kept:
            raise UserError(
                f"data: every one of {len(source)} records is faulty, the first: {first}"
            )

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Preference:
        return self._at(self._kept[index])

    def where(self, index: int) -> str:
        return self._source.where(self._kept[index])

    def _at(self, index: int) -> Preference:
        try:
            found = self._read(self._source[index])
            check(found, self._annotators)
        except UserError as error:
            raise UserError(f"{self._source.where(index)}: {error}") from error
        return found


def check(preference: Preference, annotators: Collection[str] | None = None) -> None:
    """Raises UserError, without the place of the record, unless everything is as `Preference` says.

    Args:
      annotators: who may have judged; None: anybody.
    """
    _check_prompt(preference.prompt)
    _check_responses(preference)
    given = [name for name in JUDGEMENTS if getattr(preference, name) is not None]
    if len(given) != 1:
        raise UserError(
            f"expected exactly one judgement of {', '.join(JUDGEMENTS)}, came "
            f"{' and '.join(given) or 'none'}; a record holds one: make two of it, or take one out"
        )
    _CHECKS[given[0]](getattr(preference, given[0]), len(preference.responses))
    for name in OPTIONAL:
        value = getattr(preference, name)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{name}: expected text, came {kind(value)}")
    if preference.time is not None:
        _check_time(preference.time)
    if annotators is not None and preference.annotator not in annotators:
        raise UserError(
            f"annotator: {preference.annotator!r} is none of {', '.join(map(repr, annotators))}; "
            "add the id to data.annotators, or correct the record"
        )


def _check_prompt(prompt: Any) -> None:
    if isinstance(prompt, list):
        check_messages(prompt, "prompt")
    elif not isinstance(prompt, str):
        raise UserError(f"prompt: expected text or a list of messages, came {kind(prompt)}")


def _check_responses(preference: Preference) -> None:
    responses = preference.responses
    if not isinstance(responses, list):
        raise UserError(f"responses: expected a list of texts, came {kind(responses)}")
    least = 1 if preference.labels is not None else 2
    if len(responses) < least:
        raise UserError(
            f"responses: {len(responses)} of them; expected at least {least}: one alone is better "
            "than none other. Add another, or judge it by labels"
        )
    seen: dict[str, int] = {}
    for i, response in enumerate(responses):
        if not isinstance(response, str):
            raise UserError(f"responses[{i}]: expected text, came {kind(response)}")
        if not response.strip():
            raise UserError(f"responses[{i}]: empty, so there is nothing to train; take it out")
        if response in seen:
            raise UserError(
                f"responses[{seen[response]}] and responses[{i}] are equal, so neither is better; "
                "take one out"
            )
        seen[response] = i


def _check_length(name: str, values: Any, num: int) -> None:
    if not isinstance(values, list):
        raise UserError(f"{name}: expected a list, came {kind(values)}")
    if len(values) != num:
        raise UserError(f"{name}: {len(values)} values for {num} responses; give one for each")


def _check_ranks(ranks: Any, num: int) -> None:
    _check_length("ranks", ranks, num)
    for i, rank in enumerate(ranks):
        if type(rank) is not int or rank < 1:
            raise UserError(f"ranks[{i}]: expected a whole number from 1, came {kind(rank)}")


def _check_choices(choices: Any, num: int) -> None:
    if not isinstance(choices, list) or not choices:
        raise UserError(f"choices: expected a list of [better, worse], came {kind(choices)}")
    for i, pair in enumerate(choices):
        if not isinstance(pair, list) or len(pair) != 2 or any(type(x) is not int for x in pair):
            raise UserError(f"choices[{i}]: expected [better, worse], came {kind(pair)}")
        if any(not 0 <= x < num for x in pair):
            raise UserError(
                f"choices[{i}]: {pair} names a response that is not there; with {num} responses "
                f"expected 0 to {num - 1}"
            )
        if pair[0] == pair[1]:
            raise UserError(f"choices[{i}]: {pair} compares a response with itself; take it out")


def _check_labels(labels: Any, num: int) -> None:
    _check_length("labels", labels, num)
    for i, label in enumerate(labels):
        if label is not None and not isinstance(label, bool):
            raise UserError(f"labels[{i}]: expected true, false or null, came {kind(label)}")
    _check_some("labels", labels)


def _check_scores(scores: Any, num: int) -> None:
    _check_length("scores", scores, num)
    for i, score in enumerate(scores):
        if score is None:
            continue
        is_number = isinstance(score, int | float) and not isinstance(score, bool)
        if not is_number or not math.isfinite(score):
            raise UserError(
                f"scores[{i}]: expected a finite number, or null where nobody judged, came "
                f"{kind(score)}"
            )
    _check_some("scores", scores)


def _check_some(name: str, values: list[Any]) -> None:
    if all(value is None for value in values):
        raise UserError(f"{name}: all are null, so nothing is judged; take the record out")


_CHECKS: dict[str, Callable[[Any, int], None]] = {
    "ranks": _check_ranks,
    "choices": _check_choices,
    "labels": _check_labels,
    "scores": _check_scores,
}


def _check_time(time: str) -> None:
    try:
        datetime.datetime.fromisoformat(time)
    except ValueError as error:
        raise UserError(
            f"time: expected ISO 8601, such as 2026-11-25T01:02:03Z, came {kind(time)}"
        ) from error
