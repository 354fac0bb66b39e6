"""Logits and one uniform number per row -> a token and its log-prob. Pure functions of arrays."""

import chex
import jax
import jax.numpy as jnp
from jax import Array


def support(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Which tokens may be sampled: the top k of them, then the top p of what is left.

    Args:
      logits: [N, V] float32, temperature applied.
      top_k: [] int32; how many of the most likely tokens to keep; 0 keeps all. Of equal ones the
        lower id goes first.
      top_p: [] float32 in (0, 1]; keeps the smallest set of the most likely tokens whose
        probability, after top-k, reaches it. The most likely token is always kept.
    Returns:
      [N, V] bool.
    Source: top-k arXiv:1805.04833 sec. 5.4; top-p (nucleus) arXiv:1904.09751 eq. 2 and 3.
    """
    num_rows, vocab = logits.shape
    order = jnp.argsort(-logits, axis=-1, stable=True)
    rank = jnp.arange(vocab)
    in_top_k = rank < jnp.where(top_k > 0, top_k, vocab)
    ranked = jnp.where(in_top_k, jnp.take_along_axis(logits, order, axis=-1), -jnp.inf)
    probs = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    keep = in_top_k & ((before < top_p) | (rank == 0) | (top_p >= 1.0))
    return jnp.zeros_like(keep).at[jnp.arange(num_rows)[:, None], order].set(keep)


def sample_token(
    logits: Array, uniform: Array, temperature: Array, top_k: Array, top_p: Array
) -> tuple[Array, Array]:
    """Draws one token per row by inverting the cumulative distribution at one uniform number.

    One uniform per row replaces one Gumbel per row and token, which is far cheaper at a large
    vocabulary. A float32 uniform has 23 bits: probabilities below about 1e-7 are not resolved.

    Args:
      logits: [N, V] float32.
      uniform: [N] float32 in [0, 1].
      temperature: [] float32 >= 0; 0 takes the most likely token.
      top_k, top_p: [] int32, [] float32; see `support`.
    Returns:
      tokens [N] int32, each of some probability; logps [N] float32, nats, under the distribution
      that was drawn from. At temperature 0 that is certain, so the log-prob is the one of
      temperature 1, of all tokens.
    """
    chex.assert_rank([logits, uniform], [2, 1])
    chex.assert_type(logits, jnp.float32)
    is_greedy = temperature == 0
    scaled = logits / jnp.where(is_greedy, 1.0, temperature)
    is_truncated = (top_k > 0) | (top_p < 1.0)
    keep = jax.lax.cond(
        is_truncated & ~is_greedy,
        lambda: support(scaled, top_k, top_p),
        lambda: jnp.ones(scaled.shape, bool),
    )
    logp = jax.nn.log_softmax(jnp.where(keep, scaled, -jnp.inf), axis=-1)
    probs = jnp.exp(logp)
    cdf = jnp.cumsum(probs, axis=-1)
    # XLA sums in parallel, so that the sum may move, even fall, where there is no probability: only
    # tokens that have some are asked. Rounding may leave all of them at or below the target.
    target = uniform * cdf[:, -1]
    is_hit = (cdf > target[:, None]) & (probs > 0)
    last = logits.shape[-1] - 1 - jnp.argmax(probs[:, ::-1] > 0, axis=-1)
    drawn = jnp.where(is_hit.any(axis=-1), jnp.argmax(is_hit, axis=-1), last)
    tokens = jnp.where(is_greedy, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)
    return tokens, jnp.take_along_axis(logp, tokens[:, None], axis=-1)[:, 0]
