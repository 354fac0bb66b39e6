"""Queries, keys and values -> outputs, block by block: memory grows with T, never with T times S.

Softmax as a running sum (arXiv:2112.05682; arXiv:2205.14135 algorithm 1), gradient from the output
and the log of the softmax's denominator alone (the same, algorithm 4 in its appendix). Plain JAX:
it runs on every platform, in every dtype, with a cache and without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from alignjax.core.loops import turning
from alignjax.models.kernels.einsum import NO_WINDOW, capped, float32_einsum, sees_branch

BLOCK = 256
"""Queries, and keys, to a block."""
RESIDUALS = "attention_residuals"
"""What `jax.checkpoint_policies.save_only_these_names` needs to keep, so that the backward pass
does not run the forward pass again: output and log of the denominator."""
_EMPTY = float(jnp.finfo(jnp.float32).min)


class _Static(NamedTuple):
    scale: float
    soft_cap: float | None


class _Layout(NamedTuple):
    """Where the blocks lie, as traced numbers."""

    first_slot: Array
    window: Array


class _Blocks(NamedTuple):
    """All inputs, cut along time and with the number of the block as the leading axis."""

    q: Array
    """[I, B, K, G, block, head_dim]."""
    k: Array
    """[J, B, K, head_dim, block]."""
    v: Array
    """As k."""
    query_segments: Array
    """[I, B, block] int32."""
    key_segments: Array
    """[J, B, block] int32."""
    branches: Array | None
    """[I, B, block] int32, of queries and keys alike; None: there are none."""
    positions: Array | None
    """As branches, and given with them."""


def chunked_attention(
    q: Array,
    k: Array,
    v: Array,
    query_segments: Array,
    key_segments: Array,
    *,
    first_slot: Array | int = 0,
    window: Array | int | None = None,
    scale: float,
    soft_cap: float | None = None,
    branches: Array | None = None,
    positions: Array | None = None,
    block: int = BLOCK,
) -> Array:
    """What `attend` says; float32 sums, gradients by q, k and v.

    Args:
      window, first_slot: may be traced; blocks of keys that no query can see are not computed.
      block: queries, and keys, to a block; time need not be a multiple of it.
    """
    batch, time, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1], k.shape[3]
    grouped = jnp.swapaxes(q, 1, 2).reshape(batch, kv_heads, -1, time, head_dim)
    query_block, key_block = min(block, time), min(block, slots)
    blocks = _Blocks(
        _cut(grouped, 3, query_block),
        _cut(k, 3, key_block),
        _cut(v, 3, key_block),
        _cut(query_segments, 1, query_block),
        _cut(key_segments, 1, key_block),
        None if branches is None else _cut(branches, 1, query_block),
        None if positions is None else _cut(positions, 1, query_block),
    )
    window = NO_WINDOW if window is None else window
    layout = _Layout(jnp.asarray(first_slot, jnp.int32), jnp.asarray(window, jnp.int32))
    out = _joined(_attention(_Static(scale, soft_cap), blocks, layout), 3, time)
    return jnp.swapaxes(out.reshape(batch, heads, time, head_dim), 1, 2)


def _cut(array: Array, axis: int, block: int) -> Array:
    """[.., T, ..] -> [blocks, .., block, ..]; the last block is filled up.

    Filling of keys lies after all queries, so that only filling of queries can see it.
    """
    num = -(-array.shape[axis] // block)
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, num * block - array.shape[axis])
    array = jnp.pad(array, widths)
    shape = (*array.shape[:axis], num, block, *array.shape[axis + 1 :])
    return jnp.moveaxis(array.reshape(shape), axis, 0)


def _joined(blocks: Array, axis: int, size: int) -> Array:
    """Inverse of `_cut`: [blocks, .., block, ..] -> [.., size, ..]."""
    blocks = jnp.moveaxis(blocks, 0, axis)
    shape = (*blocks.shape[:axis], -1, *blocks.shape[axis + 2 :])
    return jax.lax.slice_in_dim(blocks.reshape(shape), 0, size, axis=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, blocks: _Blocks, layout: _Layout) -> Array:
    """Like blocks.q, of its dtype."""
    return _forward(static, blocks, layout)[0]


def _forward(static: _Static, blocks: _Blocks, layout: _Layout) -> tuple[Array, Array]:
    """Output, like blocks.q, and logsumexp of the scores [I, B, K, G, block] float32.

    A query that sees nothing (of the filling, or no query at all) has output 0 and logsumexp 0.
    """

    def of_queries(i: Array, q: Array) -> tuple[Array, Array]:
        def add_keys(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = carry
            mask = _mask(blocks, layout, i, j)
            scores = jnp.where(mask, _scores(static, blocks, i, j), _EMPTY)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            v = blocks.v[j]
            added = float32_einsum("bkgts,bkhs->bkgth", weights.astype(v.dtype), v)
            total = total * shrink + jnp.sum(weights, axis=-1)
            return new_top, total, out * shrink[..., None] + added

        start = (
            jnp.full(q.shape[:-1], _EMPTY),
            jnp.zeros(q.shape[:-1], jnp.float32),
            jnp.zeros(q.shape, jnp.float32),
        )
        add = add_keys if seen is None else _only(seen[i], add_keys)
        with turning(_mean_pairs(blocks.k, blocks.q)):
            top, total, out = jax.lax.fori_loop(*_keys_of(blocks, layout, i), add, start)
        is_empty = top == _EMPTY  # what was summed until then has weight exp(0), not 0
        out = jnp.where(is_empty[..., None], 0.0, out / jnp.where(is_empty, 1.0, total)[..., None])
        return out.astype(q.dtype), jnp.where(is_empty, 0.0, top + jnp.log(total))

    seen = _seen(blocks, layout)
    numbers = jnp.arange(blocks.q.shape[0])
    return jax.lax.map(lambda block: of_queries(*block), (numbers, blocks.q))


def _keep(static: _Static, blocks: _Blocks, layout: _Layout) -> tuple[Array, Any]:
    out, logsumexp = checkpoint_name(_forward(static, blocks, layout), RESIDUALS)
    return out, (blocks, layout, out, logsumexp)


def _backward(static: _Static, residuals: Any, cotangent: Array) -> tuple[_Blocks, None]:
    """Once through all pairs of blocks: dk and dv are summed in the inner loop, dq in place."""
    blocks, layout, out, logsumexp = residuals
    # Of each query: sum over keys of weight times its derivative.
    mean = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def of_keys(dq: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        k, v = blocks.k[j], blocks.v[j]

        def add_queries(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            q, do = blocks.q[i], cotangent[i]
            scores, mask = _scores(static, blocks, i, j), _mask(blocks, layout, i, j)
            weights = jnp.exp(jnp.where(mask, scores, _EMPTY) - logsumexp[i][..., None])
            dv += float32_einsum("bkgth,bkgts->bkhs", do, weights.astype(do.dtype))
            dweights = float32_einsum("bkgth,bkhs->bkgts", do, v)
            dscores = weights * (dweights - mean[i][..., None]) * static.scale
            if static.soft_cap is not None:
                dscores *= 1 - jnp.square(scores / static.soft_cap)
            dscores = dscores.astype(q.dtype)
            dk += float32_einsum("bkgth,bkgts->bkhs", q, dscores)
            new_dq = dq[i] + float32_einsum("bkgts,bkhs->bkgth", dscores, k)
            return jax.lax.dynamic_update_index_in_dim(dq, new_dq, i, axis=0), dk, dv

        zero = jnp.zeros(k.shape, jnp.float32)
        add = add_queries if seen is None else _only(seen[:, j], add_queries)
        with turning(_mean_pairs(blocks.q, blocks.k)):
            dq, dk, dv = jax.lax.fori_loop(*_queries_of(blocks, layout, j), add, (dq, zero, zero))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    seen = _seen(blocks, layout)
    numbers = jnp.arange(blocks.k.shape[0])
    dq, (dk, dv) = jax.lax.scan(of_keys, jnp.zeros(blocks.q.shape, jnp.float32), numbers)
    return _Blocks(dq.astype(blocks.q.dtype), dk, dv, None, None, None, None), None


_attention.defvjp(_keep, _backward)


def _scores(static: _Static, blocks: _Blocks, i: Array, j: Array) -> Array:
    """Of queries i and keys j: [B, K, G, block, block] float32."""
    scores = float32_einsum("bkgth,bkhs->bkgts", blocks.q[i], blocks.k[j]) * static.scale
    return capped(scores, static.soft_cap)


def _seen(blocks: _Blocks, layout: _Layout) -> Array | None:
    """[I, J] bool: whether in any row a query of block i sees a key of block j. Of two branches
    none does; None without branches, where the bounds of the loops leave out such pairs."""
    if blocks.branches is None:
        return None
    columns = jnp.arange(blocks.k.shape[0])

    def row(i: Array) -> Array:
        return jax.vmap(lambda j: jnp.any(_mask(blocks, layout, i, j)))(columns)

    return jax.lax.map(row, jnp.arange(blocks.q.shape[0]))


def _only(seen: Array, add: Callable[[Array, Any], Any]) -> Callable[[Array, Any], Any]:
    """The body of a loop that does nothing where `seen` is False."""
    return lambda n, carry: jax.lax.cond(seen[n], add, lambda _, carry: carry, n, carry)


def _mask(blocks: _Blocks, layout: _Layout, i: Array, j: Array) -> Array:
    """Which queries i see which keys j: [B, 1, 1, block, block] bool."""
    queries = _first_query(blocks, layout, i) + jnp.arange(blocks.q.shape[-2])[:, None]
    keys = j * blocks.k.shape[-1] + jnp.arange(blocks.k.shape[-1])
    mask = keys <= queries
    if blocks.branches is None:
        mask &= keys > queries - layout.window
    else:
        assert blocks.positions is not None
        mask &= sees_branch(blocks.branches[i], blocks.branches[j])
        past = blocks.positions[i][:, :, None] - blocks.positions[j][:, None, :]
        mask &= past < layout.window
    mask &= blocks.query_segments[i][:, :, None] == blocks.key_segments[j][:, None, :]
    return mask[:, None, None]


def _first_query(blocks: _Blocks, layout: _Layout, i: Array) -> Array:
    """The slot of the first query of block i."""
    return layout.first_slot + i * blocks.q.shape[-2]


def _reach(blocks: _Blocks, layout: _Layout) -> Array | int:
    """How many slots a query looks back at most. A trunk may lie any number of slots before a
    branch, however few positions."""
    return layout.window if blocks.branches is None else NO_WINDOW


def _mean_pairs(inner: Array, outer: Array) -> float:
    """Blocks of the inner loop that meet one of the outer, on average; windows may leave out more.

    Of as many keys as queries each block sees itself and those before; of others perhaps all.
    """
    return (len(inner) + 1) / 2 if len(inner) == len(outer) else len(inner)


def _keys_of(blocks: _Blocks, layout: _Layout, i: Array) -> tuple[Array, Array]:
    """The blocks of keys, from and up to, of which a query of block i can see some."""
    size, first = blocks.k.shape[-1], _first_query(blocks, layout, i)
    last = first + blocks.q.shape[-2] - 1
    low = jnp.maximum(first - _reach(blocks, layout) + 1, 0) // size
    return low, jnp.minimum(last // size + 1, blocks.k.shape[0])


def _queries_of(blocks: _Blocks, layout: _Layout, j: Array) -> tuple[Array, Array]:
    """The blocks of queries, from and up to, of which one can see a key of block j."""
    size, first = blocks.q.shape[-2], j * blocks.k.shape[-1]
    # The last slot that sees a key.
    last = first + blocks.k.shape[-1] - 1 + _reach(blocks, layout) - 1
    low = jnp.maximum(first - layout.first_slot, 0) // size
    high = jnp.maximum(last - layout.first_slot + size, 0) // size
    return low, jnp.minimum(high, blocks.q.shape[0])
