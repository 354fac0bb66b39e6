"""A completion and the reference answer -> 1.0 if its answer is right, else 0.0.

Which answer of a completion counts is said in `answers`. A completion without an answer is wrong
(0.0); a reference without one is a fault of the data and raises ValueError, so that the sample is
left out. `calculations` looks at the way to the answer instead: it gives the share of its steps
that hold. No function limits its own time: `pool` kills the worker that hangs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from alignjax.rewards.answers import NUMBER, find_answer, find_number, visible
from alignjax.rewards.arithmetic import MAX_CHARS, calculate
from alignjax.rewards.format import tags as has_tags

__all__ = ["calculations", "exact", "math", "numeric"]  # noqa: F822

_ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")


def exact(
    prompt: str,
    completion: str,
    reference: Any,
    *,
    place: str = "answer_tag",
    reference_place: str = "all",
    ignore_case: bool = False,
    required_tags: Sequence[str] = (),
    **fields: Any,
) -> float:
    """Whether the answer is the reference, runs of white space counting as one space.

    Args:
      place: where the completion's answer stands (`answers.find_answer`).
      reference_place: where the answer stands within the reference.
      ignore_case: whether `Paris` equals `paris`.
      required_tags: if given, the answer counts only in a completion that is made of these tags
        (`format.tags`).
    """
    answer = _answer(prompt, completion, place, required_tags)
    gold = reference_answer(reference, reference_place)
    if answer is None:
        return 0.0
    answer, gold = " ".join(answer.split()), " ".join(gold.split())
    if ignore_case:
        answer, gold = answer.casefold(), gold.casefold()
    return float(answer == gold)


def numeric(
    prompt: str,
    completion: str,
    reference: Any,
    *,
    place: str = "answer_tag",
    reference_place: str = "all",
    atol: float = 0.0,
    rtol: float = 1e-6,
    required_tags: Sequence[str] = (),
    **fields: Any,
) -> float:
    """Whether |answer - reference| <= atol + rtol |reference|.

    An answer that holds no number, or more than one, is wrong (`answers.find_number`).

    Args:
      place, reference_place, required_tags: as in `exact`.
      atol, rtol: tolerances, absolute and relative to the reference.
    """
    answer = _answer(prompt, completion, place, required_tags)
    text = reference_answer(reference, reference_place)
    gold = find_number(text)
    if gold is None:
        raise ValueError(f"the reference {text[:80]!r} is not one number")
    value = None if answer is None else find_number(answer)
    return float(value is not None and abs(value - gold) <= atol + rtol * abs(gold))


def calculations(
    prompt: str, completion: str, reference: Any, *, partial: float = 0.0, **fields: Any
) -> dict[str, float]:
    """The share of calculator annotations, `<<48/2=24>>`, that are right and lead somewhere.

    One leads somewhere if it

    - starts from the problem: one of its numbers stands in the prompt or is the result of an
      earlier annotation that is right and leads somewhere;
    - gets somewhere: its result is none of its numbers, unlike that of 5=5, 5*1=5 and 5+0=5;
    - has not been written before.

    The share is of as many annotations as the completion has, or the reference if it has more: to
    write none, or one easy one, does not pay. What they say about the problem is not looked at.

    Args:
      partial: what an annotation that leads somewhere but is wrong is worth at most, in [0, 1]. It
        is worth partial * (1 - |a - b| / max(|a|, |b|)), not below 0, where a is written and b is
        right: an estimate pays in part, for models too small to be right often enough.
    Returns:
      reward: the share, in [0, 1]; right: the share of those written whose arithmetic holds,
      wherever they lead, 0 if there are none; written: how many there are.
    """
    # Only numbers that an annotation can hold: 1e999999999 written out would fill the memory.
    numbers_of_prompt = [n for n in NUMBER.findall(prompt) if len(n) <= MAX_CHARS]
    known = {Fraction(n.replace(",", "")) for n in numbers_of_prompt if "e" not in n.lower()}
    annotations = _ANNOTATION.findall(completion)
    num_right, credit = 0, 0.0
    seen = set()
    for left, right in annotations:
        calculation, result = calculate(left), calculate(right)
        if calculation is None or result is None:
            continue
        (value, numbers), (written, _) = calculation, result
        num_right += value == written
        expression = left.replace(" ", "")
        is_new = expression not in seen
        seen.add(expression)
        if not is_new or known.isdisjoint(numbers) or {value, written} & set(numbers):
            continue
        if value == written:
            credit += 1
            known.add(value)
        else:
            error = abs(written - value) / max(abs(written), abs(value))
            credit += partial * max(0.0, 1 - float(error))
    num_expected = len(_ANNOTATION.findall("" if reference is None else str(reference)))
    return {
        "reward": credit / max(len(annotations), num_expected, 1),
        "right": num_right / max(len(annotations), 1),
        "written": float(len(annotations)),
    }


def reference_answer(reference: Any, place: str) -> str:
    """The reference's answer as text.

    Raises:
      ValueError: if there is none.
    """
    answer = None if reference is None else find_answer(str(reference), place)
    if answer is None:
        raise ValueError(f"no answer at {place!r} in the reference {str(reference)[:80]!r}")
    return answer


def _answer(prompt: str, completion: str, place: str, required_tags: Sequence[str]) -> str | None:
    if required_tags and not has_tags(prompt, completion, None, tags=required_tags):
        return None
    return find_answer(visible(prompt, completion), place)


def __getattr__(name: str) -> Callable[..., float]:
    """`math` on first use: importing sympy takes most of a second, and only who asks waits."""
    if name != "math":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from alignjax.rewards.equivalence import math

    return math
