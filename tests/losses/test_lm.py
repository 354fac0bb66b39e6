"""Cross-entropy: the negative of what it is given, on the mask and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses


def test_value_and_gradient_by_hand():
    logps = jnp.array([[np.nan, -0.5, -2.0], [-np.inf, 3.0, -0.25]], jnp.float32)
    mask = jnp.array([[False, True, True], [False, False, True]])
    assert losses.cross_entropy(logps, mask).tolist() == [[0, 0.5, 2.0], [0, 0, 0.25]]
    grad = jax.grad(lambda x: losses.cross_entropy(x, mask).sum())(logps)
    assert grad.tolist() == [[0, -1, -1], [0, 0, -1]]


@pytest.mark.parametrize(
    ("logps", "mask"),
    [
        (jnp.zeros((2, 3)), jnp.ones((2, 3))),
        (jnp.zeros((2, 3)), jnp.ones((2, 2), bool)),
        (jnp.zeros(3), jnp.ones(3, bool)),
        (jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool)),
    ],
)
def test_shapes_and_types_are_checked(logps, mask):
    with pytest.raises(AssertionError):
        losses.cross_entropy(logps, mask)
