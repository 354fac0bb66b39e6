"""Scores, penalties and limits -> the rewards that advantages are made of."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core import masked
from alignjax.losses import segments


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


def missing_eos_penalty(
    rewards: Array, has_eos: Array, is_valid: Array, *, penalty: float = 1.0
) -> Array:
    """Reward R, less penalty if the completion was cut before it sampled a stop token.

    Args:
      rewards: [N, G] float32, reward units. Gradient stopped.
      has_eos: [N, G] bool; whether the completion ends in a stop token that was sampled.
      is_valid: [N, G] bool; False where there is no reward. There, rewards may be anything.
      penalty: reward units.
    Returns:
      [N, G] float32, reward units; exactly 0 where not valid.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless penalty >= 0.
    Source: S. Huang et al., "The N Implementation Details of RLHF with PPO" (2023): in the code of
    arXiv:1909.08593 a completion without its ending is given -1 whatever it says. Here the reward
    is lowered, not replaced.
    """
    if penalty < 0:
        raise ValueError(f"penalty={penalty}: expected penalty >= 0; it is subtracted")
    (rewards,) = masked.clean(is_valid, jax.lax.stop_gradient(rewards), rank=2)
    chex.assert_equal_shape([has_eos, is_valid])
    chex.assert_type(has_eos, bool)
    return rewards - jnp.where(is_valid & ~has_eos, penalty, 0.0)


def clip_rewards(rewards: Array, is_valid: Array, *, low: float, high: float) -> Array:
    """Reward clip(R, low, high).

    Args:
      rewards: [N, G] float32, reward units. Gradient stopped.
      is_valid: [N, G] bool; False where there is no reward. There, rewards may be anything.
      low, high: reward units.
    Returns:
      [N, G] float32, reward units; exactly 0 where not valid, even if 0 is not within the limits.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless low < high.
    Source: arXiv:2307.04964 (Secrets of RLHF), which clips after normalising.
    """
    if not low < high:
        raise ValueError(f"low={low}, high={high}: expected low < high")
    (rewards,) = masked.clean(is_valid, jax.lax.stop_gradient(rewards), rank=2)
    return jnp.where(is_valid, jnp.clip(rewards, low, high), 0.0)


def token_rewards(
    score: Array, kl: Array, mask: Array, segment_ids: Array, *, kl_coef: Array | float
) -> Array:
    """Per-token reward -kl_coef kl_t, plus the score at the last masked token of each sequence.

    Args:
      score: [B, T] float32, reward units; read only at the last masked token of each sequence,
        elsewhere it may be anything. Gradient stopped.
      kl: [B, T] float32, nats; an estimate such as `k1` of the policy that sampled against the
        reference. Gradient stopped.
      mask: [B, T] bool; True on completion tokens. Elsewhere inputs may be anything, even inf.
      segment_ids: [B, T] int32, 0 <= segment_ids <= T; the sequence of each token within its row.
      kl_coef: reward units for each nat; a number or the [] array of a `KlControl`.
    Returns:
      [B, T] float32, reward units, exactly 0 off mask.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: arXiv:1909.08593 eq. 2, spread over the tokens as in arXiv:2203.02155 sec. 3.5.
    """
    (kl,) = masked.clean(mask, kl, rank=2)
    chex.assert_equal_shape([mask, score, segment_ids])
    chex.assert_type(segment_ids, jnp.int32)
    (score,) = masked.clean(segments.is_last(mask, segment_ids), score, rank=2)
    return jax.lax.stop_gradient(score - kl_coef * kl)


class RunningMoments(NamedTuple):
    """Moments of all rewards seen so far; part of the state of a run."""

    mean: Array
    """[] float32, reward units."""
    variance: Array
    """[] float32, squared reward units; the squared deviations are divided by their number."""
    num_rewards: Array
    """[] float32; number of rewards seen."""


def init_moments() -> RunningMoments:
    """Moments of nothing: under them `normalize_rewards` leaves rewards as they are."""
    return RunningMoments(jnp.zeros(()), jnp.ones(()), jnp.zeros(()))


def update_moments(state: RunningMoments, rewards: Array, is_valid: Array) -> RunningMoments:
    """Moments of all that `state` has seen and of the valid rewards, however they are split.

    Args:
      state: moments so far. Not differentiated.
      rewards: [N, G] float32, reward units. Gradient stopped.
      is_valid: [N, G] bool; False where there is no reward. There, rewards may be anything.
    Returns:
      RunningMoments; `state` itself if nothing is valid.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances" (1979), eq. 2.1.
    """
    (rewards,) = masked.clean(is_valid, jax.lax.stop_gradient(rewards), rank=2)
    added = jnp.sum(is_valid, dtype=state.num_rewards.dtype)
    count = state.num_rewards + added
    mean = masked.mean(rewards, is_valid)
    squares = masked.sum((rewards - mean) ** 2, is_valid)
    shift, frac = mean - state.mean, added / jnp.maximum(count, 1.0)
    squares += state.num_rewards * (state.variance + shift**2 * frac)
    variance = jnp.where(added > 0.0, squares / jnp.maximum(count, 1.0), state.variance)
    return RunningMoments(state.mean + shift * frac, variance, count)


def normalize_rewards(
    state: RunningMoments,
    rewards: Array,
    is_valid: Array,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> Array:
    """Reward (R - mean) / sqrt(variance + eps), by the moments of all rewards seen so far.

    Args:
      state: moments; include the rewards of this batch first, with `update_moments`.
      rewards: [N, G] float32, reward units. Gradient stopped.
      is_valid: [N, G] bool; False where there is no reward. There, rewards may be anything.
      shift_mean: False adds the mean again, so that only the spread is scaled.
      eps: squared reward units.
    Returns:
      [N, G] float32, dimensionless; exactly 0 where not valid.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless eps > 0.
    Source: arXiv:2307.04964 (Secrets of RLHF), reward normalisation.
    """
    if eps <= 0:
        raise ValueError(f"eps={eps}: expected eps > 0")
    (rewards,) = masked.clean(is_valid, jax.lax.stop_gradient(rewards), rank=2)
    scaled = (rewards - state.mean) / jnp.sqrt(state.variance + eps)
    return jnp.where(is_valid, scaled if shift_mean else scaled + state.mean, 0.0)
