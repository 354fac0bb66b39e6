"""Reductions by hand and against loops in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses

LOSS = jnp.array([[1.0, 2.0, 6.0, np.nan, 5.0, 7.0], [np.inf, 4.0, np.nan, np.nan, 8.0, 10.0]])
MASK = jnp.array([[0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 1, 1]], bool)
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 3, 3]])
# Sequences with a token that counts: {2, 6}, {7}, {4}, {8, 10}; segment 2 of row 2 has none.


def test_by_hand():
    assert [float(x) for x in losses.token_mean(LOSS, MASK)] == [37, 6]
    assert [float(x) for x in losses.sequence_mean(LOSS, MASK, SEGMENTS)] == [4 + 7 + 4 + 9, 4]
    fixed = losses.fixed_length(LOSS, MASK, SEGMENTS, max_len=100)
    assert [float(x) for x in fixed] == [37, 400]


def test_gradients_by_hand():
    def totals(x):
        return (
            losses.token_mean(x, MASK).total
            + 10 * losses.sequence_mean(x, MASK, SEGMENTS).total
            + 100 * losses.fixed_length(x, MASK, SEGMENTS, max_len=3).total
        )

    grad = jax.grad(totals)(LOSS)
    assert grad.tolist() == [[0, 106, 106, 0, 0, 111], [0, 111, 0, 0, 106, 106]]


def test_random_ragged_rows():
    rng = np.random.default_rng(3)
    loss = rng.normal(size=(7, 31)).astype(np.float32)
    segments = np.sort(rng.integers(0, 6, (7, 31)).astype(np.int32), axis=1)
    mask = (rng.random((7, 31)) < 0.4) & (segments > 0)
    mask[3] = False
    total = count = 0.0
    for row in range(7):
        for segment in range(1, 6):
            tokens = loss[row].astype(np.float64)[mask[row] & (segments[row] == segment)]
            if len(tokens):
                total, count = total + tokens.mean(), count + 1
    args = jnp.asarray(np.where(mask, loss, np.nan)), jnp.asarray(mask), jnp.asarray(segments)
    out = jax.jit(losses.sequence_mean)(*args)
    np.testing.assert_allclose(out.total, total, rtol=1e-5)
    assert out.weight == count
    fixed = losses.fixed_length(*args, max_len=17)
    np.testing.assert_allclose(fixed.total, loss[mask].astype(np.float64).sum(), rtol=1e-4)
    assert fixed.weight == 17 * count


def test_every_id_up_to_the_length_of_the_row_counts():
    ids, on = jnp.array([[1, 2, 3]]), jnp.ones((1, 3), bool)
    out = losses.sequence_mean(jnp.array([[1.0, 2.0, 4.0]]), on, ids)
    assert [float(x) for x in out] == [7, 3]


@pytest.mark.parametrize("dirt", [-1, 7, 2**31 - 1])
def test_segment_ids_off_mask_may_be_anything(dirt):
    ids = jnp.where(MASK, SEGMENTS, dirt)
    for reduce in (losses.sequence_mean, partial(losses.fixed_length, max_len=9)):
        out = reduce(LOSS, MASK, ids)
        assert [float(x) for x in out] == [float(x) for x in reduce(LOSS, MASK, SEGMENTS)]


def test_nothing_to_count():
    off = jnp.zeros((2, 6), bool)
    for out in (
        losses.token_mean(LOSS, off),
        losses.sequence_mean(LOSS, off, SEGMENTS),
        losses.fixed_length(LOSS, off, SEGMENTS, max_len=9),
    ):
        assert [float(x) for x in out] == [0, 0]
        assert out.total.dtype == out.weight.dtype == jnp.float32


def test_errors():
    with pytest.raises(ValueError, match="max_len=0"):
        losses.fixed_length(LOSS, MASK, SEGMENTS, max_len=0)
    with pytest.raises(AssertionError):
        losses.token_mean(LOSS, MASK[:, :3])
    with pytest.raises(AssertionError):
        losses.sequence_mean(LOSS, MASK, SEGMENTS.astype(jnp.float32))
    for loss, mask in ((LOSS.astype(jnp.int32), MASK), (LOSS, MASK.astype(jnp.float32))):
        with pytest.raises(AssertionError):
            losses.token_mean(loss, mask)
