"""Single responses, each with one to another prompt."""

import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.data.comparisons import Comparison
from alignjax.data.elements import Element
from alignjax.data.mismatches import Mismatched, mismatch_encoder


class Singles(list):
    def where(self, index):
        return f"file:{index + 1}"


def singles(prompts):
    return Singles(
        Comparison(prompt, [f"{prompt}{i}"], (1,), label=i % 2 == 0)
        for i, prompt in enumerate(prompts)
    )


@pytest.mark.parametrize(
    ("prompts", "others"),
    [("ab", [1, 0]), ("aabbc", [2, 2, 4, 4, 0]), ("abba", [1, 3, 3, 1]), ("abaa", [1, 2, 1, 1])],
)
def test_the_next_of_another_prompt_in_a_circle(prompts, others):
    view = Mismatched(singles(prompts))
    assert len(view) == len(prompts)
    for i, other in enumerate(others):
        assert view[i] == Comparison(
            prompts[i], [f"{prompts[i]}{i}", f"{prompts[other]}{other}"], (1, 1), label=i % 2 == 0
        )
    assert view.where(1) == "file:2"


def test_prompts_that_are_all_the_same():
    with pytest.raises(UserError, match="all 3 responses are of one prompt"):
        Mismatched(singles("aaa"))


def test_an_example_without_room_keeps_its_own_response():
    ids = lambda n: np.arange(n, dtype=np.int32)  # noqa: E731

    def encode(comparison):
        sizes = map(len, comparison.responses)
        return Element(ids(2), tuple(map(ids, sizes)), (1, 1), label=comparison.label)

    encode_both = mismatch_encoder(encode, lambda e: sum(map(len, e.completions)) <= 5)
    both = encode_both(Comparison("p", ["xx", "yyy"], (1, 1), label=False))
    one = encode_both(Comparison("p", ["xxx", "yyy"], (1, 1), label=False))
    assert [len(c) for c in both.completions] == [2, 3] and both.ranks == (1, 1)
    assert [len(c) for c in one.completions] == [3] and one.ranks == (1,)
    assert one.label is False
