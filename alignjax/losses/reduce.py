"""Per-token losses -> Weighted(total, weight), to be added over micro-batches and divided once.

A sequence is a segment: the tokens of one row with one segment id. So the result is the same
whether sequences share rows or have one each.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core import masked
from alignjax.core.types import Weighted


def token_mean(loss: Array, mask: Array) -> Weighted:
    """Sum over tokens; the weight is the number of tokens.

    Args:
      loss: [B, T] float32. Carries gradient.
      mask: [B, T] bool; True on the tokens that count. Elsewhere loss may be anything, even nan.
        Never True on the first token of a sequence or segment, which nothing predicts: its loss,
        0 or of another segment, would be counted.
    Returns:
      Weighted of [] float32; 0, 0 if no token counts.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: arXiv:2503.14476 sec. 3.3 (DAPO), where the division is over the global batch.
    """
    _check(loss, mask)
    return Weighted(masked.sum(loss, mask), jnp.sum(mask, dtype=jnp.float32))


def sequence_mean(loss: Array, mask: Array, segment_ids: Array) -> Weighted:
    """Sum over sequences of the mean over their tokens; the weight is the number of sequences.

    Args:
      loss: [B, T] float32. Carries gradient.
      mask: as in `token_mean`; elsewhere segment_ids, too, may be anything.
      segment_ids: [B, T] int32, 0 <= segment_ids <= T; the sequence of each token within its row.
    Returns:
      Weighted of [] float32. A sequence without a token that counts has no weight.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: arXiv:2402.03300 eq. 3 (GRPO).
    """
    _check(loss, mask, segment_ids)
    segment_ids = jnp.where(mask, segment_ids, 0)  # beyond the row's length one would read nan
    counts = _token_counts(mask, segment_ids)
    lengths = jnp.take_along_axis(counts, segment_ids, axis=1)
    means = jnp.where(mask, loss, 0.0) / jnp.maximum(lengths, 1.0)
    return Weighted(jnp.sum(means), jnp.sum(counts > 0, dtype=jnp.float32))


def fixed_length(loss: Array, mask: Array, segment_ids: Array, *, max_len: int) -> Weighted:
    """Sum over tokens; the weight is the number of sequences times a constant length.

    Args:
      loss: [B, T] float32. Carries gradient.
      mask: as in `token_mean`; elsewhere segment_ids, too, may be anything.
      segment_ids: [B, T] int32, 0 <= segment_ids <= T; the sequence of each token within its row.
      max_len: tokens; the largest length a completion may have, never the longest of a batch.
    Returns:
      Weighted of [] float32. A sequence without a token that counts has no weight.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: if max_len < 1.
    Source: arXiv:2503.20783 sec. 3.2 (Dr. GRPO).
    """
    _check(loss, mask, segment_ids)
    if max_len < 1:
        raise ValueError(f"max_len={max_len}: expected the limit on completion tokens, at least 1")
    num_sequences = jnp.sum(_token_counts(mask, segment_ids) > 0, dtype=jnp.float32)
    return Weighted(masked.sum(loss, mask), num_sequences * max_len)


def _token_counts(mask: Array, segment_ids: Array) -> Array:
    """[B, T + 1] float32; number of masked tokens of each segment. Row by row: rows are sharded."""

    def row(on: Array, ids: Array) -> Array:
        return jax.ops.segment_sum(on, ids, num_segments=ids.size + 1)

    return jax.vmap(row)(mask.astype(jnp.float32), segment_ids)


def _check(loss: Array, mask: Array, *segment_ids: Array) -> None:
    chex.assert_rank([loss, mask, *segment_ids], 2)
    chex.assert_equal_shape([loss, mask, *segment_ids])
    chex.assert_type([loss, mask], [jnp.float32, bool])
    chex.assert_type([*segment_ids], jnp.int32)
