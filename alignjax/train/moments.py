"""An optimizer's moments in fewer bits: bfloat16, or 8 bits with a scale for each block.

Both are rounded at random. Rounded to the nearest, a second moment that falls by 1 - b2 = 0.05 or
less a step would stay where it is, since that is less than half the distance to the next value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from alignjax.core.keys import named_key
from alignjax.train.matrices import is_matrix
from alignjax.train.rounding import stochastic_round

if TYPE_CHECKING:
    from alignjax.core.types import Params

Kind = Literal["float32", "bfloat16", "int8"]
BLOCK = 128
"""Neighbours along the last axis that share a scale."""
_FIELDS = "mu", "nu"
"""Of optax's states: the first moment, which has signs, and the second one, which has none."""


class Codes(NamedTuple):
    """x = sign (|code| / levels)^4 scale, 127 levels with signs and 255 without.

    The fourth power spends codes on small values: the smallest is 4e-9 or 2e-10 of the largest of
    its block, and neighbours near the largest differ by 3% or 1.6%.
    """

    codes: Array
    """[..., N] int8, or uint8 where there are no signs."""
    scales: Array
    """[..., ceil(N / BLOCK)] float32: the largest magnitude of each block."""


def encode(x: Array, key: Array, *, is_signed: bool) -> Codes:
    """[..., N] float32 -> codes whose mean over keys is x.

    Without signs no value above 0 becomes 0: it divides, as the square root of a second moment.
    """
    size = x.shape[-1]
    padded = jnp.pad(jnp.abs(x), [(0, 0)] * (x.ndim - 1) + [(0, -size % BLOCK)])
    scales = jnp.max(padded.reshape(*x.shape[:-1], -1, BLOCK), axis=-1)
    share = jnp.abs(x) / jnp.maximum(_spread(scales, size), jnp.finfo(jnp.float32).tiny)
    levels = 127 if is_signed else 255
    low = jnp.clip(jnp.floor(levels * jnp.sqrt(jnp.sqrt(share))), 0, levels - 1)
    below, above = (low / levels) ** 4, ((low + 1) / levels) ** 4
    chance = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.float32) / 2**16
    codes = low + ((share - below) > chance * (above - below))
    if is_signed:
        return Codes((jnp.sign(x) * codes).astype(jnp.int8), scales)
    return Codes(jnp.where(x > 0, jnp.maximum(codes, 1), 0).astype(jnp.uint8), scales)


def decode(packed: Codes) -> Array:
    """[..., N] float32."""
    codes = packed.codes.astype(jnp.float32)
    levels = 127 if packed.codes.dtype == jnp.int8 else 255
    share = jnp.sign(codes) * (jnp.abs(codes) / levels) ** 4
    return share * _spread(packed.scales, codes.shape[-1])


def stored(transform: optax.GradientTransformation, kind: Kind) -> optax.GradientTransformation:
    """The same transformation, which keeps the moments of matrices in another type.

    Vectors, which are few, stay float32, and so do all sums: moments are widened, moved and
    rounded again in each update. The noise depends on the state's own counter and on names, so that
    an update is still a pure function of what a checkpoint holds.

    Args:
      transform: one whose state has a `count` and `mu`, `nu` or both.
    """
    if kind == "float32":
        return transform

    def init(params: Params) -> optax.OptState:
        return _zeros(transform.init(params), kind)

    def update(
        updates: Params, state: optax.OptState, params: Params | None = None
    ) -> tuple[Params, optax.OptState]:
        updates, state = transform.update(updates, _widened(state), params)
        return updates, _narrowed(state, kind)

    return optax.GradientTransformation(init, update)


def _narrowed(state: Any, kind: Kind) -> Any:
    key = jax.random.fold_in(jax.random.PRNGKey(0), state.count)

    def narrow(field: str, path: tuple, x: Array) -> Any:
        own = named_key(key, field, jax.tree_util.keystr(path))
        if kind == "bfloat16":
            return stochastic_round(x, own)
        return encode(x, own, is_signed=field == "mu")

    return _of_matrices(state, narrow)


def _zeros(state: Any, kind: Kind) -> Any:
    """Moments of a state before the first update, where they lie."""

    def zeros(field: str, path: tuple, x: Array) -> Any:
        if kind == "bfloat16":
            return jnp.zeros_like(x, jnp.bfloat16)
        codes = jnp.zeros_like(x, jnp.int8 if field == "mu" else jnp.uint8)
        return Codes(codes, jnp.zeros_like(x[..., ::BLOCK]))

    return _of_matrices(state, zeros)


def _of_matrices(state: Any, change: Callable[[str, tuple, Array], Any]) -> Any:
    def tree(field: str) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: change(field, path, x) if is_matrix(path, x) else x,
            getattr(state, field),
        )

    return state._replace(**{field: tree(field) for field in _FIELDS if field in state._fields})


def _widened(state: Any) -> Any:
    is_codes = lambda x: isinstance(x, Codes)  # noqa: E731

    def widen(x: Any) -> Array:
        return decode(x) if is_codes(x) else x.astype(jnp.float32)

    return state._replace(
        **{
            field: jax.tree.map(widen, getattr(state, field), is_leaf=is_codes)
            for field in _FIELDS
            if field in state._fields
        }
    )


def _spread(scales: Array, size: int) -> Array:
    """[..., B] -> [..., size]: the scale of each value."""
    return jnp.repeat(scales, BLOCK, axis=-1)[..., :size]
