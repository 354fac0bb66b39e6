"""Data, a text config and worked examples -> the prompts of an evaluation, each with its digest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from alignjax.core import digest
from alignjax.core.errors import UserError
from alignjax.core.types import Tokenizer
from alignjax.data import Example, Examples, Fields, Source, TextConfig, open_source, prompt_encoder
from alignjax.data.pipeline import Overlong, fits, located
from alignjax.data.schema import make_example
from alignjax.evals.arithmetic import Arithmetic, ArithmeticProblems
from alignjax.rewards.plain import to_json
from alignjax.rewards.rollout import Task


def open_problems(data: str | Sequence[str] | Arithmetic) -> Source:
    """Records that are stored, or problems that are made. Raises UserError as `open_source`."""
    return ArithmeticProblems(data) if isinstance(data, Arithmetic) else open_source(data)


class Problems:
    """Records as problems: checked when this is made, turned into prompts by `tasks`.

    A completion that `fields` name is for worked examples alone; problems need not have it.
    """

    def __init__(self, source: Source, fields: Fields, num_problems: int | None):
        """Raises UserError on the first record that is wrong."""
        self._source = source
        self._fields = fields.model_copy(update={"completion": None})
        self._examples = Examples(source, self._fields)
        self._num = min(num_problems or len(source), len(source))

    def tasks(
        self, encode: Callable[[Example], np.ndarray], *, max_tokens: int, overlong: Overlong
    ) -> dict[int, Task]:
        """Place of a record -> its task; without those that are too long, where they are dropped.

        Args:
          encode: of `prompt_encoder` or `shot_encoder`.
          max_tokens: of a prompt, at most.
        Raises:
          UserError: if a prompt is empty or too long, or all are.
        """

        def task(example: Example) -> Task:
            return Task(encode(example), example.reference, example.fields)

        found = {}
        for i in range(self._num):
            one = located(self._examples, i, task)
            if not len(one.tokens):
                raise UserError(f"{self._source.where(i)}: the prompt has no tokens")
            if fits(self._examples, i, len(one.tokens), max_tokens, overlong):
                found[i] = one
        if not found:
            raise UserError(
                f"data: every one of {self._num} prompts is longer than max_prompt_tokens="
                f"{max_tokens} and was dropped; allow more tokens"
            )
        return found

    def record(self, index: int) -> dict[str, Any]:
        return self._source[index]

    def where(self, index: int) -> str:
        return self._source.where(index)

    def digest(self, index: int) -> str:
        """Of the values that the prompt is made of and the reference: not of their keys, nor of
        the words around them. So the same problem from two files has one digest."""
        record, example = self._source[index], self._examples[index]
        keys = self._fields.keys
        asked = [record[key] for key in (*keys.get("prompt", ()), *keys.get("messages", ()))]
        return digest.of_value([to_json(value) for value in (*asked, example.reference)])


def shot_encoder(
    config: TextConfig, shots: Sequence[dict[str, Any]], separator: str, tokenizer: Tokenizer
) -> Callable[[Example], np.ndarray]:
    """A function from a problem to the ids of its prompt, with worked examples before it.

    As plain text each is its prompt, its completion and the separator; in a chat a turn of the user
    and one of the assistant.

    Args:
      shots: records with the keys that `config.fields` read, the completion among them.
    Raises:
      UserError: if one lacks a field; of the function, if the problem is one of the examples.
    """
    encode = prompt_encoder(config, tokenizer)
    if not shots:
        return encode
    if config.fields.completion is None or config.fields.prompt is None:
        raise UserError(
            "shots: worked examples need text.fields.prompt and text.fields.completion, the keys "
            "that hold their two parts"
        )
    fields = Fields(prompt=config.fields.prompt, completion=config.fields.completion)
    worked = [make_example(dict(s), fields, lambda i=i: f"shots.{i}") for i, s in enumerate(shots)]
    before = "".join(f"{shot.prompt}{shot.completion}{separator}" for shot in worked)
    turns = [] if config.system is None else [{"role": "system", "content": config.system}]
    for shot in worked:
        turns.append({"role": "user", "content": shot.prompt})
        turns.append({"role": "assistant", "content": shot.completion})
    prompts = [shot.prompt for shot in worked]

    def with_shots(example: Example) -> np.ndarray:
        if example.prompt in prompts:
            raise UserError(
                f"the problem is shots.{prompts.index(example.prompt)} as well, with its answer: "
                "take it out of one of them"
            )
        if config.chat:
            asked = [*turns, {"role": "user", "content": example.prompt}]
            return encode(dataclasses.replace(example, prompt=None, messages=asked))
        return encode(dataclasses.replace(example, prompt=before + (example.prompt or "")))

    return with_shots
