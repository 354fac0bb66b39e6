"""Masked reductions against NumPy on the masked entries alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core import masked

X = np.array([[1.0, 5.0, np.nan, -2.0], [np.inf, 3.0, 7.0, 4.5], [np.nan, -np.inf, 0.0, 1.0]])
ON = np.array([[1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]], bool)


def by_row(function, empty):
    """Applies a NumPy function to the masked entries of each row, in float64."""
    return np.array([function(x[on]) if on.any() else empty for x, on in zip(X, ON, strict=True)])


@pytest.mark.parametrize(
    ("name", "function", "empty"),
    [
        ("sum", np.sum, 0.0),
        ("mean", np.mean, 0.0),
        ("std", np.std, 0.0),
        ("max", np.max, -np.inf),
        ("min", np.min, np.inf),
    ],
)
def test_reductions_read_nothing_off_mask(name, function, empty):
    reduce = getattr(masked, name)
    x, on = jnp.asarray(X, jnp.float32), jnp.asarray(ON)
    np.testing.assert_allclose(reduce(x, on, 1), by_row(function, empty), rtol=1e-6)
    np.testing.assert_allclose(reduce(x, on), function(X[ON]), rtol=1e-6)
    assert reduce(x, on, 1, keepdims=True).shape == (3, 1)
    assert reduce(x, on).dtype == jnp.float32


def test_std_by_hand():
    x = jnp.array([[1.0, 2.0, 6.0, 99.0]])
    on = jnp.array([[True, True, True, False]])  # mean 3, squares 4 + 1 + 9 = 14
    np.testing.assert_allclose(masked.std(x, on, 1, ddof=0), [np.sqrt(14 / 3)], rtol=1e-6)
    np.testing.assert_allclose(masked.std(x, on, 1, ddof=1), [np.sqrt(7)], rtol=1e-6)
    one = jnp.array([[False, True, False, False]])
    assert masked.std(x, one, 1, ddof=1).tolist() == [0.0]


def test_std_keeps_its_precision_under_a_large_mean():
    x = jnp.array([10000.0, 10000.5, 10001.0])  # variance 1/4 with ddof 1
    np.testing.assert_allclose(masked.std(x, jnp.ones(3, bool), ddof=1), 0.5, rtol=1e-6)


@pytest.mark.parametrize("name", ["sum", "mean", "std", "max", "min"])
def test_gradients_are_finite_and_zero_off_mask(name):
    def total(x):
        out = getattr(masked, name)(x, jnp.asarray(ON), 1)
        return jnp.sum(jnp.where(jnp.isfinite(out), out, 0.0))

    grad = np.asarray(jax.grad(total)(jnp.asarray(X, jnp.float32)))
    assert np.isfinite(grad).all()
    assert (grad[~ON] == 0).all()
    assert (grad[:2] != 0).any()


def test_gradient_of_std_where_all_are_equal_is_zero():
    on = jnp.ones((1, 3), bool)
    grad = jax.grad(lambda x: masked.std(x, on, 1, ddof=1).sum())(jnp.full((1, 3), 2.5))
    assert grad.tolist() == [[0.0, 0.0, 0.0]]


def test_gradient_of_std_by_hand():
    # d std / d x_i = (x_i - mean) / ((n - 1) std): mean 3, std sqrt(7).
    on = jnp.array([[True, True, True, False]])
    x = jnp.array([[1.0, 2.0, 6.0, 99.0]])
    grad = jax.grad(lambda x: masked.std(x, on, 1, ddof=1).sum())(x)
    expected = np.array([[-2.0, -1.0, 3.0, 0.0]]) / (2 * np.sqrt(7))
    np.testing.assert_allclose(grad, expected, rtol=1e-6)


def test_shapes_and_types_are_checked():
    with pytest.raises(AssertionError):
        masked.sum(jnp.ones((2, 3)), jnp.ones((3,), bool))
    with pytest.raises(AssertionError):
        masked.max(jnp.ones(3), jnp.ones(3))
