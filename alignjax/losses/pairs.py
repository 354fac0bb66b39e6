"""Token log-probs of completions -> sums over sequences, and the pairs that preference losses take.

A pair is two completions of one prompt, one of them preferred. A completion is a sequence: the
masked tokens of one row with one segment id.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core import masked
from alignjax.losses import segments
from alignjax.losses.ratio import capped_exp


class Pairs(NamedTuple):
    """What policy and reference thought of both completions of N pairs; see `sequence_logps`."""

    chosen: Array
    """[N] float32, nats; sum of the policy's log-probs over the chosen completion. Carries
    gradient."""
    rejected: Array
    """[N] float32, nats; the same of the rejected completion. Carries gradient."""
    ref_chosen: Array
    """[N] float32, nats; the same under the reference. Gradient stopped. Not read by losses that
    need no reference."""
    ref_rejected: Array
    """[N] float32, nats."""
    chosen_len: Array
    """[N] int32, tokens; length of the chosen completion, at least 1: a completion truncated to
    nothing makes every loss that divides by its length inf or nan. Not read by the others."""
    rejected_len: Array
    """[N] int32, tokens."""
    is_valid: Array
    """[N] bool; False where there is no pair. There, everything else may be anything."""


class SequenceLogps(NamedTuple):
    """Log-probs of sequences, one entry for each; entry s that of segment s + 1 of the row."""

    sums: Array
    """[B, S] float32, nats; sum over the completion's tokens. Carries gradient."""
    lengths: Array
    """[B, S] int32, tokens; length of the completion."""
    is_valid: Array
    """[B, S] bool; False where the row has no such completion. There, sum and length are 0."""


def sequence_logps(
    logp: Array, mask: Array, segment_ids: Array, *, num_segments: int
) -> SequenceLogps:
    """Log-prob of each completion, sum_t log pi(y_t), of rows packed or not.

    Args:
      logp: [B, T] float32, nats; log-prob of each token. Carries gradient.
      mask: [B, T] bool; True on completion tokens. Elsewhere inputs may be anything, even inf.
      segment_ids: [B, T] int32, 1 <= segment_ids <= num_segments; the sequence of each token
        within its row.
      num_segments: S; 1 if rows are not packed.
    Returns:
      SequenceLogps of [B, S]: sums float32, lengths int32, is_valid bool.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    """
    sums = segments.each(logp, mask, segment_ids, num_segments=num_segments)
    lengths = _lengths(mask, segment_ids, num_segments)
    return SequenceLogps(sums, lengths, lengths > 0)


def length_desensitized_logps(
    logp: Array, mask: Array, segment_ids: Array, shared_len: Array, *, alpha: float = 0.5
) -> Array:
    """Per-token log-prob, times alpha beyond the length that both completions of a pair reach.

    Summed by `sequence_logps`, for policy and reference alike, it makes LD-DPO of `dpo`. alpha 1 is
    `dpo` itself; with alpha 0 what the longer completion has more does not count.

    Args:
      logp: [B, T] float32, nats; log-prob of each token. Carries gradient.
      mask: [B, T] bool; True on completion tokens. Elsewhere inputs may be anything, even inf.
      segment_ids: [B, T] int32; the sequence of each token within its row.
      shared_len: [B, T] int32, tokens; at each token the length of the shorter completion of its
        pair.
      alpha: dimensionless; weight of the tokens beyond it.
    Returns:
      [B, T] float32, nats, exactly 0 off mask.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless 0 <= alpha <= 1.
    Source: arXiv:2409.06411 (LD-DPO).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: expected 0 <= alpha <= 1")
    (logp,) = masked.clean(mask, logp, rank=2)
    chex.assert_equal_shape([mask, shared_len])
    chex.assert_type(shared_len, jnp.int32)
    # The n-th masked token of the row; less those before its own sequence, the n-th of that.
    nth = jnp.cumsum(mask, axis=1).astype(jnp.float32)
    is_last = segments.is_last(mask, segment_ids)
    end = segments.total(jnp.where(is_last, nth, 0.0), mask, segment_ids)
    nth_of_own = nth - (end - segments.length(mask, segment_ids))
    return jnp.where(nth_of_own <= shared_len, logp, alpha * logp)


def wpo_weights(
    logp: Array, log_collision: Array, mask: Array, segment_ids: Array, *, num_segments: int
) -> Array:
    """Weight exp(mean_t(log p(y_t) - log sum_v p(v)^2)) of each completion, for `wpo`.

    It says how likely the policy is to write the completion, against what it would write: about 1
    for its own samples. The weight of a pair is the product of those of its completions.

    Args:
      logp: [B, T] float32, nats; log-prob of each token under the policy. Gradient stopped.
      log_collision: [B, T] float32, nats; log of the sum of the squared probabilities of all
        tokens there, under the policy. Gradient stopped.
      mask: [B, T] bool; True on completion tokens. Elsewhere inputs may be anything, even inf.
      segment_ids: [B, T] int32, 1 <= segment_ids <= num_segments; the sequence of each token
        within its row.
      num_segments: S; 1 if rows are not packed.
    Returns:
      [B, S] float32, dimensionless; 0 where the row has no such completion. It stops at exp(20), so
      that no float overflows.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: arXiv:2406.11827 (WPO), sampled alignment.
    """
    logp, log_collision = masked.clean(mask, logp, log_collision, rank=2)
    aligned = jax.lax.stop_gradient(logp - log_collision)
    sums = segments.each(aligned, mask, segment_ids, num_segments=num_segments)
    lengths = _lengths(mask, segment_ids, num_segments)
    return jnp.where(lengths > 0, capped_exp(sums / jnp.maximum(lengths, 1)), 0.0)


def implicit_rewards(pairs: Pairs, *, beta: float = 0.1) -> tuple[Array, Array]:
    """Rewards beta (log pi - log pi_ref) of both completions, for metrics: they carry no gradient.

    Args:
      pairs: Pairs of [N].
      beta: reward units for a nat.
    Returns:
      The chosen completions' and the rejected ones', [N] float32 each, exactly 0 where not valid.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than that of `Pairs`.
      ValueError: unless beta > 0.
    Source: arXiv:2305.18290 sec. 4 (DPO).
    """
    check_positive("beta", beta)
    chosen, rejected = log_ratios(pairs)
    return beta * jax.lax.stop_gradient(chosen), beta * jax.lax.stop_gradient(rejected)


def log_ratios(pairs: Pairs) -> tuple[Array, Array]:
    """D_w and D_l: the policy's log-prob less the reference's of both completions, [N] each."""
    chosen, rejected, ref_chosen, ref_rejected = masked.clean(
        pairs.is_valid, pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected, rank=1
    )
    chosen = chosen - jax.lax.stop_gradient(ref_chosen)
    return chosen, rejected - jax.lax.stop_gradient(ref_rejected)


def policy_logps(pairs: Pairs) -> tuple[Array, Array]:
    """The policy's log-probs of both completions, [N] each; the reference is not read."""
    chosen, rejected = masked.clean(pairs.is_valid, pairs.chosen, pairs.rejected, rank=1)
    return chosen, rejected


def per_token(pairs: Pairs, chosen: Array, rejected: Array) -> tuple[Array, Array]:
    """Sums over both completions, each divided by its length."""
    chex.assert_equal_shape([pairs.is_valid, pairs.chosen_len, pairs.rejected_len])
    chex.assert_type([pairs.chosen_len, pairs.rejected_len], jnp.int32)
    chosen_len = jnp.where(pairs.is_valid, pairs.chosen_len, 1)
    return chosen / chosen_len, rejected / jnp.where(pairs.is_valid, pairs.rejected_len, 1)


def valid(pairs: Pairs, loss: Array) -> Array:
    """The loss, exactly 0 where there is no pair."""
    return jnp.where(pairs.is_valid, loss, 0.0)


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless value > 0."""
    if not value > 0:
        raise ValueError(f"{name}={value}: expected {name} > 0")


def _lengths(mask: Array, segment_ids: Array, num_segments: int) -> Array:
    ones = jnp.ones(mask.shape, jnp.float32)
    return segments.each(ones, mask, segment_ids, num_segments=num_segments).astype(jnp.int32)
