"""Losses by token or example -> Weighted(total, weight), added over micro-batches, divided once.

A sequence is a segment: the tokens of one row with one segment id. So the result is the same
whether sequences share rows or have one each.
"""

import chex
import jax.numpy as jnp
from jax import Array

from alignjax.core import masked
from alignjax.core.types import Weighted
from alignjax.losses import segments


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
    (loss,) = masked.clean(mask, loss, rank=2)
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
    (loss,) = masked.clean(mask, loss, rank=2)
    means = loss / segments.length(mask, segment_ids)
    return Weighted(jnp.sum(means), segments.count(mask, segment_ids))


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
    if max_len < 1:
        raise ValueError(f"max_len={max_len}: expected the limit on completion tokens, at least 1")
    (loss,) = masked.clean(mask, loss, rank=2)
    return Weighted(masked.sum(loss, mask), segments.count(mask, segment_ids) * max_len)


def sequence_sum(loss: Array, mask: Array, segment_ids: Array) -> Weighted:
    """Sum over tokens; the weight is the number of sequences.

    Arguments, result and errors as in `sequence_mean`. For losses of tokens whose sum is the loss
    of the sequence; what holds the term of the sequence at each token goes to `sequence_mean`.
    Source: arXiv:2402.14740 sec. 2.2: the log-prob of a completion is the sum over its tokens.
    """
    (loss,) = masked.clean(mask, loss, rank=2)
    return Weighted(masked.sum(loss, mask), segments.count(mask, segment_ids))


def micro_batch_mean(loss: Array, mask: Array) -> Weighted:
    """Mean over the tokens of the batch given; the weight is 1, or 0 if no token counts.

    Arguments and errors as in `token_mean`. By its definition, and unlike all others here, the
    gradient depends on the split into micro-batches: a token of a short one weighs more. Prefer
    `token_mean`; this is for comparison with runs that were made so.
    Source: what other libraries call BNPO; no paper defines it.
    """
    (loss,) = masked.clean(mask, loss, rank=2)
    return Weighted(masked.mean(loss, mask), jnp.any(mask).astype(jnp.float32))


def example_mean(loss: Array, is_valid: Array) -> Weighted:
    """Sum over examples; the weight is their number.

    Args:
      loss: [N] or [N, G] float32; of pairs, examples or groups of them. Carries gradient.
      is_valid: bool of the same shape; True on the examples that count. Elsewhere loss may be
        anything, even nan.
    Returns:
      Weighted of [] float32; 0, 0 if no example counts.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: arXiv:2305.18290 eq. 7 (DPO), an expectation over pairs, is one example.
    """
    chex.assert_rank(loss, {1, 2})
    (loss,) = masked.clean(is_valid, loss, rank=loss.ndim)
    return Weighted(masked.sum(loss, is_valid), jnp.sum(is_valid, dtype=jnp.float32))
