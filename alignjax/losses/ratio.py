"""Log-probs of one token under two policies -> ratios: their level, weights and masks from them.

A level maps log-probs to log-probs, so it goes on both sides of a ratio before a surrogate sees
them: `ppo_clip(level(logp, mask, ids), level(old_logp, mask, ids), advantage, mask)` clips the
ratio of the level. The same holds for the weights of this module.
"""

import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core import masked
from alignjax.losses import segments

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


def straight_expm1(x: Array) -> Array:
    """exp(x) - 1 up to x = 20, beyond it the tangent there: it never overflows nor loses slope."""
    low = jnp.where(x > MAX_LOG, MAX_LOG, x)
    return jnp.expm1(low) + jnp.exp(low) * (x - low)


def token_level(logp: Array, mask: Array, segment_ids: Array) -> Array:
    """logp itself: each token has its own ratio, as in PPO and GRPO.

    Args:
      logp: [B, T] float32, nats; log-prob of the token. Carries gradient.
      mask: [B, T] bool; True on completion tokens. Elsewhere inputs may be anything, even inf.
      segment_ids: [B, T] int32, 0 <= segment_ids <= T; the sequence of each token within its row.
        Not read at this level.
    Returns:
      [B, T] float32, nats, exactly 0 off mask.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: arXiv:1707.06347 sec. 3; arXiv:2402.03300 eq. 3.
    """
    del segment_ids  # here so that all levels are called alike
    (logp,) = masked.clean(mask, logp, rank=2)
    return logp


def sequence_level(logp: Array, mask: Array, segment_ids: Array) -> Array:
    """At each token the sum of logp over its sequence: the ratio is that of whole sequences.

    Arguments, result and errors as in `token_level`; segment_ids is read. Every token holds the
    term of its sequence: reduce with `sequence_mean`, which counts each sequence once.
    Source: arXiv:2402.14740 sec. 2.2: the completion as one action (RLOO).
    """
    return segments.total(logp, mask, segment_ids)


def sequence_mean_level(logp: Array, mask: Array, segment_ids: Array) -> Array:
    """At each token the mean of logp over its sequence: the ratio to the power 1 / length.

    Arguments, result and errors as in `sequence_level`.
    Source: arXiv:2507.18071 eq. 7 (GSPO).
    """
    return segments.mean(logp, mask, segment_ids)


def sequence_token_level(logp: Array, mask: Array, segment_ids: Array) -> Array:
    """stop_gradient(mean of logp over the sequence) + logp - stop_gradient(logp).

    The value is that of `sequence_mean_level`, the gradient that of the token alone, so that tokens
    of one sequence may have different advantages. Arguments, result and errors as in
    `sequence_level`.
    Source: arXiv:2507.18071 eq. 13-14 (GSPO-token).
    """
    (logp,) = masked.clean(mask, logp, rank=2)
    still = jax.lax.stop_gradient(logp)
    return segments.mean(still, mask, segment_ids) + (logp - still)


def truncated_weight(
    old_logp: Array, rollout_logp: Array, mask: Array, *, cap: float = 2.0
) -> Array:
    """Per-token weight min(exp(old_logp - rollout_logp), cap), to multiply the loss with.

    It corrects for an engine whose probabilities are not those of the trainer: the tokens were
    drawn from rollout_logp. Both must be of one temperature and of one support (top-k, top-p).

    Args:
      old_logp: [B, T] float32, nats; log-prob of the token that the trainer computes for the
        parameters that sampled, at any level. Gradient stopped.
      rollout_logp: [B, T] float32, nats; the same as the engine recorded it. Gradient stopped.
      mask: [B, T] bool; True on completion tokens. Elsewhere inputs may be anything, even inf.
      cap: dimensionless; the largest weight.
    Returns:
      [B, T] float32, dimensionless, exactly 0 off mask. No gradient.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless cap > 0.
    Source: F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"
    (2025): truncated importance sampling.
    """
    if not cap > 0:
        raise ValueError(f"cap={cap}: expected the largest weight, > 0")
    return jnp.where(mask, jnp.minimum(_rollout_ratio(old_logp, rollout_logp, mask), cap), 0.0)


def masked_weight(
    old_logp: Array, rollout_logp: Array, mask: Array, *, low: float = 0.5, high: float = 5.0
) -> Array:
    """Per-token weight k = exp(old_logp - rollout_logp) if low <= k <= high, else 0.

    Arguments and result as in `truncated_weight`; a token of weight 0 still counts in a mean.

    Args:
      low, high: dimensionless; the range outside of which a token, or at a level of sequences a
        sequence, is left out.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless 0 <= low <= 1 <= high.
    Source: arXiv:2510.18855 (IcePop, at the level of tokens).
    """
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"low={low}, high={high}: expected 0 <= low <= 1 <= high")
    ratio = _rollout_ratio(old_logp, rollout_logp, mask)
    return jnp.where(mask & (ratio >= low) & (ratio <= high), ratio, 0.0)


def off_policy_sequence_mask(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    segment_ids: Array,
    *,
    max_divergence: float,
) -> Array:
    """False where A < 0 and the mean of old_logp - logp over the sequence > max_divergence.

    What the policy has moved away from and was bad is not worth learning from. The policy loss of
    the other tokens is kept; in a mean all of them still count.

    Args:
      logp: [B, T] float32, nats; log-prob of the sampled token under the policy. No gradient.
      old_logp: [B, T] float32, nats; the same under the policy that sampled it, best as the engine
        recorded it, so that its error counts as well. No gradient.
      advantage: [B, T] float32, reward units. No gradient.
      mask: [B, T] bool; True on completion tokens. Elsewhere inputs may be anything, even inf.
      segment_ids: [B, T] int32, 0 <= segment_ids <= T; the sequence of each token within its row.
      max_divergence: nats per token; the paper gives no number.
    Returns:
      [B, T] bool; True where the loss is kept, False off mask.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless max_divergence >= 0.
    Source: arXiv:2512.02556 sec. 3.1 (DeepSeek-V3.2, off-policy sequence masking).
    """
    if not max_divergence >= 0:
        raise ValueError(f"max_divergence={max_divergence}: expected nats per token, >= 0")
    logp, old_logp, advantage = masked.clean(mask, logp, old_logp, advantage, rank=2)
    divergence = segments.mean(old_logp - logp, mask, segment_ids)
    return mask & ~((advantage < 0) & (divergence > max_divergence))


def _rollout_ratio(old_logp: Array, rollout_logp: Array, mask: Array) -> Array:
    return jax.lax.stop_gradient(capped_exp(token_log_ratio(old_logp, rollout_logp, mask)))
