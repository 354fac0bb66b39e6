"""Hidden states and angles -> hidden states: grouped-query attention and its KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

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
    """What a call's queries may see; see `kernels.attend`."""

    query_segments: Array
    key_segments: Array
    first_slot: Array | int
    layer: Array | int
    branches: Array | None = None
    positions: Array | None = None


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
        self.windows = config.windows

    def __call__(
        self,
        x: Array,
        angles: tuple[Array, Array] | None,
        sight: Sight,
        attend: Callable[..., Array],
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
        y = attend(
            q,
            k,
            v,
            sight.query_segments,
            sight.key_segments,
            first_slot=sight.first_slot,
            windows=self.windows,
            layer=sight.layer,
            scale=self.scale,
            soft_cap=self.soft_cap,
            branches=sight.branches,
            positions=sight.positions,
        )
        return self.out(y), cache

    def _normed(self, x: Array, norm: Norm | None) -> Array:
        """[B, T, H, head_dim] -> the same."""
        if norm is None:
            return x
        if self.is_norm_of_all_heads:
            return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
        return norm(x)
