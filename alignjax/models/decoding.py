"""Prompts and tokens -> hidden states of the next token: what the rollout engine asks of a model.

The keys and values of prompts and those of what rows have added to them are kept apart, so that
many rows may continue one prompt. A row's own ones lie in a ring that all rows write to at the same
slot in the same step, whenever each of them began: one write in place for all. Attention does not
ask in which order keys lie, and rotary embeddings were applied before they got there.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from alignjax.models.attention import Sight
from alignjax.models.kernels.decode import Part, Seats, decode_attention
from alignjax.models.kernels.dispatch import layer_window
from alignjax.models.transformer import Model

if TYPE_CHECKING:
    from alignjax.core.types import Params


class Prompts(NamedTuple):
    """What a model has read. Slots of prompts past their lengths mean nothing."""

    k: Array
    """[L, B, K, head_dim, P] compute dtype."""
    v: Array
    """[L, B, K, P, head_dim]."""
    lengths: Array
    """[B] int32."""
    hidden: Array
    """[B, D] compute dtype: of the last token, from which the first of a completion is drawn."""


class Own(NamedTuple):
    """Keys and values of what N rows have added to their prompts, the last C tokens at most."""

    k: Array
    """[L, N, K, head_dim, C] compute dtype."""
    v: Array
    """[L, N, K, C, head_dim]."""
    slot: Array
    """[] int32 below C: the slot that comes next."""

    @property
    def capacity(self) -> int:
        return self.k.shape[-1]


class _New(NamedTuple):
    """Takes what a layer computes for its tokens in place of a cache; see `attention.LayerCache`.

    It goes to the ring after the last layer: a loop that both reads and writes the ring copies it.
    """

    k: Array | None = None
    """[N, K, head_dim, 1]."""
    v: Array | None = None

    def append(self, k: Array, v: Array) -> tuple[_New, Array, Array]:
        return _New(k, v), k, v


def empty_prompts(model: Model, num: int, width: int) -> Prompts:
    """Room for `num` prompts of up to `width` tokens."""
    c, dtype = model.config, jnp.dtype(model.compute_dtype)
    shape = (c.num_layers, num, c.num_kv_heads)
    return Prompts(
        k=jnp.zeros((*shape, c.head_dim, width), dtype),
        v=jnp.zeros((*shape, width, c.head_dim), dtype),
        lengths=jnp.ones(num, jnp.int32),
        hidden=jnp.zeros((num, c.hidden_size), dtype),
    )


def empty_own(model: Model, num: int, capacity: int) -> Own:
    """Room for `capacity` tokens of each of `num` rows."""
    c, dtype = model.config, jnp.dtype(model.compute_dtype)
    shape = (c.num_layers, num, c.num_kv_heads)
    return Own(
        k=jnp.zeros((*shape, c.head_dim, capacity), dtype),
        v=jnp.zeros((*shape, capacity, c.head_dim), dtype),
        slot=jnp.zeros((), jnp.int32),
    )


def read_prompts(model: Model, params: Params, tokens: Array, lengths: Array) -> Prompts:
    """tokens [B, P] int32, right-padded, and lengths [B] int32, at least 1 -> what was read.

    The unembedding is not asked: of a prompt, only the last hidden state is kept.
    """
    batch, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    hidden, cache = model.apply(params, tokens, segments, positions, model.init_cache(batch, width))
    assert cache is not None
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return Prompts(cache.k, jnp.swapaxes(cache.v, 3, 4), lengths, last)


def read_tokens(
    model: Model,
    params: Params,
    tokens: Array,
    num_before: Array,
    prompts: Prompts,
    own: Own,
    seats: Seats,
) -> tuple[Array, Own]:
    """One token of each row, after its prompt and what it has added so far.

    Args:
      tokens: [N] int32.
      num_before: [N] int32 below C: how many tokens a row has added before this one. They are in
        the slots before `own.slot`, around the ring.
      seats: which prompt each row continues.
    Returns:
      hidden [N, D] of the compute dtype; the ring with the tokens added to it.
    """
    num_prompts, num_seats = prompts.lengths.shape[0], seats.rows.shape[0]
    num_each = num_seats // num_prompts
    positions = prompts.lengths[seats.of_row // num_each] + num_before
    slots = jnp.arange(own.capacity, dtype=jnp.int32)
    past = jnp.mod(own.slot - slots - 1, own.capacity) + 1  # so many steps ago it was written
    is_own = past <= num_before[:, None]
    prompt_slots = jnp.arange(prompts.k.shape[-1], dtype=jnp.int32)
    is_prompt = prompt_slots < prompts.lengths[:, None, None]
    ago = positions[seats.rows].reshape(num_prompts, num_each, 1) - prompt_slots

    def attend(q: Array, k: Array, v: Array, *_: Any, layer: Array, **how: Any) -> Array:
        window = layer_window(how["windows"], layer)
        is_seen, is_seen_prompt = is_own, is_prompt
        if window is not None:
            is_seen, is_seen_prompt = is_own & (past < window), is_prompt & (ago < window)
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
        y = decode_attention(
            q[:, 0],
            Part(take(prompts.k), take(prompts.v), is_seen_prompt),
            Part(take(own.k), take(own.v), is_seen[:, None]),
            Part(k, jnp.swapaxes(v, 2, 3), jnp.ones((tokens.shape[0], 1, 1), bool)),
            seats,
            scale=how["scale"],
            soft_cap=how["soft_cap"],
        )
        return y[:, None]

    ones = jnp.ones((tokens.shape[0], 1), jnp.int32)
    ends = model._ends.bind({name: params[name] for name in params if name != "layers"})
    x = ends.embed(tokens[:, None], positions[:, None], jnp.dtype(model.compute_dtype))
    pick_angles = model._angles(positions[:, None], ones > 0)

    def run_layer(x: Array, inputs: tuple[Any, Array]) -> tuple[Array, tuple[Array, Array]]:
        weights, number = inputs
        sight = Sight(ones, ones, 0, number)
        x, new, _ = model._layer.bind(weights)(x, pick_angles(number), sight, attend, _New())
        return x, (new.k, new.v)

    layers = (params["layers"], jnp.arange(model.config.num_layers))
    x, (k, v) = jax.lax.scan(run_layer, x, layers, unroll=2)
    own = Own(
        k=jax.lax.dynamic_update_slice(own.k, k.astype(own.k.dtype), (0, 0, 0, 0, own.slot)),
        v=jax.lax.dynamic_update_slice(
            own.v, jnp.swapaxes(v, 3, 4).astype(own.v.dtype), (0, 0, 0, own.slot, 0)
        ),
        slot=jnp.mod(own.slot + 1, own.capacity),
    )
    return ends.norm(x)[:, 0], own
