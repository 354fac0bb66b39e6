"""Queries, keys and values -> outputs by way of all scores: short contexts, and decoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core.precision import matmul_precision

NO_WINDOW = 2**30
"""A window wider than any context, where a number is needed."""


def visible(
    query_segments: Array,
    key_segments: Array,
    first_slot: Array | int = 0,
    window: Array | int | None = None,
    branches: Array | None = None,
    positions: Array | None = None,
) -> Array:
    """Which keys each query sees: those of its own segment, in its own slot or before.

    A query always sees itself, so that no row of scores is empty, padding included.

    Args:
      query_segments: [B, T] int32; query t sits in slot first_slot + t.
      key_segments: [B, S] int32; key s sits in slot s.
      window: so many slots are seen at most, the query's own among them; None: all of them.
      branches: [B, T] int32 where S = T and first_slot = 0: of its segment a query sees branch 0,
        the trunk, and its own branch alone.
      positions: [B, T] int32, given with branches: the window is then of positions, for between a
        trunk and its second branch there are slots of the first.
    Returns:
      [B, T, S] bool.
    """
    mask = query_segments[:, :, None] == key_segments[:, None, :]
    if branches is not None:
        mask &= sees_branch(branches, branches)
    if branches is not None and window is not None:
        assert positions is not None
        mask &= positions[:, None, :] > positions[:, :, None] - window
        window = None
    queries = first_slot + jnp.arange(query_segments.shape[1])
    keys = jnp.arange(key_segments.shape[1])
    is_near = keys[None, :] <= queries[:, None]
    if window is not None:
        is_near &= keys[None, :] > queries[:, None] - window
    return mask & is_near


def sees_branch(queries: Array, keys: Array) -> Array:
    """Branches [B, T] and [B, S] -> [B, T, S] bool: a key of the trunk or of one's own branch."""
    return (keys[:, None, :] == 0) | (keys[:, None, :] == queries[:, :, None])


def einsum_attention(
    q: Array, k: Array, v: Array, mask: Array, *, scale: float, soft_cap: float | None = None
) -> Array:
    """softmax(scale q k) v (arXiv:1706.03762 eq. 1); query head h reads head h // G.

    On a CPU a query alone has the bits that it has among many, except in small shapes: that keeps
    the log-probs of the sampler those of the trainer.

    Args:
      q: [B, T, H, head_dim]; H = K * G.
      k, v: [B, K, head_dim, S], the dtype of q; finite where the mask is False, too.
      mask: [B, T, S] bool; at least one True for each query.
      soft_cap: scores become cap tanh(score / cap), before the mask (arXiv:2408.00118 sec. 2).
    Returns:
      [B, T, H, head_dim] of the dtype of q; the softmax is float32.
    """
    batch, time, heads, head_dim = q.shape
    slots = k.shape[-1]
    # The heads that share keys are rows of one product of matrices.
    grouped = jnp.swapaxes(q, 1, 2).reshape(batch, k.shape[1], -1, head_dim)
    scores = float32_einsum("bkrh,bkhs->bkrs", grouped, k).reshape(batch, heads, time, slots)
    scores = capped(scores * scale, soft_cap)
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = _rounded(jax.nn.softmax(scores, axis=-1), q.dtype)
    weights = weights.reshape(*grouped.shape[:3], slots)
    if weights.shape[2] == 1:  # Twice the same: CPUs sum a single row in another order than many.
        weights = jnp.repeat(weights, 2, axis=2)
    out = float32_einsum("bkrs,bkhs->bkrh", weights, v)[:, :, : grouped.shape[2]]
    return jnp.swapaxes(out.reshape(batch, heads, time, head_dim), 1, 2).astype(q.dtype)


def _rounded(array: Array, dtype: jnp.dtype) -> Array:
    """Float32 -> dtype, for certain.

    Where `float32_einsum` casts back, XLA may drop a mere cast, and does so in some programs and
    not in others: sampler and trainer would differ.
    """
    if dtype == jnp.float32:
        return array
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(array, info.nexp, info.nmant).astype(dtype)


def capped(scores: Array, soft_cap: float | None) -> Array:
    """cap tanh(scores / cap); the scores themselves without a cap."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def float32_einsum(spec: str, a: Array, b: Array) -> Array:
    """Sums in float32. XLA's CPU backend has no batched bfloat16 product that does: cast there."""

    def multiply(a: Array, b: Array) -> Array:
        precision = matmul_precision(a.dtype)
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)

    def cast(a: Array, b: Array) -> Array:
        return multiply(a.astype(jnp.float32), b.astype(jnp.float32))

    if a.dtype == jnp.float32:
        return multiply(a, b)
    return jax.lax.platform_dependent(a, b, cpu=cast, default=multiply)
