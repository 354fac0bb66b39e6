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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignjax.models.attention import Sight
from alignjax.models.kernels.decode import Part, Seats, decode_attention
from alignjax.models.kernels.dispatch import layer_window
from alignjax.models.kv import Stored, layer_of, like, loaded, quantized
from alignjax.models.transformer import Model
from alignjax.sharding.mesh import BATCH_AXES
from alignjax.sharding.rules import fit

if TYPE_CHECKING:
    from alignjax.core.types import Params


class Prompts(NamedTuple):
    """What a model has read. Slots of prompts past their lengths mean nothing."""

    k: Stored
    """[L, B, K, head_dim, P] compute dtype, or codes."""
    v: Stored
    """[L, B, K, P, head_dim]."""
    lengths: Array
    """[B] int32."""
    hidden: Array
    """[B, D] compute dtype: of the last token, from which the first of a completion is drawn."""


class Own(NamedTuple):
    """Keys and values of what N rows have added to their prompts, the last C tokens at most."""

    k: Stored
    """[L, N, K, head_dim, C] compute dtype, or codes."""
    v: Stored
    """[L, N, K, C, head_dim]."""
    slot: Array
    """[] int32 below C: the slot that comes next."""

    @property
    def capacity(self) -> int:
        return jax.tree.leaves(self.k)[0].shape[-1]


class _New(NamedTuple):
    """Takes what a layer computes for its tokens in place of a cache; see `attention.LayerCache`.

    It goes to the ring after the last layer: a loop that both reads and writes the ring copies it.
    """

    k: Array | None = None
    """[N, K, head_dim, 1]."""
    v: Array | None = None

    def append(self, k: Array, v: Array) -> tuple[_New, Array, Array]:
        return _New(k, v), k, v


def kv_sharding(array: Any, mesh: Mesh) -> NamedSharding:
    """Where keys or values [L, N, K, ...] lie: texts over the batch's axes, heads over tensor."""
    spec = PartitionSpec(None, BATCH_AXES, "tensor", *[None] * (array.ndim - 3))
    return fit(NamedSharding(mesh, spec), array)


def _empty(model: Model, num: int, length: int, *, is_int8: bool) -> tuple[Stored, Stored]:
    """Keys and values of `num` texts of `length` tokens; never whole on one of several devices."""
    c, dtype, mesh = model.config, jnp.dtype(model.compute_dtype), model.mesh
    shape = (c.num_layers, num, c.num_kv_heads)

    def zeros(*last: int) -> Array:
        wanted = jax.ShapeDtypeStruct((*shape, *last), dtype)
        place = None if mesh is None or mesh.size == 1 else kv_sharding(wanted, mesh)
        return jnp.zeros(wanted.shape, dtype, device=place)

    k, v = zeros(c.head_dim, length), zeros(length, c.head_dim)
    return (quantized(k, 3), quantized(v, 4)) if is_int8 else (k, v)


def empty_prompts(model: Model, num: int, width: int, *, is_int8: bool = False) -> Prompts:
    """Room for `num` prompts of up to `width` tokens."""
    return Prompts(
        *_empty(model, num, width, is_int8=is_int8),
        lengths=jnp.ones(num, jnp.int32),
        hidden=jnp.zeros((num, model.config.hidden_size), model.compute_dtype),
    )


def empty_own(model: Model, num: int, capacity: int, *, is_int8: bool = False) -> Own:
    """Room for `capacity` tokens of each of `num` rows."""
    return Own(*_empty(model, num, capacity, is_int8=is_int8), slot=jnp.zeros((), jnp.int32))


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
    prompt_slots = jnp.arange(jax.tree.leaves(prompts.k)[0].shape[-1], dtype=jnp.int32)
    is_prompt = prompt_slots < prompts.lengths[:, None, None]
    ago = positions[seats.rows].reshape(num_prompts, num_each, 1) - prompt_slots

    def attend(q: Array, k: Array, v: Array, *_: Any, layer: Array, **how: Any) -> Array:
        window = layer_window(how["windows"], layer)
        is_seen, is_seen_prompt = is_own, is_prompt
        if window is not None:
            is_seen, is_seen_prompt = is_own & (past < window), is_prompt & (ago < window)
        part = lambda kv, mask: Part(  # noqa: E731
            loaded(layer_of(kv.k, layer), 2), loaded(layer_of(kv.v, layer), 3), mask
        )
        y = decode_attention(
            q[:, 0],
            part(prompts, is_seen_prompt),
            part(own, is_seen[:, None]),
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
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=own.slot)
    new_k, new_v = like(own.k, k, 3), like(own.v, jnp.swapaxes(v, 3, 4), 4)
    own = Own(
        k=jax.tree.map(functools.partial(put, axis=-1), own.k, new_k),
        v=jax.tree.map(functools.partial(put, axis=3), own.v, new_v),
        slot=jnp.mod(own.slot + 1, own.capacity),
    )
    return ends.norm(x)[:, 0], own
