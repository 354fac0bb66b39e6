"""Logits -> which tokens may be drawn: top-k, top-p and min-p without sorting the vocabulary.

Each keeps the first few tokens in the order of falling logits, of equal ones the lower id first. So
what is kept is told by the last of them: its logit and its id. Both are found by bisection, with a
pass over the vocabulary for each halving, and a few where a sort takes hundreds.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core.loops import turning


class Truncation(NamedTuple):
    """How a distribution is cut off, as traced numbers."""

    top_k: Array
    """[] int32; how many of the most likely tokens to keep; 0 keeps all."""
    top_p: Array
    """[] float32 in (0, 1]; keeps the smallest set of the most likely tokens whose probability,
    after top-k, reaches it. The most likely token is always kept."""
    min_p: Array
    """[] float32 in [0, 1]; keeps the tokens that are at least this fraction as likely as the most
    likely one; 0 keeps all."""

    @property
    def is_on(self) -> Array:
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)


class Bound(NamedTuple):
    """The last token that is kept."""

    value: Array
    """[N] float32; its logit."""
    token: Array
    """[N] int32; its id."""

    def keeps(self, logits: Array) -> Array:
        """[N, V] -> [N, V] bool."""
        value, ids = self.value[:, None], jnp.arange(logits.shape[1])
        return (logits > value) | ((logits == value) & (ids <= self.token[:, None]))


def kept_all(num_rows: int, vocab: int) -> Bound:
    """Every token is kept."""
    return Bound(jnp.full(num_rows, -jnp.inf, jnp.float32), jnp.full(num_rows, vocab, jnp.int32))


def threshold(logits: Array, truncation: Truncation) -> Bound:
    """Top-k, then top-p of what is left, then min-p.

    Args:
      logits: [N, V] float32, temperature applied.
    Source: top-k arXiv:1805.04833 sec. 5.4; top-p (nucleus) arXiv:1904.09751 eq. 2 and 3; min-p
      arXiv:2407.01082 sec. 3.
    """
    num_rows, vocab = logits.shape
    top = jnp.max(logits, axis=-1)
    num_kept = jnp.where(truncation.top_k > 0, jnp.minimum(truncation.top_k, vocab), vocab)
    ones = jnp.ones_like(logits)
    bound = _reach(logits, ones, jnp.full(num_rows, num_kept, jnp.float32), truncation.top_k > 0)
    weights = jnp.where(bound.keeps(logits), jnp.exp(logits - top[:, None]), 0.0)
    wanted = truncation.top_p * jnp.sum(weights, axis=-1)
    nucleus = _reach(logits, weights, wanted, truncation.top_p < 1)
    is_nearer = (nucleus.value > bound.value) | (
        (nucleus.value == bound.value) & (nucleus.token < bound.token)
    )
    bound = Bound(*(jnp.where(is_nearer, a, b) for a, b in zip(nucleus, bound, strict=True)))
    least = top + jnp.log(truncation.min_p)
    is_above = least > bound.value
    return Bound(jnp.where(is_above, least, bound.value), jnp.where(is_above, vocab, bound.token))


def _reach(logits: Array, weights: Array, wanted: Array, is_on: Array) -> Bound:
    """The first token, in the order of falling logits, at which the sum of weights reaches `wanted`
    [N]; the last of all if that is never, or not `is_on`. Weights of equal logits are equal."""
    num_rows, vocab = logits.shape
    order = _ordered(logits)

    def mass(is_in: Array) -> Array:
        return jnp.sum(jnp.where(is_in, weights, 0.0), axis=-1)

    def value_of_bound() -> Bound:
        least = _bisect(
            lambda middle: mass(order >= middle[:, None]) >= wanted,
            jnp.min(order, axis=-1), jnp.max(order, axis=-1),
        )  # fmt: skip
        is_equal = order == least[:, None]
        each = jnp.max(jnp.where(is_equal, weights, 0.0), axis=-1)
        missing = wanted - mass(order > least[:, None])
        num_equal = jnp.ceil(missing / jnp.where(each > 0, each, 1.0))
        num_equal = jnp.maximum(num_equal, 1).astype(jnp.int32)
        is_last = is_equal & (jnp.cumsum(is_equal, axis=-1) <= num_equal[:, None])
        token = jnp.max(jnp.where(is_last, jnp.arange(vocab), -1), axis=-1)
        value = jnp.max(jnp.where(is_equal, logits, -jnp.inf), axis=-1)
        return Bound(value, token)

    return jax.lax.cond(is_on, value_of_bound, lambda: kept_all(num_rows, vocab))


def _ordered(values: Array) -> Array:
    """Float32 -> int32 in the same order; both zeros are one."""
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.int32)
    return jnp.where(bits >= 0, bits, bits ^ jnp.int32(0x7FFFFFFF))


def _bisect(is_true: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """[N] int32: the largest number from low to high of which `is_true` holds.

    It holds of all numbers up to that one, and low is given out where it holds of none.
    """

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        # (low + high + 1) // 2 without the sum, which has no room in 32 bits.
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        holds = is_true(middle)
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle - 1)

    with turning(32):  # The bits of a number.
        low, _ = jax.lax.while_loop(
            lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, (low, high)
        )
    return low
