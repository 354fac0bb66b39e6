"""First-fit packing: a hand-made layout, and what must hold of any."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignjax.data import pack


def sequence(start: int, length: int, num_prompt: int = 1) -> dict[str, np.ndarray]:
    tokens = np.arange(start, start + length, dtype=np.int32)
    return {
        "tokens": tokens,
        "mask": np.arange(length) >= num_prompt,
        "old_logps": -tokens.astype(np.float32),
    }


def test_layout_by_hand():
    """Row 0 takes 3 of 5, row 1 takes 4, the third fits row 0 again, the fourth nowhere."""
    sequences = [sequence(10, 3), sequence(20, 4, 2), sequence(30, 2), sequence(40, 2)]
    rows, num_used = pack(sequences, num_rows=2, row_len=5)
    assert num_used == 3
    np.testing.assert_array_equal(rows["tokens"], [[10, 11, 12, 30, 31], [20, 21, 22, 23, 0]])
    np.testing.assert_array_equal(rows["segment_ids"], [[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(rows["positions"], [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]])
    np.testing.assert_array_equal(rows["mask"], [[0, 1, 1, 0, 1], [0, 0, 1, 1, 0]])
    np.testing.assert_array_equal(
        rows["old_logps"], [[-10, -11, -12, -30, -31], [-20, -21, -22, -23, 0]]
    )
    kinds = {key: value.dtype for key, value in rows.items()}
    assert kinds == {
        "tokens": np.int32,
        "segment_ids": np.int32,
        "positions": np.int32,
        "mask": bool,
        "old_logps": np.float32,
    }


def test_unpacked_by_hand():
    rows, num_used = pack(
        [sequence(10, 1, 1), sequence(20, 2), sequence(30, 1)], num_rows=2, row_len=3, packed=False
    )
    assert num_used == 2
    np.testing.assert_array_equal(rows["tokens"], [[10, 0, 0], [20, 21, 0]])
    np.testing.assert_array_equal(rows["segment_ids"], [[1, 0, 0], [1, 1, 0]])
    np.testing.assert_array_equal(rows["mask"], [[0, 0, 0], [0, 1, 0]])


def test_it_stops_at_the_first_that_fits_nowhere_though_a_later_one_would():
    rows, num_used = pack([sequence(1, 3), sequence(9, 2), sequence(5, 1)], num_rows=1, row_len=4)
    assert num_used == 1
    np.testing.assert_array_equal(rows["tokens"], [[1, 2, 3, 0]])


def test_nothing_to_pack():
    rows, num_used = pack([], num_rows=2, row_len=3)
    assert num_used == 0
    assert set(rows) == {"tokens", "mask", "segment_ids", "positions"}
    assert all(value.shape == (2, 3) and not value.any() for value in rows.values())


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), max_size=30),
    num_rows=st.integers(1, 6),
    row_len=st.integers(12, 20),
    packed=st.booleans(),
)
def test_any_packing(lengths, num_rows, row_len, packed):
    starts = np.cumsum([1, *lengths])  # Token values are all different and never 0.
    sequences = [sequence(int(s), n) for s, n in zip(starts, lengths, strict=False)]
    rows, num_used = pack(sequences, num_rows=num_rows, row_len=row_len, packed=packed)
    segment_ids, tokens = rows["segment_ids"], rows["tokens"]
    real = segment_ids > 0
    # Every token of what was used is there once, and nothing else is.
    assert sorted(tokens[real]) == list(range(1, 1 + sum(lengths[:num_used])))
    assert not any(value[~real].any() for value in rows.values())
    found = []
    for row in range(num_rows):
        count = int(real[row].sum())
        assert real[row, :count].all()  # Padding only at the end.
        steps = np.diff(segment_ids[row, :count], prepend=0)
        assert set(steps) <= {0, 1}  # 1, 2, ... without a gap, each contiguous.
        begins = np.flatnonzero(steps)
        for begin, end in itertools.pairwise([*begins, count]):
            length = int(end - begin)
            found.append(length)
            assert list(rows["positions"][row, begin:end]) == list(range(length))
            assert list(np.diff(tokens[row, begin:end])) == [1] * (length - 1)
            assert list(rows["mask"][row, begin:end]) == [False] + [True] * (length - 1)
            assert list(rows["old_logps"][row, begin:end]) == list(-tokens[row, begin:end])
        assert packed or segment_ids[row].max() <= 1
    assert sorted(found) == sorted(lengths[:num_used])
    if num_used < len(lengths):
        room = row_len - real.sum(1)
        assert (room < lengths[num_used]).all() if packed else num_used == num_rows


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (sequence(1, 9), "came 9"),
        (sequence(1, 0), "came 0"),
        (sequence(1, 3, 0), "first token is in the mask"),
        (sequence(1, 3) | {"old_logps": np.zeros(2, np.float32)}, "3 tokens but 2 old_logps"),
        ({"tokens": np.ones(2, np.int32), "mask": np.array([False, True])}, "expected keys"),
    ],
)
def test_what_cannot_be_packed_is_named(bad, message):
    with pytest.raises(ValueError, match=r"sequences\[1\]") as error:
        pack([sequence(1, 3), bad], num_rows=4, row_len=8)
    assert message in str(error.value)


def test_a_thousand_sequences_take_milliseconds():
    rng = np.random.default_rng(0)
    sequences = [sequence(1, int(n)) for n in rng.integers(10, 200, 1000)]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        _, num_used = pack(sequences, num_rows=256, row_len=512)
        times.append(time.perf_counter() - start)
    assert num_used == 1000
    assert min(times) < 0.1  # 7 ms on an idle core.
