"""Ratios and advantages -> clipped policy-gradient surrogates, per token, never reduced."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core import masked
from alignjax.losses.ratio import capped_exp, token_log_ratio


class Surrogate(NamedTuple):
    """A surrogate loss and where the clip took the gradient away, for metrics."""

    loss: Array
    """[B, T] float32, reward units, exactly 0 off mask. Carries gradient."""
    is_low: Array
    """[B, T] bool; clipped from below: r < 1 - clip_low and A < 0. False off mask."""
    is_high: Array
    """[B, T] bool; clipped from above: r > 1 + clip_high and A > 0. False off mask."""

    @property
    def is_clipped(self) -> Array:
        """[B, T] bool; clipped on either side."""
        return self.is_low | self.is_high


def ppo_clip(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Surrogate:
    """Per-token loss -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logp - old_logp).

    Args:
      logp: [B, T] float32, nats; log-prob of the sampled token under the policy. Carries gradient.
      old_logp: [B, T] float32, nats; the same under the policy that sampled it. Gradient stopped.
      advantage: [B, T] float32, reward units. Gradient stopped.
      mask: [B, T] bool; True on completion tokens. Elsewhere inputs may be anything, even inf.
      clip_low, clip_high: dimensionless; trust-region width below and above r = 1.
    Returns:
      Surrogate: loss [B, T] float32, is_low and is_high [B, T] bool; is_clipped is their union.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless 0 <= clip_low < 1 and clip_high >= 0.
    Source: arXiv:1707.06347 eq. 7; clip_high > clip_low: arXiv:2503.14476 sec. 3.1. We differ in
    one point: r stops at exp(20), so that no float overflows.
    """
    (adv,) = masked.clean(mask, jax.lax.stop_gradient(advantage), rank=2)
    if not (0 <= clip_low < 1 and clip_high >= 0):
        raise ValueError(
            f"clip_low={clip_low}, clip_high={clip_high}: expected 0 <= clip_low < 1 and "
            "clip_high >= 0"
        )
    ratio = capped_exp(token_log_ratio(logp, old_logp, mask))
    is_low = (ratio < 1 - clip_low) & (adv < 0)
    is_high = (ratio > 1 + clip_high) & (adv > 0)
    # The minimum, case by case: unlike jnp.minimum, this does not halve the gradient at a tie.
    kept = jnp.where(is_low, 1 - clip_low, jnp.where(is_high, 1 + clip_high, ratio))
    return Surrogate(-kept * adv, is_low, is_high)
