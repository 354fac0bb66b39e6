"""Two mathematical answers -> whether they are equal, by math-verify. Used as `verify.math`."""

from __future__ import annotations

import logging
from typing import Any

import math_verify

from alignjax.rewards.answers import find_answer, visible
from alignjax.rewards.verify import reference_answer

# It warns that its time limits are off. They need signals; ours is the death of the worker.
for _name in ("parser", "grader"):
    logging.getLogger(f"math_verify.{_name}").setLevel(logging.ERROR)


def math(
    prompt: str,
    completion: str,
    reference: Any,
    *,
    place: str = "boxed",
    reference_place: str = "all",
    **fields: Any,
) -> float:
    """Whether the answer equals the reference as mathematics: 1/2, 0.5 and \\frac{1}{2} are one.

    An answer that math-verify cannot read or compare is wrong. Braces must balance.

    Args:
      place: where the completion's answer stands (`answers.find_answer`).
      reference_place: where the answer stands within the reference.
    Raises:
      ValueError: if the reference holds no answer that math-verify can read.
    """
    text = reference_answer(reference, reference_place)
    gold = _parse(text)
    if not gold:
        raise ValueError(f"math-verify cannot read the reference {text[:80]!r}")
    answer = find_answer(visible(prompt, completion), place)
    if answer is None:
        return 0.0
    return float(math_verify.verify(gold, _parse(answer), timeout_seconds=None))


def _parse(answer: str) -> list[Any]:
    """Expressions for one answer, none if it cannot be read."""
    answer = answer.strip().removesuffix(".").strip("$ ")
    if not _is_balanced(answer):
        return []  # `1} \boxed{2` would otherwise become two answers
    return math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=None)


def _is_balanced(text: str) -> bool:
    depth = 0
    for char in text.replace("\\{", "").replace("\\}", ""):
        depth += (char == "{") - (char == "}")
        if depth < 0:
            return False
    return depth == 0
