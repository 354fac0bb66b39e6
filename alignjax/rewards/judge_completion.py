"""The reply of a chat completion -> the answer in it, with log-probs of the options where given."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from alignjax.rewards.judge_answer import WRAPPING, Answer, Question, Usage, spoken


class ReplyError(ValueError):
    """A reply that is no chat completion."""


def read_reply(body: str, question: Question) -> Answer:
    """Args: body: JSON of a reply with status 200.

    Raises:
      ReplyError: if it is something else.
    """
    try:
        reply = json.loads(body)
        choice = reply["choices"][0]
        text = choice["message"].get("content") or ""
        if not isinstance(text, str):
            raise TypeError(f"content is {type(text).__name__}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        shown = " ".join(body[:2000].split())[:100]
        what = f"{type(error).__name__}: {error}"
        raise ReplyError(f"the reply is no chat completion ({what}): {shown!r}") from None
    return Answer(text, _logps(choice, text, question), _usage(reply.get("usage")))


def _usage(found: Any) -> Usage:
    counts = []
    for name in ("prompt_tokens", "completion_tokens"):
        count = found.get(name) if isinstance(found, Mapping) else None
        counts.append(count if type(count) is int and count >= 0 else 0)
    return Usage(0, *counts)


def _logps(choice: Mapping[str, Any], text: str, question: Question) -> tuple[float, ...] | None:
    """Of each option the log of the summed probability of the tokens that are it, but for space and
    punctuation, in the place where the verdict stands; None if nothing is given there, or if the
    verdict is not one token."""
    place = spoken(text, question)
    if place is None:
        return None
    try:
        tokens = [_token(one) for one in choice["logprobs"]["content"]]
        at = _verdict_place([t for t, _ in tokens], question, question.options[place].strip())
        if at is None:
            return None
        listed = choice["logprobs"]["content"][at].get("top_logprobs") or []
        found = dict(_token(one) for one in listed)
        found.setdefault(*tokens[at])
    except (LookupError, TypeError, AttributeError, ValueError):
        return None  # None are given, or in another form.
    options = [option.strip() for option in question.options]
    chances = [0.0] * len(options)
    for token, logp in found.items():
        if (bare := token.strip(WRAPPING)) in options:
            chances[options.index(bare)] += math.exp(min(logp, 0.0))
    if chances[place] == 0:
        return None
    return tuple(math.log(p) if p > 0 else -math.inf for p in chances)


def _token(entry: Mapping[str, Any]) -> tuple[str, float]:
    token, logp = entry["token"], entry["logprob"]
    if not isinstance(token, str) or isinstance(logp, bool) or not isinstance(logp, int | float):
        raise TypeError("expected a text and a number")
    if math.isnan(logp):
        raise ValueError("a log-prob that is no number")
    return token, float(logp)


def _verdict_place(tokens: list[str], question: Question, verdict: str) -> int | None:
    """Which token the verdict is: the first one after the cue that holds more than space and
    punctuation; None if that is only a part of it."""
    start = 0
    if question.cue is not None:
        before, cue, _ = "".join(tokens).rpartition(question.cue)
        if not cue:
            return None
        start = len(before) + len(cue)
    end = 0
    for i, token in enumerate(tokens):
        end += len(token)
        bare = token.strip(WRAPPING)
        if end > start and bare:
            return i if bare == verdict else None
    return None
