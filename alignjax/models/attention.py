"""Hidden states, angles and a mask -> hidden states: grouped-query attention and its KV cache."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from alignjax.core.precision import matmul_precision
from alignjax.models.config import ModelConfig
from alignjax.models.layers import Linear, Norm, make_norm
from alignjax.models.rope import rotate


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far. All rows are filled up to the same index.

    Time is the last axis of k and v: that is how decoding reads them fastest.
    """

    k: Array
    """[L, B, K, head_dim, max_len] compute dtype; L layers, K heads of keys and values."""
    v: Array
    """As k."""
    segment_ids: Array
    """[B, max_len] int32; 0 where nothing, or padding, was written."""
    index: Array
    """[] int32; the slot that the next token is written to."""


class LayerCache(NamedTuple):
    """The whole cache and the number of the layer at work in it.

    The layers hand on one buffer rather than slices of it: a scan over slices copies each of them.
    """

    k: Array
    v: Array
    layer: Array
    index: Array

    def append(self, k: Array, v: Array) -> tuple[LayerCache, Array, Array]:
        """Writes [B, K, head_dim, T] at `index`; also returns all that the layer has by now."""
        start = (self.layer, 0, 0, 0, self.index)
        new_k = jax.lax.dynamic_update_slice(self.k, k[None].astype(self.k.dtype), start)
        new_v = jax.lax.dynamic_update_slice(self.v, v[None].astype(self.v.dtype), start)
        cache = self._replace(k=new_k, v=new_v)
        all_k = jax.lax.dynamic_index_in_dim(new_k, self.layer, keepdims=False)
        all_v = jax.lax.dynamic_index_in_dim(new_v, self.layer, keepdims=False)
        return cache, all_k, all_v


class Sight(NamedTuple):
    """What the queries of a call may see: keys of their own segment, in their own slot or before.

    A query always sees itself, so that no row of scores is empty, padding included.
    """

    query_segments: Array
    """[B, T] int32; query t sits in slot first_slot + t."""
    key_segments: Array
    """[B, S] int32; key s sits in slot s."""
    first_slot: Array | int = 0

    def mask(self, window: Array | int | None = None) -> Array:
        """[B, T, S] bool; with a window, of the last `window` slots only."""
        queries = self.first_slot + jnp.arange(self.query_segments.shape[1])
        keys = jnp.arange(self.key_segments.shape[1])
        is_same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        distance = queries[:, None] - keys[None, :]
        is_near = distance >= 0
        return is_same & (is_near if window is None else is_near & (distance < window))


def attend(
    q: Array, k: Array, v: Array, mask: Array, *, scale: float, soft_cap: float | None = None
) -> Array:
    """softmax(scale q k) v (arXiv:1706.03762 eq. 1); query head h reads head h // G.

    Args:
      q: [B, T, H, head_dim]; H = K * G.
      k, v: [B, K, head_dim, S], the dtype of q.
      mask: [B, T, S] bool; at least one True for each query.
      soft_cap: scores are soft_cap * tanh(scores / soft_cap) (arXiv:2408.00118 sec. 2).
    Returns:
      [B, T, H, head_dim] of the dtype of q; the softmax is float32.
    """
    batch, time, heads, head_dim = q.shape
    slots = k.shape[-1]
    # The heads that share keys are rows of one product of matrices.
    grouped = jnp.swapaxes(q, 1, 2).reshape(batch, k.shape[1], -1, head_dim)
    scores = _einsum("bkrh,bkhs->bkrs", grouped, k).reshape(batch, heads, time, slots) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    weights = weights.reshape(*grouped.shape[:3], slots)
    if weights.shape[2] == 1:  # Twice the same: CPUs sum a single row in another order than many.
        weights = jnp.repeat(weights, 2, axis=2)
    out = _einsum("bkrs,bkhs->bkrh", weights, v)[:, :, : grouped.shape[2]]
    return jnp.swapaxes(out.reshape(batch, heads, time, head_dim), 1, 2).astype(q.dtype)


def _einsum(spec: str, a: Array, b: Array) -> Array:
    """Sums in float32. XLA's CPU backend has no batched bfloat16 product that does: cast there."""

    def multiply(a: Array, b: Array) -> Array:
        precision = matmul_precision(a.dtype)
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)

    def cast(a: Array, b: Array) -> Array:
        return multiply(a.astype(jnp.float32), b.astype(jnp.float32))

    if a.dtype == jnp.float32:
        return multiply(a, b)
    return jax.lax.platform_dependent(a, b, cpu=cast, default=multiply)


class Attention(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245) with RoPE, QK-norm and biases where asked for."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width = {"embed": config.hidden_size}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        kwargs = {"std": config.initializer_range, "rngs": rngs}
        self.query = Linear(width, heads, bias=config.attention_bias, **kwargs)
        self.key = Linear(width, kv_heads, bias=config.attention_bias, **kwargs)
        self.value = Linear(width, kv_heads, bias=config.attention_bias, **kwargs)
        self.out = Linear(heads, width, bias=config.attention_out_bias, **kwargs)
        self.is_norm_of_all_heads = config.qk_norm == "whole"
        sizes = [config.head_dim, config.head_dim]
        if self.is_norm_of_all_heads:
            sizes = [config.num_heads * sizes[0], config.num_kv_heads * sizes[1]]
        self.query_norm, self.key_norm = (
            None if config.qk_norm is None else make_norm(config, size) for size in sizes
        )
        scalar = config.head_dim if config.query_scalar is None else config.query_scalar
        self.scale, self.soft_cap = scalar**-0.5, config.attention_soft_cap

    def __call__(
        self,
        x: Array,
        angles: tuple[Array, Array] | None,
        mask: Array,
        cache: LayerCache | None,
    ) -> tuple[Array, LayerCache | None]:
        """[B, T, D] -> [B, T, D]; the new keys and values go to the cache where there is one."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        q, k = self._normed(q, self.query_norm), self._normed(k, self.key_norm)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        k, v = (jnp.transpose(array, (0, 2, 3, 1)) for array in (k, v))
        if cache is not None:
            cache, k, v = cache.append(k, v)
        return self.out(attend(q, k, v, mask, scale=self.scale, soft_cap=self.soft_cap)), cache

    def _normed(self, x: Array, norm: Norm | None) -> Array:
        """[B, T, H, head_dim] -> the same."""
        if norm is None:
            return x
        if self.is_norm_of_all_heads:
            return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
        return norm(x)
