"""Tokens of packed rows -> what their sequences sum to, back at each token or one entry for each.

A sequence is a segment: the tokens of one row with one segment id. Segments of a row follow one
another. `segment_ids` is [B, T] int32 with 0 <= segment_ids <= T under the mask, and may be
anything off it. Rows are never mixed, so that a batch axis sharded over devices stays where it is.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core import masked


def total(x: Array, mask: Array, segment_ids: Array) -> Array:
    """At each masked token the sum over the masked tokens of its sequence.

    Args:
      x: [B, T] float32. Carries gradient.
      mask: [B, T] bool. Elsewhere x and segment_ids may be anything.
      segment_ids: [B, T] int32; the sequence of each token within its row.
    Returns:
      [B, T] float32, exactly 0 off mask.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    """
    x = _checked(x, mask, segment_ids)
    sums = _sums(x, segment_ids, mask.shape[1] + 1)
    return jnp.where(mask, jnp.take_along_axis(sums, segment_ids, axis=1), 0.0)


def length(mask: Array, segment_ids: Array) -> Array:
    """At each masked token the number of masked tokens of its sequence, float32; 1 off mask."""
    return jnp.where(mask, total(jnp.ones(mask.shape, jnp.float32), mask, segment_ids), 1.0)


def mean(x: Array, mask: Array, segment_ids: Array) -> Array:
    """At each masked token the mean over the masked tokens of its sequence. As `total`."""
    return total(x, mask, segment_ids) / length(mask, segment_ids)


def each(x: Array, mask: Array, segment_ids: Array, *, num_segments: int) -> Array:
    """Sums over sequences, one entry for each: [B, num_segments], entry s that of segment s + 1.

    Arguments as in `total`, 1 <= segment_ids <= num_segments under the mask. 0 for a sequence
    without a masked token.
    """
    x = _checked(x, mask, segment_ids)
    return _sums(x, segment_ids, num_segments + 1)[:, 1:]


def count(mask: Array, segment_ids: Array) -> Array:
    """Number of sequences with a masked token, over all rows: [] float32."""
    return jnp.sum(is_last(mask, segment_ids), dtype=jnp.float32)


def is_last(mask: Array, segment_ids: Array) -> Array:
    """[B, T] bool; True at the last masked token of each sequence."""
    times = jnp.where(mask, jnp.arange(mask.shape[1]), -1)

    def row(times: Array, ids: Array) -> Array:
        return jax.ops.segment_max(times, ids, num_segments=ids.size + 1)[ids]

    return mask & (jax.vmap(row)(times, segment_ids) == times)


def _sums(x: Array, ids: Array, num_segments: int) -> Array:
    def row(x: Array, ids: Array) -> Array:
        return jax.ops.segment_sum(x, ids, num_segments=num_segments)

    return jax.vmap(row)(x, ids)


def _checked(x: Array, mask: Array, segment_ids: Array) -> Array:
    """x, 0 off mask: segment ids that there are not then add nothing, wherever that is."""
    (x,) = masked.clean(mask, x, rank=2)
    chex.assert_equal_shape([mask, segment_ids])
    chex.assert_type(segment_ids, jnp.int32)
    return x
