"""Reductions by hand and against loops in float64; what depends on the split, and what does not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from tests.losses.case import Case, oracle_tests


def tokens(loss, mask):
    return [loss[i] for i in zip(*np.nonzero(mask), strict=True)]


def sequences(loss, mask, segment_ids):
    """The losses of each sequence that has a token that counts."""
    found = {}
    for i, t in zip(*np.nonzero(mask), strict=True):
        found.setdefault((i, segment_ids[i, t]), []).append(loss[i, t])
    return list(found.values())


def weighted(total, weight):
    return np.float64(total), np.float64(weight)


def token_mean(loss, mask):
    return weighted(sum(tokens(loss, mask)), mask.sum())


def sequence_mean(loss, mask, segment_ids):
    each = sequences(loss, mask, segment_ids)
    return weighted(sum(sum(x) / len(x) for x in each), len(each))


def sequence_sum(loss, mask, segment_ids, max_len=1):
    each = sequences(loss, mask, segment_ids)
    return weighted(sum(sum(x) for x in each), len(each) * max_len)


def micro_batch_mean(loss, mask):
    each = tokens(loss, mask)
    return weighted(sum(each) / len(each) if each else 0, 1 if each else 0)


def example_mean(loss, is_valid):
    return weighted(sum(tokens(loss, is_valid)), is_valid.sum())


TestOracles = oracle_tests(
    [
        Case(losses.token_mean, token_mean),
        Case(losses.sequence_mean, sequence_mean),
        Case(losses.sequence_sum, sequence_sum),
        Case(losses.fixed_length, sequence_sum, {"max_len": 17}),
        Case(losses.micro_batch_mean, micro_batch_mean),
        Case(losses.example_mean, example_mean),
    ]
)

LOSS = jnp.array([[1.0, 2.0, 6.0, np.nan, 5.0, 7.0], [np.inf, 4.0, np.nan, np.nan, 8.0, 10.0]])
MASK = jnp.array([[0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 1, 1]], bool)
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 3, 3]])
# Sequences with a token that counts: {2, 6}, {7}, {4}, {8, 10}; segment 2 of row 2 has none.


def test_by_hand():
    assert [float(x) for x in losses.token_mean(LOSS, MASK)] == [37, 6]
    assert [float(x) for x in losses.sequence_mean(LOSS, MASK, SEGMENTS)] == [4 + 7 + 4 + 9, 4]
    fixed = losses.fixed_length(LOSS, MASK, SEGMENTS, max_len=100)
    assert [float(x) for x in fixed] == [37, 400]
    assert [float(x) for x in losses.sequence_sum(LOSS, MASK, SEGMENTS)] == [37, 4]
    mean = losses.micro_batch_mean(LOSS, MASK)
    np.testing.assert_allclose([float(x) for x in mean], [37 / 6, 1], rtol=1e-6)


def test_examples_by_hand():
    """One axis, of pairs, and two, of groups."""
    assert [float(x) for x in losses.example_mean(LOSS[0], MASK[0])] == [2 + 6 + 7, 3]
    assert [float(x) for x in losses.example_mean(LOSS, MASK)] == [37, 6]


def test_only_the_mean_of_a_micro_batch_depends_on_the_split():
    # Rows {2, 6, 10} and {4}: means 6 and 4, of all 22/4.
    loss, mask = jnp.array([[2.0, 6.0, 10.0], [4.0, 0.0, 0.0]]), jnp.array([[1, 1, 1], [1, 0, 0]])
    mask = mask.astype(bool)

    def in_parts(reduce):
        parts = [reduce(loss[i : i + 1], mask[i : i + 1]) for i in range(2)]
        return [float(sum(x)) for x in zip(*parts, strict=True)]

    assert in_parts(losses.token_mean) == [22, 4]
    assert in_parts(losses.micro_batch_mean) == [6 + 4, 2]
    assert [float(x) for x in losses.micro_batch_mean(loss, mask)] == [22 / 4, 1]


def test_the_sum_of_a_sequence_is_the_mean_of_what_holds_it_at_each_token():
    """RLOO either way: log-probs of tokens, summed, or those of sequences, each counted once."""
    logp = -jnp.abs(LOSS)
    advantage = jnp.where(SEGMENTS == 1, 2.0, -1.0)
    at_sequences = losses.sequence_level(logp, MASK, SEGMENTS)
    by_token = losses.reinforce(logp, logp, advantage, MASK).loss
    by_sequence = losses.reinforce(at_sequences, at_sequences, advantage, MASK).loss
    summed = losses.sequence_sum(by_token, MASK, SEGMENTS)
    assert float(summed.total) == 2 * (8 + 4) - (7 + 18)
    assert summed == losses.sequence_mean(by_sequence, MASK, SEGMENTS)


def test_gradients_by_hand():
    def totals(x):
        return (
            losses.token_mean(x, MASK).total
            + 10 * losses.sequence_mean(x, MASK, SEGMENTS).total
            + 100 * losses.fixed_length(x, MASK, SEGMENTS, max_len=3).total
        )

    grad = jax.grad(totals)(LOSS)
    assert grad.tolist() == [[0, 106, 106, 0, 0, 111], [0, 111, 0, 0, 106, 106]]


def test_every_id_up_to_the_length_of_the_row_counts():
    ids, on = jnp.array([[1, 2, 3]]), jnp.ones((1, 3), bool)
    out = losses.sequence_mean(jnp.array([[1.0, 2.0, 4.0]]), on, ids)
    assert [float(x) for x in out] == [7, 3]


@pytest.mark.parametrize("dirt", [-1, 7, 2**31 - 1])
def test_segment_ids_off_mask_may_be_anything(dirt):
    ids = jnp.where(MASK, SEGMENTS, dirt)
    for reduce in (
        losses.sequence_mean,
        losses.sequence_sum,
        partial(losses.fixed_length, max_len=9),
    ):
        out = reduce(LOSS, MASK, ids)
        assert [float(x) for x in out] == [float(x) for x in reduce(LOSS, MASK, SEGMENTS)]


def test_nothing_to_count():
    off = jnp.zeros((2, 6), bool)
    for out in (
        losses.token_mean(LOSS, off),
        losses.sequence_mean(LOSS, off, SEGMENTS),
        losses.fixed_length(LOSS, off, SEGMENTS, max_len=9),
        losses.sequence_sum(LOSS, off, SEGMENTS),
        losses.micro_batch_mean(LOSS, off),
        losses.example_mean(LOSS, off),
    ):
        assert [float(x) for x in out] == [0, 0]
        assert out.total.dtype == out.weight.dtype == jnp.float32


def test_errors():
    with pytest.raises(ValueError, match="max_len=0"):
        losses.fixed_length(LOSS, MASK, SEGMENTS, max_len=0)
    for reduce in (losses.token_mean, losses.micro_batch_mean, losses.example_mean):
        with pytest.raises(AssertionError):
            reduce(LOSS, MASK[:, :3])
    with pytest.raises(AssertionError):
        losses.example_mean(LOSS[None], MASK[None])
    with pytest.raises(AssertionError):
        losses.sequence_mean(LOSS, MASK, SEGMENTS.astype(jnp.float32))
    for loss, mask in ((LOSS.astype(jnp.int32), MASK), (LOSS, MASK.astype(jnp.float32))):
        with pytest.raises(AssertionError):
            losses.token_mean(loss, mask)
