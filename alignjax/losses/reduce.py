"""Per-token losses -> Weighted(total, weight), to be added over micro-batches and divided once.

A sequence is a segment: the tokens of one row with one segment id. So the result is the same
whether sequences share rows or have one each.
"""

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
