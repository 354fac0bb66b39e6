"""One query per row -> attention to a prompt that several rows share, and to a row's own tokens.

Parts with a softmax of their own each, merged by their denominators (arXiv:2112.05682 sec. 3): so
the keys of a prompt are read once for all rows that continue it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from alignjax.models.kernels.einsum import capped, float32_einsum

_EMPTY = float(jnp.finfo(jnp.float32).min)
_MAX_SUMMED = 4
"""Up to so many queries of one head of keys, sums of products are quicker than products of
matrices: they read the cache where it lies, without a copy of the layer's part of it."""


class Part(NamedTuple):
    """Keys and values, and which of them each query sees."""

    k: Array
    """[X, K, head_dim, S] of any float dtype, finite everywhere."""
    v: Array
    """[X, K, S, head_dim], as k. Time comes first here: so CPUs sum over it in vectors."""
    mask: Array
    """[X, Y, S] bool; Y queries at each X."""


class Seats(NamedTuple):
    """Which of N rows continues which of B prompts: each prompt has G seats."""

    of_row: Array
    """[N] int32: b * G + g, its seat."""
    rows: Array
    """[B * G] int32: the row in a seat; any row where it is empty."""


def decode_attention(
    q: Array,
    prompts: Part,
    own: Part,
    new: Part,
    seats: Seats,
    *,
    scale: float,
    soft_cap: float | None,
) -> Array:
    """softmax(scale q k) v over a row's prompt and its own tokens; query head h reads head h // R.

    Args:
      q: [N, H, head_dim]; H = K * R.
      prompts: of B prompts with G seats each: X = B, Y = G.
      own, new: of the rows, X = N and Y = 1: what they have added so far, and the token at work,
        which sees itself.
      seats: N rows in B * G seats.
    Returns:
      [N, H, head_dim] of the dtype of q; sums and softmax are float32.
    """
    num_rows, heads, head_dim = q.shape
    num_prompts, kv_heads = prompts.k.shape[:2]
    grouped = q.reshape(num_rows, 1, kv_heads, -1, head_dim)
    seated = grouped[seats.rows].reshape(num_prompts, -1, *grouped.shape[2:])
    of_prompts = _attend(seated, prompts, scale, soft_cap)
    parts = [
        [array.reshape(-1, *array.shape[2:])[seats.of_row] for array in of_prompts],
        *(
            [array[:, 0] for array in _attend(grouped, part, scale, soft_cap)]
            for part in (own, new)
        ),
    ]
    top = functools.reduce(jnp.maximum, [tops for tops, _, _ in parts])
    shares = [jnp.exp(tops - top) for tops, _, _ in parts]
    total = sum(totals * share for (_, totals, _), share in zip(parts, shares, strict=True))
    out = sum(
        outs * (share / total)[..., None] for (_, _, outs), share in zip(parts, shares, strict=True)
    )
    return out.reshape(num_rows, heads, head_dim).astype(q.dtype)


def _attend(
    q: Array, part: Part, scale: float, soft_cap: float | None
) -> tuple[Array, Array, Array]:
    """q [X, Y, K, R, head_dim] -> the largest score, the sum of exp(score - largest), both
    [X, Y, K, R] float32, and the values summed with these weights [X, Y, K, R, head_dim]."""
    size, num, kv_heads, shared, head_dim = q.shape
    queries = jnp.swapaxes(q, 1, 2).reshape(size, kv_heads, num * shared, head_dim)
    scores = capped(_product(queries, part.k) * scale, soft_cap)
    scores = scores.reshape(size, kv_heads, num, shared, -1)
    scores = jnp.where(part.mask[:, None, :, None], scores, _EMPTY)
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[..., None])
    total = jnp.sum(weights, axis=-1)
    out = _product(weights.reshape(size, kv_heads, num * shared, -1), part.v)
    out = out.reshape(size, kv_heads, num, shared, head_dim)
    return jnp.swapaxes(top, 1, 2), jnp.swapaxes(total, 1, 2), jnp.swapaxes(out, 1, 2)


def _product(a: Array, b: Array) -> Array:
    """[X, K, M, I] by [X, K, I, J] -> [X, K, M, J] float32."""

    def multiply(a: Array, b: Array) -> Array:
        if a.dtype != b.dtype:
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return float32_einsum("xkmi,xkij->xkmj", a, b)

    def summed(a: Array, b: Array) -> Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.sum(a[..., None] * b[:, :, None], axis=3)

    if a.shape[2] > _MAX_SUMMED:
        return multiply(a, b)
    # A TPU would write all keys and values out as float32 to sum them so.
    return jax.lax.platform_dependent(a, b, tpu=multiply, default=summed)
