"""The clipped loss of a critic, from its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from tests.losses.case import Case, oracle_tests


def clipped_value_loss(values, old_values, returns, mask, *, clip=0.2):
    loss, is_clipped = np.zeros(mask.shape), np.zeros(mask.shape, bool)
    for i in zip(*np.nonzero(mask), strict=True):
        plain = (values[i] - returns[i]) ** 2
        near = min(max(values[i], old_values[i] - clip), old_values[i] + clip)
        clipped = (near - returns[i]) ** 2
        loss[i], is_clipped[i] = max(plain, clipped) / 2, clipped > plain
    return loss, is_clipped


TestOracles = oracle_tests(
    [
        Case(losses.clipped_value_loss, clipped_value_loss),
        Case(losses.clipped_value_loss, clipped_value_loss, {"clip": 1.5}),
    ]
)


def test_by_hand():
    # V_old 0, clip 0.25. V = 1: towards R = 1, it went too far to gain: (0.25 - 1)^2 / 2, clipped.
    # V = 1: away from R = -1, it pays in full: (1 + 1)^2 / 2. V = 0.125: within, (0.125 - 1)^2 / 2.
    values, returns = jnp.array([[1.0, 1.0, 0.125, 9.0]]), jnp.array([[1.0, -1.0, 1.0, jnp.nan]])
    mask = jnp.array([[True, True, True, False]])

    def total(values):
        out = losses.clipped_value_loss(values, jnp.zeros((1, 4)), returns, mask, clip=0.25)
        return out.loss.sum(), out

    grad, out = jax.grad(total, has_aux=True)(values)
    assert out.loss.tolist() == [[0.28125, 2.0, 0.3828125, 0.0]]
    assert out.is_clipped.tolist() == [[True, False, False, False]]
    assert grad.tolist() == [[0.0, 2.0, -0.875, 0.0]]


def test_before_the_update_it_is_half_the_squared_error():
    rng = np.random.default_rng(0)
    values, returns = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(2, 3, 5)))
    on = jnp.ones((3, 5), bool)

    def total(v):
        return losses.clipped_value_loss(v, values, returns, on).loss.sum()

    np.testing.assert_allclose(total(values), 0.5 * ((values - returns) ** 2).sum(), rtol=1e-6)
    # The two terms tie: the gradient must be neither halved nor doubled.
    np.testing.assert_allclose(jax.grad(total)(values), values - returns, rtol=1e-6)


def test_finite_at_extremes():
    far = jnp.array([[1e4, -1e4, 1e4, -1e4]])
    on = jnp.ones((1, 4), bool)
    value, grad = jax.value_and_grad(
        lambda v: losses.clipped_value_loss(v, -far, far[:, ::-1], on).loss.sum()
    )(far)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_errors():
    x, on = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match="clip=0: expected clip > 0"):
        losses.clipped_value_loss(x, x, x, on, clip=0)
    with pytest.raises(AssertionError):
        losses.clipped_value_loss(x, x[:, :1], x, on)
