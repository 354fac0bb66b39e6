"""Continuous batching where a library only decodes: which prompt is in which of its sequences.

Standard library only, for this file runs in the environment of a library.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

Row = tuple[int, int, Sequence[int]]
"""A sequence, how many tokens it has, and those to append."""


class Sequences(Protocol):
    """Token sequences with a KV cache each, numbered from 0."""

    def decode(self, rows: Sequence[Row]) -> list[int]:
        """Appends tokens; what is sampled after the last of each row."""

    def free(self, sequence: int) -> None:
        """Empties a sequence."""

    def move(self, source: int, target: int) -> None:
        """Makes an empty sequence what another is, and that one empty."""


def complete(
    prompts: Sequence[Sequence[int]],
    sequences: Sequences,
    *,
    slots: int,
    max_tokens: int,
    eos: int,
) -> list[list[int]]:
    """Samples a completion of each prompt, EOS included. At most `slots` are decoded together, and
    a prompt takes a slot as soon as one ends. Those in use are the first ones, without a gap:
    neighbours are computed in one pass."""
    completions: list[list[int]] = [[] for _ in prompts]
    waiting = deque(range(len(prompts)))
    live: list[int] = []  # the prompt of each sequence in use
    while waiting or live:
        free = min(slots - len(live), len(waiting))
        if free:
            chosen = [waiting.popleft() for _ in range(free)]
            rows: list[Row] = [(len(live) + i, 0, prompts[n]) for i, n in enumerate(chosen)]
            live += chosen
        else:
            chosen = live
            rows = [
                (i, len(prompts[n]) + len(completions[n]) - 1, completions[n][-1:])
                for i, n in enumerate(live)
            ]
        for n, token in zip(chosen, sequences.decode(rows), strict=True):
            completions[n].append(token)
        for i in reversed(range(len(live))):
            tokens = completions[live[i]]
            if tokens[-1] == eos or len(tokens) == max_tokens:
                sequences.free(i)
                last = live.pop()
                if i < len(live):
                    sequences.move(len(live), i)
                    live[i] = last
    return completions
