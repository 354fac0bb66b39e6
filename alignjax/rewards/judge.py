"""Pairs and single responses -> verdicts of a judge, whatever it is that answers its questions.

A judge is asked about one question at a time, with options of which one is the verdict. What
answers is a function from questions to answers (`Ask`): an endpoint (`judge_http`), a model of our
own (`phases.judge_model`) or a function of the user's (`judge_function`).

    judge = Judge(ask, config, load_templates(config, specials))
    judge.pairwise([Pair(prompt, first, second)])  # the probability that first is better
    judge.pointwise([Item(prompt, response)])  # the expected score
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np

from alignjax.rewards.judge_answer import Ask, Question, probabilities
from alignjax.rewards.judge_config import JudgingConfig
from alignjax.rewards.judge_prompt import Template, shown
from alignjax.rewards.plain import to_json

Prompt = str | Sequence[Mapping[str, Any]]
"""Text, or the messages of a conversation."""


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt."""

    prompt: Prompt
    first: str
    second: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What else the template or the function may name, such as `question`: see `judge_prompt`."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the prompt's record, which a function is called with, too; to a template they are
    `record`, and data like the responses."""


@dataclass(frozen=True)
class Item:
    """One response to a prompt."""

    prompt: Prompt
    response: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    """Both as of `Pair`."""


class Verdict(NamedTuple):
    """What a judge said of a pair or of a single response."""

    value: float | None
    """Of a pair, the probability that the first response is the better one; of a single one, its
    expected score. None if there is no verdict: such a pair is left out, never guessed."""
    places: tuple[float, ...] = ()
    """Of a pair: how probable it was that what stood in the first place is better, in the order
    given and, if it was asked, in the other one."""
    num_unparsable: int = 0
    """Answers that could not be understood, those that were asked for again included."""
    error: str | None = None
    """Why there is no verdict."""
    is_failed: bool = False
    """True if no answer came at all, so that it may come another time; False if there is a verdict,
    or answers that could not be understood."""
    texts: tuple[str, ...] = ()
    """What the judge said, in the order of `places`."""


class Judge:
    """Asks, understands the answers, and asks again where it did not. Threads may share it."""

    def __init__(
        self,
        ask: Ask,
        config: JudgingConfig,
        templates: Mapping[str, Template] | None,
        *,
        identity: str = "",
        close: Callable[[], None] = lambda: None,
    ):
        """Args:
        ask: what answers, from a cache where it can (`judge_cache`).
        config: how the judge is asked and its answers are read.
        templates: of `load_templates`; None, for functions: a question's text is the JSON of its
          fields.
        identity: of what answers; see `judge_cache`.
        close: gives back what `ask` holds.
        """
        self.config, self.identity, self.close = config, identity, close
        self._ask, self._templates = ask, templates
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def template_digests(self) -> dict[str, str]:
        """SHA-256 of the templates, by the kind of question."""
        return {kind: one.digest for kind, one in (self._templates or {}).items()}

    def pairwise(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """The probability that the first response of each pair is the better one.

        Both orders are asked and averaged (unless `both_orders` is off), then clamped or hardened.
        A pair without an answer in one of them has no verdict.
        """
        orders = [pairs]
        if self.config.both_orders:
            orders.append([dataclasses.replace(p, first=p.second, second=p.first) for p in pairs])
        questions = [
            self._question("pairwise", pair, {"first": pair.first, "second": pair.second})
            for order in orders
            for pair in order
        ]
        with self._lock:
            said = self._answered(questions)
        return [self._pair_verdict(said[i :: len(pairs)]) for i in range(len(pairs))]

    def pointwise(self, items: Sequence[Item]) -> list[Verdict]:
        """The expected score of each response: sum over scores of probability x score.

        Source: RLAIF, arXiv:2309.00267 sec. 2.2.2 (there normalised; here it stays 1 to best).
        """
        scores = np.arange(1, self.config.best_score + 1)
        questions = [self._question("pointwise", i, {"response": i.response}) for i in items]
        with self._lock:
            said = self._answered(questions)
        return [
            Verdict(
                None if one.probs is None else float(one.probs @ scores),
                num_unparsable=one.num_unparsable, error=one.error, is_failed=one.is_failed,
                texts=(one.text,),
            )
            for one in said
        ]  # fmt: skip

    def _question(self, kind: str, asked: Pair | Item, judged: Mapping[str, str]) -> Question:
        config = self.config
        options = config.options
        if kind == "pointwise":
            options = tuple(str(score) for score in range(1, config.best_score + 1))
        cue = None if config.think is None else config.cue
        fields = {
            **({} if config.question is None else {"question": config.question}),
            **asked.variables,
            "prompt": shown(asked.prompt),
            **judged,
        }
        if self._templates is None:
            fields = {**asked.record, **fields}
            return Question(to_json(fields), options, fields)
        own = {"options": list(options), "best_score": config.best_score, "cue": cue}
        if asked.record:
            own["record"] = dict(asked.record)
        template = self._templates[kind]
        return Question(template.render(fields | own), options, fields, cue, template.digest)

    def _answered(self, questions: Sequence[Question]) -> list[_Said]:
        """What was said on each question, in order; what is not understood is asked again."""
        said: list[_Said | None] = [None] * len(questions)
        num_unparsable = [0] * len(questions)
        open_ = list(range(len(questions)))
        for attempt in range(self.config.num_attempts):
            again = []
            asked = [dataclasses.replace(questions[i], attempt=attempt) for i in open_]
            for chunk in self._ask(asked) if asked else ():
                for place, answer in chunk.items():
                    i = open_[place]
                    probs = None if answer.error else probabilities(asked[place], answer)
                    if probs is None and answer.error is None:
                        num_unparsable[i] += 1
                        again.append(i)
                        why = f"not understood {num_unparsable[i]} times: {answer.text[-80:]!r}"
                        said[i] = _Said(None, answer.text, num_unparsable[i], why, False)
                    else:
                        is_failed = answer.error is not None
                        said[i] = _Said(
                            probs, answer.text, num_unparsable[i], answer.error, is_failed
                        )
            open_ = sorted(again)
        missing = [i for i, one in enumerate(said) if one is None]
        assert not missing, f"no answer to questions {missing}"
        return said  # type: ignore[return-value]

    def _pair_verdict(self, said: Sequence[_Said]) -> Verdict:
        num_unparsable = sum(one.num_unparsable for one in said)
        texts = tuple(one.text for one in said)
        error = next((one.error for one in said if one.error is not None), None)
        if error is not None:
            is_failed = any(one.is_failed for one in said)
            return Verdict(None, (), num_unparsable, error, is_failed, texts)
        places = tuple(float(one.probs[0]) for one in said)  # type: ignore[index]
        # In this form equal places cancel exactly.
        value = places[0] if len(places) == 1 else 0.5 + (places[0] - places[1]) / 2
        return Verdict(self._label(value), places, num_unparsable, texts=texts)

    def _label(self, p: float) -> float:
        """Clamped or hardened, as the config says."""
        if self.config.limits is not None:
            low, high = self.config.limits
            return min(max(p, low), high)
        if self.config.harden is not None:
            return 0.5 if abs(p - 0.5) < self.config.harden else float(p > 0.5)
        return p


class _Said(NamedTuple):
    probs: np.ndarray | None
    text: str
    num_unparsable: int
    error: str | None
    is_failed: bool


class PlaceBias(NamedTuple):
    """What places do to a judge, over the pairs that were asked in both orders."""

    first_is_better: float | None
    """Mean probability of what stood first; 1/2 if places do not matter. None without a pair."""
    orders_agree: float | None
    """Share of pairs of which the same response is preferred both times, or neither is."""
    num_pairs: int


def place_bias(verdicts: Sequence[Verdict]) -> PlaceBias:
    """See `PlaceBias`."""
    places = np.array([v.places for v in verdicts if len(v.places) == 2]).reshape(-1, 2)
    if not len(places):
        return PlaceBias(None, None, 0)
    agree = np.sign(places[:, 0] - 0.5) == np.sign(0.5 - places[:, 1])
    return PlaceBias(float(places.mean()), float(agree.mean()), len(places))
