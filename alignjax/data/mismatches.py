"""Single responses -> comparisons with a response to another prompt, which KTO measures a KL by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from alignjax.core.errors import UserError
from alignjax.data.comparisons import Comparison
from alignjax.data.elements import Element
from alignjax.data.sources import Source


class Mismatched:
    """A view of single responses, each with a second one: that of the next of another prompt, in a
    circle.

    Who goes with whom depends on the data alone, not on the batch as in the paper, so that the
    reference has to look at each only once. Both have rank 1: they are never compared.
    Source: arXiv:2402.01306 sec. 4 (KTO).
    """

    def __init__(self, singles: Source):
        """Raises: UserError: if all are of one prompt."""
        self._singles = singles
        prompts = [singles[i].prompt for i in range(len(singles))]
        self._others = _next_other(prompts)

    def __len__(self) -> int:
        return len(self._singles)

    def __getitem__(self, index: int) -> Comparison:
        one, other = self._singles[index], self._singles[self._others[index]]
        return replace(one, responses=[one.responses[0], other.responses[0]], ranks=(1, 1))

    def where(self, index: int) -> str:
        return self._singles.where(index)


def _next_other(prompts: list) -> list[int]:
    """For each place the next one, in a circle, where another prompt stands."""
    num = len(prompts)
    changes = [i for i in range(num) if prompts[i] != prompts[i - 1]]
    if not changes:
        raise UserError(
            f"data: all {num} responses are of one prompt; kto compares with responses to others"
        )
    found, following = [0] * num, changes[0]
    for i in reversed(range(num)):
        found[i] = following
        if prompts[i] != prompts[i - 1]:
            following = i
    return found


def mismatch_encoder(
    encode: Callable[[Comparison], Element], has_room: Callable[[Element], bool]
) -> Callable[[Comparison], Element]:
    """As `encode`, without the second response where both have no room: an example is not lost for
    the sake of another one."""

    def encode_both(comparison: Comparison) -> Element:
        element = encode(comparison)
        if has_room(element):
            return element
        return replace(element, completions=element.completions[:1], ranks=element.ranks[:1])

    return encode_both
