"""Two log-probs of a token -> their difference, and an exponential of it that cannot overflow."""

import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core import masked

MAX_LOG = 20.0
"""Nats. A ratio above exp(20) = 4.9e8 is a fault of its inputs; float32 overflows at exp(88)."""


def token_log_ratio(logp: Array, other_logp: Array, mask: Array) -> Array:
    """Per-token log-ratio logp - other_logp.

    Args:
      logp: [B, T] float32, nats; log-prob of the token under the policy. Carries gradient.
      other_logp: [B, T] float32, nats; the same under another policy. Gradient stopped.
      mask: [B, T] bool; True on completion tokens. Elsewhere inputs may be anything, even inf or
        nan.
    Returns:
      [B, T] float32, nats, exactly 0 off mask.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    """
    logp, other_logp = masked.clean(mask, logp, other_logp, rank=2)
    return logp - jax.lax.stop_gradient(other_logp)


def capped_exp(x: Array) -> Array:
    """exp(min(x, MAX_LOG)): beyond the cap the value is exp(MAX_LOG) and the gradient 0.

    A nan stays one, so that whoever looks at the loss or its gradient sees it.
    """
    return jnp.exp(jnp.where(x > MAX_LOG, MAX_LOG, x))
