"""A seed -> problems of arithmetic with their answers: no data set, and none can have leaked.

    {"expression": "37 + 58 * 2", "answer": "153"}

The usual precedence holds, and answers are whole numbers, which may be negative.
"""

from __future__ import annotations

import operator
import random
from typing import Annotated, Any, Literal

from pydantic import Field

from alignjax.core.config import Config
from alignjax.core.errors import UserError

_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class Arithmetic(Config):
    """Problems that are made, in the place of a data set."""

    generate: Literal["arithmetic"]
    count: int = Field(500, ge=1)
    """Problems, all of them different."""
    num_terms: list[Annotated[int, Field(ge=2, le=8)]] = Field([2, 3], min_length=1)
    """How many numbers an expression has; each of these equally often."""
    operators: list[Literal["+", "-", "*"]] = Field(["+", "-", "*"], min_length=1)
    largest: int = Field(99, ge=1)
    """Numbers are from 0 to this."""
    seed: int = Field(0, ge=0)


class ArithmeticProblems:
    """A `Source`: the problems of an `Arithmetic`."""

    def __init__(self, config: Arithmetic):
        """Raises UserError if there seem to be fewer than `config.count`."""
        chance = random.Random(config.seed)

        def below(n: int) -> int:
            return int(chance.random() * n)  # The one draw that is the same in every Python.

        found: dict[str, int] = {}
        for _ in range(50 * config.count + 1000):
            if len(found) == config.count:
                break
            terms = config.num_terms[below(len(config.num_terms))]
            numbers = [below(config.largest + 1) for _ in range(terms)]
            signs = [config.operators[below(len(config.operators))] for _ in numbers[1:]]
            text = str(numbers[0])
            for sign, number in zip(signs, numbers[1:], strict=True):
                text += f" {sign} {number}"
            found[text] = value(numbers, signs)
        if len(found) < config.count:
            raise UserError(
                f"data.count={config.count}: found {len(found)} different problems; ask for fewer, "
                "or raise data.largest"
            )
        self._records = [{"expression": k, "answer": str(v)} for k, v in found.items()]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._records[index]

    def where(self, index: int) -> str:
        return f"arithmetic:problem {index + 1}"


def value(numbers: list[int], signs: list[str]) -> int:
    """Of numbers with signs between them: products first, then from left to right."""
    terms, between = [numbers[0]], []
    for sign, number in zip(signs, numbers[1:], strict=True):
        if sign == "*":
            terms[-1] *= number
        else:
            terms.append(number)
            between.append(sign)
    total = terms[0]
    for sign, term in zip(between, terms[1:], strict=True):
        total = _OPERATORS[sign](total, term)
    return total
