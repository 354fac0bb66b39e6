"""Rewards of a group of completions -> advantages: how much better than its siblings each is."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core import masked


def group_zscore(rewards: Array, is_valid: Array, *, ddof: int = 1, eps: float = 1e-4) -> Array:
    """Advantage (R - mean) / (std + eps) within each group of completions of one prompt.

    Args:
      rewards: [N, G] float32, reward units; one row for each prompt. Gradient stopped.
      is_valid: [N, G] bool; False where there is no reward. There, rewards may be anything.
      ddof: the squared deviations are divided by (number of valid samples - ddof).
      eps: reward units; keeps groups that almost agree from blowing up.
    Returns:
      [N, G] float32, dimensionless; exactly 0 where not valid, in a group of fewer than 2 valid
      samples (never the raw reward), and in a group whose valid rewards are all equal.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: if G is 1, or unless ddof is 0 or 1 and eps > 0.
    Source: arXiv:2402.03300 sec. 4.1.2 (GRPO), which has no eps and leaves ddof open.
    """
    if ddof not in (0, 1) or eps <= 0:
        raise ValueError(f"ddof={ddof}, eps={eps}: expected ddof 0 or 1 and eps > 0")
    centered = group_center(rewards, is_valid)
    (rewards,) = masked.clean(is_valid, jax.lax.stop_gradient(rewards), rank=2)
    std = masked.std(rewards, is_valid, 1, ddof=ddof, keepdims=True)
    return centered / (std + eps)


def group_center(rewards: Array, is_valid: Array) -> Array:
    """Advantage R - mean within each group of completions of one prompt.

    Args:
      rewards: [N, G] float32, reward units; one row for each prompt. Gradient stopped.
      is_valid: [N, G] bool; False where there is no reward. There, rewards may be anything.
    Returns:
      [N, G] float32, reward units; exactly 0 where `group_zscore` is.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: if G is 1.
    Source: arXiv:2503.20783 sec. 3.2 (Dr. GRPO).
    """
    (rewards,) = masked.clean(is_valid, jax.lax.stop_gradient(rewards), rank=2)
    if rewards.shape[1] == 1:
        raise ValueError("group_size=1 gives no baseline; use at least 2")
    mean = masked.mean(rewards, is_valid, 1, keepdims=True)
    # Compared, not computed: the rounding of the mean must not make an advantage of equal rewards.
    highest = masked.max(rewards, is_valid, 1, keepdims=True)
    lowest = masked.min(rewards, is_valid, 1, keepdims=True)
    return jnp.where(is_valid & (highest > lowest), rewards - mean, 0.0)


def overlong_penalty(lengths: Array, *, max_len: int, buffer: int) -> Array:
    """Reward 0 up to max_len - buffer, then falling linearly to -1 at max_len, and -1 beyond.

    Args:
      lengths: int32 of any shape, tokens; lengths of completions, stop token included.
      max_len: tokens; the limit on completions.
      buffer: tokens; the width of the soft punishment before the limit.
    Returns:
      float32 of the same shape, reward units; to be added to the reward.
    Raises:
      AssertionError: at trace time, if lengths is not int32.
      ValueError: unless 0 < buffer <= max_len.
    Source: arXiv:2503.14476 eq. 13 (DAPO).
    """
    chex.assert_type(lengths, jnp.int32)
    if not 0 < buffer <= max_len:
        raise ValueError(f"buffer={buffer}, max_len={max_len}: expected 0 < buffer <= max_len")
    return jnp.clip((max_len - buffer - lengths) / buffer, -1.0, 0.0).astype(jnp.float32)
