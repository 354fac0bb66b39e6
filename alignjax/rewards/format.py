"""The shape of a completion -> a reward: tags, script, length, words of reflection."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

__all__ = ["length", "matches", "reflects", "script", "tags"]

REFLECTION = (
    "wait", "hold on", "let me check", "let me recheck", "re-check", "recheck", "double-check",
    "verify", "mistake", "wrong", "rethink", "try again", "on second thought",
)  # fmt: skip
"""Words by which a text looks back at itself. No list holds all, and each has other uses."""


def tags(
    prompt: str,
    completion: str,
    reference: Any,
    *,
    tags: Sequence[str] = ("think", "answer"),
    may_be_empty: Sequence[str] = ("think",),
    **fields: Any,
) -> float:
    """1.0 if the completion is `<think>...</think><answer>...</answer>` and nothing else.

    Each tag stands once, in this order; only white space may surround them. A prompt that ends with
    the first tag has opened it for the completion.

    Args:
      tags: names of the tags, in order.
      may_be_empty: those that may hold nothing but white space.
    """
    if not tags:
        raise ValueError("tags is empty; name at least one")
    if prompt.rstrip().endswith(f"<{tags[0]}>"):
        completion = f"<{tags[0]}>{completion}"
    rest = completion.strip()
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if completion.count(opening) != 1 or completion.count(closing) != 1:
            return 0.0
        if not rest.startswith(opening):
            return 0.0
        inside, _, rest = rest.removeprefix(opening).partition(closing)
        if any(f"<{t}>" in inside or f"</{t}>" in inside for t in tags):
            return 0.0
        if not inside.strip() and tag not in may_be_empty:
            return 0.0
        rest = rest.lstrip()
    return float(not rest)


def matches(prompt: str, completion: str, reference: Any, *, pattern: str, **fields: Any) -> float:
    """1.0 if the regular expression is found in the completion.

    Args:
      pattern: such as `#### [0-9]+$`; its `$` is the end of the completion, `(?m)` that of a line.
    """
    return float(re.search(pattern, completion) is not None)


def script(
    prompt: str,
    completion: str,
    reference: Any,
    *,
    name: str = "LATIN",
    tag: str = "think",
    **fields: Any,
) -> float:
    """The share of the letters inside a tag that are of one script; 0.0 if there are none.

    For thoughts in one language, after the language-consistency reward of DeepSeek-R1
    (arXiv:2501.12948 sec. 2.3.2), which is the share of words of the language.

    Args:
      name: what the Unicode names of its letters begin with: LATIN, CYRILLIC, CJK, HANGUL, ...
      tag: whose first occurrence counts. A prompt that ends with it has opened it.
    """
    if prompt.rstrip().endswith(f"<{tag}>"):
        completion = f"<{tag}>{completion}"
    _, _, rest = completion.partition(f"<{tag}>")
    inside, is_closed, _ = rest.partition(f"</{tag}>")
    letters = [char for char in inside if char.isalpha()] if is_closed else []
    of_script = sum(unicodedata.name(char, "").startswith(name) for char in letters)
    return of_script / len(letters) if letters else 0.0


def reflects(
    prompt: str,
    completion: str,
    reference: Any,
    *,
    words: Sequence[str] = REFLECTION,
    **fields: Any,
) -> float:
    """1.0 if one of the words is in the completion, thinking included; for weight 0, to measure it.

    Whole words, whatever their case; a space in one stands for any white space. That a word is
    there does not say that anything is checked: read samples.

    Args:
      words: such as `wait`; each finds itself alone, not `waited`.
    Source: DeepSeek-R1, Nature 645 (2025), 633-638, follows the frequency of such words over
      training; ours is the share of completions with any, of a list of our own.
    """
    if not words or not all(word.strip() for word in words):
        raise ValueError(f"words={list(words)}; expected at least one, none of them blank")
    either = "|".join(r"\s+".join(map(re.escape, word.split())) for word in words)
    found = re.search(rf"(?<!\w)(?:{either})(?!\w)", completion, re.IGNORECASE)
    return float(found is not None)


def length(
    prompt: str,
    completion: str,
    reference: Any,
    num_tokens: int,
    *,
    min_tokens: int = 0,
    max_tokens: int,
    slack: int = 0,
    **fields: Any,
) -> float:
    """1.0 between min_tokens and max_tokens, falling linearly to 0.0 at `slack` tokens outside."""
    outside = max(min_tokens - num_tokens, num_tokens - max_tokens, 0)
    return max(0.0, 1.0 - outside / slack) if slack else float(outside == 0)
