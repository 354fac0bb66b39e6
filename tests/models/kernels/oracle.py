"""Attention and its gradient in NumPy float64, a head and a query at a time; and inputs for it."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Inputs(NamedTuple):
    """Arguments of `attend` by position; NumPy."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    query_segments: np.ndarray
    key_segments: np.ndarray

    def cast(self, dtype) -> Inputs:
        """Copies, so that a test may change its arrays while JAX still computes."""
        return Inputs(*(jnp.array(x, dtype) for x in self[:3]), *map(jnp.array, self[3:]))


def draw(segments, *, time=None, heads=6, kv_heads=3, head_dim=8, seed=0) -> Inputs:
    """Normal q, k, v; the last `time` slots (all of them by default) are queries.

    Args:
      segments: rows of the segments of each slot.
    """
    segments = np.asarray(segments, np.int32)
    batch, slots = segments.shape
    time = slots if time is None else time
    rng = np.random.default_rng(seed)
    shapes = [(batch, time, heads, head_dim), *[(batch, kv_heads, head_dim, slots)] * 2]
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return Inputs(q, k, v, segments[:, slots - time :], segments)


def is_seen(b, t, s, inputs, first_slot, window, branches=None, positions=None) -> bool:
    own = first_slot + t
    distance = own - s
    if branches is not None:
        distance = positions[b, t] - positions[b, s]
        if branches[b, s] not in (0, branches[b, t]):
            return False
    is_near = s <= own and (window is None or distance < window)
    return bool(is_near and inputs.query_segments[b, t] == inputs.key_segments[b, s])


def attention(
    inputs, cotangent, *, scale, first_slot=0, window=None, soft_cap=None, **branches_and_positions
):
    """Output, and the gradient of sum(output * cotangent) by q, k and v.

    Returns:
      out, dq [B, T, H, head_dim]; dk, dv [B, K, head_dim, S]; float64.
    """
    q, k, v = (np.asarray(x, np.float64) for x in inputs[:3])
    (batch, time, heads, _), (_, kv_heads, _, slots) = q.shape, k.shape
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, t, h in np.ndindex(batch, time, heads):
        g = h // (heads // kv_heads)
        rules = inputs, first_slot, window
        seen = [s for s in range(slots) if is_seen(b, t, s, *rules, **branches_and_positions)]
        keys, values = k[b, g][:, seen].T, v[b, g][:, seen].T
        scores, slope = scale * (keys @ q[b, t, h]), 1.0
        if soft_cap is not None:
            slope = 1 / np.cosh(scores / soft_cap) ** 2
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[b, t, h] = weights @ values
        do = np.asarray(cotangent[b, t, h], np.float64)
        dscores = scale * slope * weights * (values @ do - out[b, t, h] @ do)
        dq[b, t, h] = dscores @ keys
        dk[b, g][:, seen] += np.outer(q[b, t, h], dscores)
        dv[b, g][:, seen] += np.outer(do, weights)
    return out, dq, dk, dv
