"""Values of tokens and the returns that came -> the loss of a critic, per token, never reduced."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core import masked


class ValueLoss(NamedTuple):
    """A critic's loss and where the clip took the gradient away, for metrics."""

    loss: Array
    """[B, T] float32, squared reward units, exactly 0 off mask. Carries gradient."""
    is_clipped: Array
    """[B, T] bool; the clipped value is farther from the return. False off mask."""


def clipped_value_loss(
    values: Array, old_values: Array, returns: Array, mask: Array, *, clip: float = 0.2
) -> ValueLoss:
    """Per-token loss max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2.

    Args:
      values: [B, T] float32, reward units; value of the state in which the token was chosen.
        Carries gradient.
      old_values: [B, T] float32, reward units; the same before the update. Gradient stopped.
      returns: [B, T] float32, reward units; such as those of `gae`. Gradient stopped.
      mask: [B, T] bool; True on the tokens that the policy chose. Elsewhere inputs may be anything,
        even inf.
      clip: reward units; how far one update may move a value for gain.
    Returns:
      ValueLoss: loss [B, T] float32, is_clipped [B, T] bool.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless clip > 0.
    Source: the code of arXiv:1909.08593; the clip is in no equation of the PPO paper, see
    arXiv:2005.12729 sec. 3.
    """
    if clip <= 0:
        raise ValueError(f"clip={clip}: expected clip > 0")
    values, old, returns = masked.clean(
        mask, values, *map(jax.lax.stop_gradient, (old_values, returns)), rank=2
    )
    squares = (values - returns) ** 2
    # Within the clip the two are equal; beyond it the clipped one is constant: it has no gradient.
    clipped = (jnp.clip(values, old - clip, old + clip) - returns) ** 2
    is_clipped = clipped > squares
    return ValueLoss(0.5 * jnp.where(is_clipped, clipped, squares), is_clipped)
