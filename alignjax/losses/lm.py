"""Log-probs of the tokens that are there -> the loss of a language model, per token."""

import chex
import jax.numpy as jnp
from jax import Array


def cross_entropy(logps: Array, mask: Array) -> Array:
    """Per-token loss -log p(token).

    Args:
      logps: [B, T] float32, nats; log-prob of each token. Carries gradient.
      mask: [B, T] bool; True on targets. Elsewhere logps may be anything, even inf or nan.
    Returns:
      [B, T] float32, nats, exactly 0 off mask.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: the negative log-likelihood; arXiv:2203.02155 sec. 3.5 (SFT).
    """
    chex.assert_rank([logps, mask], 2)
    chex.assert_equal_shape([logps, mask])
    chex.assert_type([logps, mask], [jnp.float32, bool])
    return jnp.where(mask, -logps, 0.0)
