"""Log-ratios and the exponential that cannot overflow."""

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.losses.ratio import capped_exp, token_log_ratio


def test_log_ratio_by_hand():
    logp = jnp.array([[-1.0, np.inf, np.nan, -2.0]])
    other = jnp.array([[-3.0, np.inf, 0.0, -1.0]])
    mask = jnp.array([[True, False, False, True]])
    assert token_log_ratio(logp, other, mask).tolist() == [[2, 0, 0, -1]]
    grads = jax.grad(lambda a, b: token_log_ratio(a, b, mask).sum(), (0, 1))(logp, other)
    assert grads[0].tolist() == [[1, 0, 0, 1]]
    assert grads[1].tolist() == [[0, 0, 0, 0]]


def test_capped_exp():
    x = jnp.array([-jnp.inf, -1.0, 0.0, 19.0, 21.0, 1e30, jnp.inf])
    value, grad = capped_exp(x), jax.grad(lambda x: capped_exp(x).sum())(x)
    below = np.exp([-np.inf, -1.0, 0.0, 19.0])
    np.testing.assert_allclose(value, [*below, *[np.exp(20.0)] * 3], rtol=1e-6)
    np.testing.assert_allclose(grad, [*below, 0, 0, 0], rtol=1e-6)
    assert np.isnan(capped_exp(jnp.nan)) and np.isnan(jax.grad(capped_exp)(jnp.nan))
