"""Exact values, and what is no arithmetic."""

import time
from fractions import Fraction

import pytest

from alignjax.rewards.arithmetic import calculate


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("48/2", 24, [48, 2]),
        (" 48 / 2 ", 24, [48, 2]),
        ("2+3*4", 14, [2, 3, 4]),
        ("(2+3)*4", 20, [2, 3, 4]),
        ("20-5-3", 12, [20, 5, 3]),
        ("0.1+0.2", Fraction(3, 10), [Fraction(1, 10), Fraction(2, 10)]),
        ("1/3", Fraction(1, 3), [1, 3]),
        (".5*6", 3, [Fraction(1, 2), 6]),
        ("1,200*2", 2400, [1200, 2]),
        ("-3--5", 2, [3, 5]),
        ("7", 7, [7]),
    ],
)
def test_values(text, value, numbers) -> None:
    assert calculate(text) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    ["", "x", "1=1", "2**3", "7//2", "7%2", "1e5", "0x10", "1_0", "1j", "1/0", "1/(2-2)", "(1",
     "1 2", "1,2", "(1,2)", "1.2.3", "007", "__import__('os')", "1 if 1 else 2", "+",
     "1+" * 60 + "1"],
)  # fmt: skip
def test_no_arithmetic(text) -> None:
    assert calculate(text) is None


def test_nothing_takes_long() -> None:
    start = time.perf_counter()
    for text in ("9" * 100, "(" * 100, "(" * 49 + "1" + ")" * 49, "-" * 99 + "1", "9*" * 49 + "9",
                 "1/3+" * 24 + "1/7"):  # fmt: skip
        calculate(text)
    assert time.perf_counter() - start < 1
