"""Rows of comparisons: both layouts by hand, what they have in common, and the stream of them."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignjax.core.errors import UserError
from alignjax.data import Element, branch_segments, comparison_rows, most_in_row
from alignjax.data.comparison_rows import pack_elements

NUM = 23


def element(prompt, *completions, ranks=None, **more):
    ranks = tuple(range(1, len(completions) + 1)) if ranks is None else ranks
    return Element(np.array(prompt), tuple(np.array(c) for c in completions), ranks, **more)


TWO = [
    element([5, 6, 7], [1, 2], [3], margin=0.5, label=False, index=8),
    element([9], [4], ranks=(1,), index=2),
]


def packed(elements, **options):
    options = {"num_rows": 2, "row_len": 16, "num_responses": 2, "shared_prompt": True} | options
    return pack_elements(elements, **options)


def test_the_shared_layout_by_hand():
    rows = packed(TWO)
    lines = {
        "tokens": [5, 6, 7, 1, 2, 7, 3, 9, 4],
        "mask": [0, 0, 0, 1, 1, 0, 1, 0, 1],
        "positions": [0, 1, 2, 3, 4, 2, 3, 0, 1],
        "branches": [0, 0, 1, 1, 1, 2, 2, 1, 1],
        "segment_ids": [1, 1, 1, 1, 1, 1, 1, 2, 2],
    }
    for name, line in lines.items():
        np.testing.assert_array_equal(rows[name][0], line + [0] * 7, err_msg=name)
        assert not rows[name][1].any()
    found = branch_segments(rows, 2)
    np.testing.assert_array_equal(found[0], [0, 0, 1, 1, 1, 2, 2, 3, 3] + [0] * 7)
    assert not found[1].any()
    assert rows["ranks"].shape == (2, 2, 2)
    np.testing.assert_array_equal(rows["ranks"], [[[1, 2], [1, 0]], [[0, 0], [0, 0]]])
    np.testing.assert_array_equal(rows["index"], [[8, 2], [-1, -1]])
    np.testing.assert_array_equal(rows["margins"], [[0.5, 0], [0, 0]])
    np.testing.assert_array_equal(rows["labels"], [[False, True], [True, True]])
    kinds = {name: value.dtype.name for name, value in rows.items()}
    assert kinds == {
        "tokens": "int32", "mask": "bool", "positions": "int32", "branches": "int32",
        "segment_ids": "int32", "ranks": "int32", "index": "int32", "margins": "float32",
        "labels": "bool",
    }  # fmt: skip


def test_the_unshared_layout_by_hand():
    rows = packed(TWO, shared_prompt=False)
    lines = {
        "tokens": [5, 6, 7, 1, 2, 5, 6, 7, 3, 9, 4],
        "mask": [0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1],
        "positions": [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1],
        "branches": [1, 1, 1, 1, 1, 2, 2, 2, 2, 1, 1],
        "segment_ids": [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2],
    }
    for name, line in lines.items():
        np.testing.assert_array_equal(rows[name][0], line + [0] * 5, err_msg=name)
    np.testing.assert_array_equal(
        branch_segments(rows, 2)[0], [1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3] + [0] * 5
    )


def test_one_in_a_row_where_rows_are_not_packed():
    rows = packed(TWO, packed=False)
    np.testing.assert_array_equal(rows["segment_ids"].max(1), [1, 1])
    np.testing.assert_array_equal(rows["index"], [[8], [2]])


ids = st.lists(st.integers(1, 90), min_size=1, max_size=5)


@st.composite
def drawn(draw):
    completions = draw(st.lists(ids, min_size=1, max_size=4))
    ranks = tuple(draw(st.integers(1, 4)) for _ in completions)
    return element(draw(ids), *completions, ranks=ranks)


def branches_of(rows, num_responses):
    """index -> what the rows say of the element: for each branch what stands before each target."""
    segments = branch_segments(rows, num_responses)
    most = rows["ranks"].shape[1]
    found = {}
    for row, n in itertools.product(range(len(segments)), range(most)):
        if rows["index"][row, n] < 0:
            assert not (rows["segment_ids"][row] == n + 1).any()
            continue
        branches = []
        for k in range(1, num_responses + 1):
            own = segments[row] == n * num_responses + k
            shared = (rows["segment_ids"][row] == n + 1) & (rows["branches"][row] == 0)
            seen = shared | own
            assert (rows["ranks"][row, n, k - 1] > 0) == own.any()
            if own.any():
                # A copy of the prompt's last token stands where that token would.
                tokens, mask = rows["tokens"][row, seen], rows["mask"][row, seen]
                np.testing.assert_array_equal(rows["positions"][row, seen], np.arange(seen.sum()))
                start = mask.argmax()
                assert mask[start:].all() and not mask[:start].any() and start > 0
                # Within the row, each target follows directly on what predicts it.
                where = np.flatnonzero(own & rows["mask"][row])
                assert (segments[row, where - 1] == segments[row, where]).all()
                branches.append((tokens.tolist(), int(start)))
        ranks = rows["ranks"][row, n, : len(branches)].tolist()
        found[int(rows["index"][row, n])] = branches, ranks
    return found


@given(elements=st.lists(drawn(), min_size=1, max_size=6))
def test_all_layouts_hold_the_same(elements):
    elements = [Element(e.prompt, e.completions, e.ranks, index=i) for i, e in enumerate(elements)]
    expected = {
        i: (
            [([*e.prompt.tolist(), *c.tolist()], len(e.prompt)) for c in e.completions],
            list(e.ranks),
        )
        for i, e in enumerate(elements)
    }
    for shared, together in itertools.product((True, False), repeat=2):
        rows = packed(
            elements, num_rows=6, row_len=48, num_responses=4, shared_prompt=shared,
            packed=together,
        )  # fmt: skip
        assert branches_of(rows, 4) == expected
        assert rows["ranks"].shape[1] == most_in_row(6, 48, packed=together)
        lengths = [e.num_tokens(shared_prompt=shared) for e in elements]
        assert np.count_nonzero(rows["segment_ids"]) == sum(lengths)
        num_targets = sum(len(c) for e in elements for c in e.completions)
        assert rows["mask"].sum() == num_targets


class Numbered:
    """Record i is the number i."""

    def __init__(self, num=NUM):
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        return index

    def where(self, index):
        return f"pairs.jsonl:{index + 1}"


def encode(number):
    """(number % 4) + 1 tokens of prompt, and completions of 2 and 1 tokens."""
    return element([number + 1] * (number % 4 + 1), [101, 102], [103])


def stream_of(source=None, encode=encode, **options):
    options = {
        "num_prompts": 4, "num_micro_batches": 2, "row_len": 16, "num_responses": 2,
        "shared_prompt": True, "seed": 3, **options,
    }  # fmt: skip
    return comparison_rows(source or Numbered(), encode, **options)


def numbers(batch):
    return sorted(batch["index"][batch["index"] >= 0].tolist())


@pytest.mark.parametrize("packed", [True, False])
def test_batches_have_so_many_elements_each_once_in_an_epoch(packed):
    seen = []
    for batch in itertools.islice(stream_of(packed=packed), NUM):
        assert batch["tokens"].shape == (2, 2, 16)
        assert batch["ranks"].shape == (2, 2, 4 if packed else 1, 2)
        assert batch["index"].shape == batch["margins"].shape == batch["ranks"].shape[:3]
        assert len(numbers(batch)) == 4
        seen += numbers(batch)
    assert sorted(seen) == sorted([*range(NUM)] * 4)


def test_an_element_holds_the_record_that_its_index_names():
    for batch in itertools.islice(stream_of(), 9):
        rows = {name: value.reshape(4, *value.shape[2:]) for name, value in batch.items()}
        for index, (branches, ranks) in branches_of(rows, 2).items():
            prompt = [index + 1] * (index % 4 + 1)
            assert branches == [([*prompt, 101, 102], len(prompt)), ([*prompt, 103], len(prompt))]
            assert ranks == [1, 2]


def test_packed_rows_are_full_before_the_next_begins():
    """Of 4 elements of at most 8 tokens the first micro-batch of 2 rows of 16 holds all."""
    batch = next(stream_of())
    assert not batch["mask"][1].any() and len(numbers(batch)) == 4


def test_where_the_data_end_there_are_fewer():
    batches = list(stream_of(shuffle=False, num_epochs=1))
    assert [len(numbers(b)) for b in batches] == [4] * 5 + [3]
    assert [n for b in batches for n in numbers(b)] == list(range(NUM))
    assert batches[-1]["tokens"].shape == (2, 2, 16)


def test_a_position_restores_exactly_the_rest():
    stream = stream_of()
    states, batches = [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(stream.get_state())))
        batches.append(next(stream))
    for n in (0, 1, 5, 11):
        fresh = stream_of()
        next(fresh)
        fresh.set_state(states[n])
        for want in batches[n:]:
            got = next(fresh)
            for name, value in want.items():
                np.testing.assert_array_equal(got[name], value)


def test_overlong_ones_are_dropped_whole_and_counted():
    """Shared, record n takes n % 4 + 2 + 3 tokens; of 7 or fewer are those with n % 4 < 3."""
    stream = stream_of(row_len=7, shuffle=False, num_epochs=1)
    kept = [n for batch in stream for n in numbers(batch)]
    assert kept == [n for n in range(NUM) if n % 4 < 3]
    assert stream.num_dropped == NUM - len(kept)
    # Unshared, 2 (n % 4 + 1) + 3.
    stream = stream_of(row_len=7, shuffle=False, num_epochs=1, shared_prompt=False)
    assert [n for batch in stream for n in numbers(batch)] == [n for n in range(NUM) if n % 4 < 2]
    # Of a prompt and its longest completion, n % 4 + 1 + 2.
    stream = stream_of(max_len=4, shuffle=False, num_epochs=1)
    assert [n for batch in stream for n in numbers(batch)] == [n for n in range(NUM) if n % 4 < 2]
    with pytest.raises(UserError, match=r"pairs\.jsonl:4: 8 tokens, but only 7 fit"):
        list(stream_of(row_len=7, shuffle=False, overlong="error"))


def test_micro_batches_that_do_not_divide():
    with pytest.raises(ValueError, match="num_prompts=4 does not divide into 3 micro-batches"):
        stream_of(num_micro_batches=3)
