"""The text of a completion -> the answer that it gives, or None.

One answer counts, the last one, and only what the reader is meant to see: nothing within
`<think>...</think>`, and nothing after a `<think>` that is never closed.
"""

from __future__ import annotations

import re

PLACES = ("answer_tag", "boxed", "hashes", "last_number", "all")
"""Where an answer can stand; besides, `regex:PATTERN`."""

NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?"  # a sign, but not the minus of 12-3
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:[eE][-+]?\d+(?!\w))?"
)
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
# What a backslash begins is a box or an escape; `\\boxed{`, escaped once too often, is a box.
_BRACE = re.compile(r"\\boxed\s*\{|\\\\(?!boxed)|\\[^\\]|[{}]")
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)


def visible(prompt: str, completion: str) -> str:
    """What is left of a completion without its thinking.

    A prompt that ends with `<think>` has opened the thought for it. Text before a `</think>` that
    nothing opened is thought too.
    """
    text = f"<think>{completion}" if prompt.rstrip().endswith("<think>") else completion
    *closed, rest = text.rpartition("</think>")  # Beyond it a search would be in vain, each time.
    text = _THOUGHT.sub("", "".join(closed)) + rest
    return text.rpartition("</think>")[2].partition("<think>")[0]


def find_answer(text: str, place: str) -> str | None:
    """The last answer at a place, stripped; None if there is none or the last one is empty.

    Args:
      text: where to look; thinking must have been taken out (`visible`).
      place: `answer_tag`: `<answer>x</answer>`. `boxed`: `\\boxed{x}`, braces balanced. `hashes`:
        `#### x`, up to the end of the line. `last_number`: digits with sign, thousands separators,
        decimals, exponent. `all`: the whole text. `regex:PATTERN`: its first group, or its whole
        match if it has none.
    Raises:
      ValueError: on another place.
      re.error: if PATTERN is not a regular expression.
    """
    match place:
        case "answer_tag":
            found = _TAGGED.findall(text)
        case "boxed":
            found = _boxed(text)
        case "hashes":
            found = re.findall(r"####(.*)", text)
        case "last_number":
            found = NUMBER.findall(text)
        case "all":
            found = [text]
        case _ if place.startswith("regex:"):
            found = [m[1] if m.re.groups else m[0] for m in re.finditer(place[6:], text)]
        case _:
            raise ValueError(f"place={place!r}; expected one of {', '.join(PLACES)}, regex:PATTERN")
    return (found[-1] or "").strip() or None if found else None


def find_number(text: str) -> float | None:
    """The one number of a text: `$1,200`, `-3.5`, `72 clips`, `1/2`; None if none, or several.

    A percent sign or a unit is passed over. Two numbers are a hedge, not an answer.
    """
    numbers = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    values = [float(n.replace(",", "")) for n in numbers]
    if len(values) == 2 and re.search(r"\d\s*/\s*\d", text) and values[1] != 0:
        values = [values[0] / values[1]]
    return values[0] if len(values) == 1 and abs(values[0]) < float("inf") else None


def _boxed(text: str) -> list[str]:
    """Contents of every `\\boxed{...}` that is closed, in order; of nested ones the outermost."""
    found: list[tuple[int, int]] = []
    opened: list[int | None] = []  # Of each open brace where its box begins; None if it is no box.
    for token in _BRACE.finditer(text):
        if token[0] == "}":
            if opened and (start := opened.pop()) is not None:
                while found and found[-1][0] > start:
                    found.pop()
                found.append((start, token.start()))
        elif token[0].endswith("{") and token[0] != "\\{":
            opened.append(None if token[0] == "{" else token.end())
    return [text[start:end] for start, end in found]
