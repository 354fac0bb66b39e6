"""Text such as `48/2` or `(1.5+2)*3` -> its exact value. Parsed, never evaluated as code."""

from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction

MAX_CHARS = 100
"""Longer expressions have no value: what a model may write must not take long."""
_SIGNS = re.compile(r"[0-9.,+\-*/() ]+")
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculate(text: str) -> tuple[Fraction, list[Fraction]] | None:
    """The value of an expression of numbers, + - * / and brackets, and the numbers in it.

    Returns:
      value and numbers, in order, as exact fractions (0.1 is 1/10); None if it is anything else,
      longer than MAX_CHARS, or divides by zero.
    """
    if len(text) > MAX_CHARS or not _SIGNS.fullmatch(text):
        return None
    without_separators = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    numbers: list[Fraction] = []

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int() | float() as number):
                numbers.append(Fraction(str(number)))  # The shortest decimal: as it was written.
                return numbers[-1]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
                return _OPERATORS[type(sign)](value(left), value(right))
        raise ValueError(f"{ast.dump(node)} is not arithmetic")

    try:
        return value(ast.parse(without_separators.strip(), mode="eval").body), numbers
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None
