"""Sums over sequences of packed rows, by hand: off mask stands anything, id 0 is one like any."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses import segments

NAN = np.nan
X = np.array([[1.0, 2.0, NAN, 4.0, 5.0, np.inf], [NAN, 3.0, 7.0, NAN, NAN, NAN]], np.float32)
MASK = np.array([[1, 1, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0]], bool)
IDS = np.array([[0, 0, 0, 6, 6, 10**6], [-7, 2, 3, 2, -1, 3]], np.int32)


def test_total_length_and_mean():
    total = [[3, 3, 0, 9, 9, 0], [0, 3, 7, 0, 0, 0]]
    np.testing.assert_array_equal(segments.total(X, MASK, IDS), total)
    length = [[2, 2, 1, 2, 2, 1], [1, 1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(segments.length(MASK, IDS), length)
    np.testing.assert_array_equal(segments.mean(X, MASK, IDS), np.divide(total, length))


def test_the_gradient_is_that_of_the_masked_tokens():
    weights = np.arange(1.0, 7.0, dtype=np.float32)
    found = jax.grad(lambda x: jnp.sum(segments.total(x, MASK, IDS) * weights))(X)
    # Each token of a sequence receives the weights of all its tokens.
    np.testing.assert_array_equal(found, [[3, 3, 0, 9, 9, 0], [0, 2, 3, 0, 0, 0]])


def test_each():
    found = segments.each(X, MASK, IDS, num_segments=6)
    np.testing.assert_array_equal(found, [[0, 0, 0, 0, 0, 9], [0, 3, 7, 0, 0, 0]])


def test_last_and_count():
    last = [[0, 1, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0]]
    np.testing.assert_array_equal(segments.is_last(MASK, IDS), np.array(last, bool))
    assert segments.count(MASK, IDS) == 4
    # Unmasked tokens behind the last masked one share its id.
    alone = np.array([[True, False, False, False]])
    np.testing.assert_array_equal(segments.is_last(alone, np.zeros((1, 4), np.int32)), alone)


def test_wrong_shapes_and_types_are_refused():
    with pytest.raises(AssertionError):
        segments.total(X, MASK, IDS[:, :5])
    with pytest.raises(AssertionError):
        segments.total(X, MASK, IDS.astype(np.float32))
    with pytest.raises(AssertionError):
        segments.total(X[0], MASK[0], IDS[0])
