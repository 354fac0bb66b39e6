"""Keys or values as arrays, or as int8 codes with a scale for each token and head: half of bfloat16
and a quarter of float32."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Int8(NamedTuple):
    """x = codes * scale, where the scale is the largest |x| of the head over 127."""

    codes: Array
    """int8, the shape of x: [..., head_dim, T] or [..., T, head_dim]."""
    scale: Array
    """[..., T] float32."""


Stored = Array | Int8


def quantized(x: Array, axis: int) -> Int8:
    """[L, N, K, ...] of any float dtype, with the head's dimensions on `axis` 3 or 4."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axis) / 127
    # Of a head that is 0 everywhere all codes are 0, by whatever they are divided.
    divisor = jnp.expand_dims(jnp.where(scale > 0, scale, 1.0), axis)
    return Int8(jnp.round(x / divisor).astype(jnp.int8), scale)


def loaded(stored: Stored, axis: int) -> Array:
    """What was stored, float32 if it was codes."""
    if isinstance(stored, Int8):
        return stored.codes.astype(jnp.float32) * jnp.expand_dims(stored.scale, axis)
    return stored


def like(stored: Stored, x: Array, axis: int) -> Stored:
    """x, to be kept as `stored` is."""
    return quantized(x, axis) if isinstance(stored, Int8) else x.astype(stored.dtype)


def layer_of(stored: Stored, layer: Array) -> Stored:
    """[L, ...] -> [...]."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), stored)
