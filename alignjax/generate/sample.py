"""Logits and one uniform number per row -> a token and its log-prob. Pure functions of arrays."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from alignjax.generate.truncate import Truncation, kept_all, threshold

_BLOCK = 256
"""Tokens whose probabilities are summed before the cumulative distribution is: one pass over the
vocabulary finds the block in which a row's token lies, and the block is searched by itself."""


def sample_token(
    logits: Array, uniform: Array, temperature: Array, truncation: Truncation
) -> tuple[Array, Array]:
    """Draws one token per row by inverting the cumulative distribution at one uniform number.

    One uniform per row replaces one Gumbel per row and token, which is far cheaper at a large
    vocabulary. A float32 uniform has 23 bits: probabilities below about 1e-7 are not resolved.

    Args:
      logits: [N, V] float32.
      uniform: [N] float32 in [0, 1].
      temperature: [] float32 >= 0; 0 takes the most likely token.
      truncation: which tokens may be drawn; see `truncate.threshold`.
    Returns:
      tokens [N] int32, each of some probability; logps [N] float32, nats, under the distribution
      that was drawn from. At temperature 0 that is certain, so the log-prob is the one of
      temperature 1, of all tokens.
    """
    chex.assert_rank([logits, uniform], [2, 1])
    chex.assert_type(logits, jnp.float32)
    num_rows, vocab = logits.shape
    is_greedy = temperature == 0
    scaled = logits / jnp.where(is_greedy, 1.0, temperature)
    bound = jax.lax.cond(
        truncation.is_on & ~is_greedy,
        lambda: threshold(scaled, truncation),
        lambda: kept_all(num_rows, vocab),
    )
    kept = jnp.where(bound.keeps(scaled), scaled, -jnp.inf)
    size = min(_BLOCK, vocab)
    kept = jnp.pad(kept, [(0, 0), (0, -vocab % size)], constant_values=-jnp.inf)
    values = kept.reshape(num_rows, -1, size)
    tops = jnp.max(values, axis=-1)
    top = jnp.max(tops, axis=-1)
    sums = jnp.sum(jnp.exp(values - top[:, None, None]), axis=-1)
    cdf = jnp.cumsum(sums, axis=-1)
    total = cdf[:, -1]
    target = uniform * total
    block = jnp.where(
        is_greedy, jnp.argmax(tops == top[:, None], axis=-1), _first_above(cdf, sums, target)
    )
    before = jnp.take_along_axis(cdf - sums, block[:, None], axis=-1)[:, 0]
    inner = jax.vmap(lambda rows, i: jax.lax.dynamic_index_in_dim(rows, i, keepdims=False))(
        values, block
    )
    probs = jnp.exp(inner - top[:, None])
    place = jnp.where(
        is_greedy,
        jnp.argmax(inner == top[:, None], axis=-1),
        _first_above(jnp.cumsum(probs, axis=-1), probs, target - before),
    )
    value = jnp.take_along_axis(inner, place[:, None], axis=-1)[:, 0]
    tokens = (block * size + place).astype(jnp.int32)
    return tokens, value - top - jnp.log(total)


def _first_above(cdf: Array, probs: Array, target: Array) -> Array:
    """[N, M], [N, M], [N] -> [N]: the first place where the sum so far exceeds the target.

    XLA sums in parallel, so that the sum may move, even fall, where there is no probability: only
    places that have some are asked. Rounding may leave all of them at or below the target: then it
    is the last of them.
    """
    has_some = probs > 0
    is_hit = (cdf > target[:, None]) & has_some
    last = probs.shape[-1] - 1 - jnp.argmax(has_some[:, ::-1], axis=-1)
    return jnp.where(jnp.any(is_hit, axis=-1), jnp.argmax(is_hit, axis=-1), last)
