"""What a judge is asked and what comes back -> the probabilities of the verdicts that there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Question:
    """What a judge is asked: an answer depends on nothing else, and is cached under all of it."""

    text: str
    """The rendered template."""
    options: tuple[str, ...]
    """The verdicts that there are; no two equal."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that `text` was made of; what a function is called with."""
    cue: str | None = None
    """With chain of thought: what stands before the verdict. None: the answer is the verdict."""
    template: str = ""
    """Digest of the template."""
    attempt: int = 0
    """Above 0 where an earlier answer could not be understood."""


@dataclass(frozen=True)
class Usage:
    """What was used up."""

    num_requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.num_requests + other.num_requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True)
class Answer:
    """What came back."""

    text: str = ""
    """What was said; with chain of thought, the thought too."""
    logps: tuple[float, ...] | None = None
    """One for each option, nats, not normalised over them; -inf where an option is not among those
    that were given. None where nothing is known but the text."""
    usage: Usage = Usage()
    error: str | None = None
    """Why there is no answer. Such a one is never cached."""


Ask = Callable[[Sequence[Question]], Iterator[Mapping[int, Answer]]]
"""Questions -> answers by their places, in any order, as they become known; each place once. Never
raises because of a question: its answer then has an error."""


def probabilities(question: Question, answer: Answer) -> np.ndarray | None:
    """[K] float64, of the options; None if the answer says none of them.

    From the log-probs, where there are any, normalised over the options; else 1 for the option that
    the text says.
    """
    if answer.logps is not None:
        logps = np.array(answer.logps, np.float64)
        if np.isfinite(logps).any():
            likely = np.exp(logps - logps.max())
            return likely / likely.sum()
        return None
    found = spoken(answer.text, question)
    return None if found is None else np.eye(len(question.options))[found]


WRAPPING = " \t\r\n*_`\"'.,:;()[]{}"


def spoken(text: str, question: Question) -> int | None:
    """Place of the option that a text says; None if it says none, or anything besides it.

    With a cue, the text after its last occurrence counts, up to the end of its line.
    """
    if question.cue is not None:
        _, cue, text = text.rpartition(question.cue)
        if not cue:
            return None
        text = text.strip().partition("\n")[0]
    text = text.strip(WRAPPING)
    places = [i for i, option in enumerate(question.options) if option.strip() == text]
    return places[0] if places else None
