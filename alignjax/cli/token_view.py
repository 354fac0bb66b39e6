"""Token ids of a document -> text on a terminal, with what is trained on marked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from rich.text import Text

    from alignjax.text import HFTokenizer

TRAINED, GIVEN, SPECIAL = "bold green", "", "magenta"
"""Styles; a special token that is trained has both."""


class Span(NamedTuple):
    """Tokens that stand together in a document and are shown alike."""

    text: str
    is_trained: bool
    is_special: bool


class View:
    """Prints documents of token ids. Text of the data is shown, never obeyed: no escape codes."""

    def __init__(self, console: Console, tokenizer: HFTokenizer, by_token: bool):
        self._console, self.tokenizer, self._by_token = console, tokenizer, by_token
        has_colour = console.color_system is not None and not console.no_color
        can_draw = "utf" in console.encoding.lower()
        self._brackets = ("", "") if has_colour else ("⟦", "⟧") if can_draw else ("[[", "]]")
        self._rule, self._return = ("──", "↵") if can_draw else ("--", "\\n")

    def say(self, line: str, style: str | None = None) -> None:
        self._console.print(self._written(line), style=style, markup=False)

    def head(self, line: str) -> None:
        self.say(f"{self._rule} {line}", style="cyan")

    def legend(self) -> None:
        opening, closing = self._brackets
        how = f"between {opening} and {closing}" if opening else "bold green"
        self.say(f"What is trained on is {how}.")

    def document(self, ids: np.ndarray, mask: np.ndarray) -> None:
        """Prints ids [length], of which those in the mask are trained."""
        from rich.text import Text

        opening, closing = self._brackets
        shown = Text()
        spans = list(self._spans(ids.tolist(), mask.tolist()))
        width = 0
        for n, span in enumerate(spans):
            style = _style(span)
            is_first = n == 0 or not spans[n - 1].is_trained
            is_last = n + 1 == len(spans) or not spans[n + 1].is_trained
            if self._by_token:
                cell = self._written(
                    f"{opening}{span.text}{closing}" if span.is_trained else span.text
                )
                if width and width + len(cell) > self._console.width:
                    shown.append("\n")
                    width = 0
                shown.append(cell, style).append("  ")
                width += len(cell) + 2
                continue
            if span.is_trained and is_first:
                shown.append(opening, style)
            self._append(shown, span.text, style)
            if span.is_trained and is_last:
                shown.append(closing, style)
        if shown.plain.endswith("\n"):
            shown.right_crop(1)
        self._console.print(shown)

    def _append(self, shown: Text, text: str, style: str) -> None:
        """A line feed is seen and obeyed; other signs that cannot be seen are only seen."""
        for n, line in enumerate(text.split("\n")):
            if n:
                shown.append(self._return, f"{style} dim".strip()).append("\n")
            shown.append(self._written("".join(map(_visible, line))), style)

    def _written(self, text: str) -> str:
        """What the output's encoding cannot express is spelled out."""
        encoding = self._console.encoding
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def _spans(self, ids: list[int], mask: list[bool]) -> Iterator[Span]:
        from alignjax.text import is_special

        def kind(n: int) -> tuple[bool, bool]:
            return mask[n], is_special(self.tokenizer, ids[n])

        def text(start: int, stop: int) -> str:
            return self.tokenizer.decode(
                ids[start:stop], skip_special=False, after=ids[max(0, start - 1) : start]
            )

        if self._by_token:
            for n, i in enumerate(ids):
                yield Span(f"{text(n, n + 1)!r}:{i}", *kind(n))
            return
        for alike, run in itertools.groupby(range(len(ids)), kind):
            places = list(run)
            yield Span(text(places[0], places[-1] + 1), *alike)


def _style(span: Span) -> str:
    if span.is_special:
        return f"{SPECIAL} bold reverse" if span.is_trained else SPECIAL
    return TRAINED if span.is_trained else GIVEN


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")
