"""Entropies and log-probs of tokens -> what keeps a policy from collapsing: a bonus, and masks.

The masks rank the tokens of the whole batch given: they depend on the split into micro-batches.
Of equal tokens the earlier one of the earlier row goes first.
"""

import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core import masked


def entropy_bonus(entropy: Array, mask: Array) -> Array:
    """Per-token loss -entropy, to be added with a coefficient.

    Args:
      entropy: [B, T] float32, nats; of the distribution the token was drawn from. Carries gradient.
      mask: [B, T] bool; True on completion tokens. Elsewhere entropy may be anything, even nan.
    Returns:
      [B, T] float32, nats, exactly 0 off mask.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: arXiv:1707.06347 eq. 9, S.
    """
    (entropy,) = masked.clean(mask, entropy, rank=2)
    return -entropy


def top_entropy_mask(entropy: Array, mask: Array, *, frac: float = 0.2) -> Array:
    """True on the frac * N tokens, rounded up, of highest entropy among the N of the batch given.

    Use it as the mask of the policy loss: only these tokens train, and count.

    Args:
      entropy: [B, T] float32, nats. No gradient.
      mask: [B, T] bool; True on completion tokens. Elsewhere entropy may be anything, even nan.
      frac: share of the tokens that train.
    Returns:
      [B, T] bool, False off mask.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless 0 < frac <= 1.
    Source: arXiv:2506.01939 (only the 20% of tokens of highest entropy train). We differ in ties:
    exactly so many tokens are taken.
    """
    if not 0 < frac <= 1:
        raise ValueError(f"frac={frac}: expected a share of the tokens, 0 < frac <= 1")
    (entropy,) = masked.clean(mask, entropy, rank=2)
    return _first(-entropy, mask, jnp.ceil(frac * _count(mask) - _ROUNDING))


def token_covariance(logp: Array, advantage: Array, mask: Array) -> Array:
    """Per-token (logp - mean logp) (A - mean A), means over all tokens of the batch given.

    Its mean is the covariance of log-prob and advantage, and where that is positive a step of the
    policy gradient lowers the entropy.

    Args:
      logp: [B, T] float32, nats; log-prob of the sampled token under the policy. No gradient.
      advantage: [B, T] float32, reward units. No gradient.
      mask: [B, T] bool; True on completion tokens. Elsewhere inputs may be anything, even inf.
    Returns:
      [B, T] float32, nats times reward units, exactly 0 off mask. No gradient.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: arXiv:2505.22617 (The Entropy Mechanism).
    """
    logp, advantage = jax.lax.stop_gradient(masked.clean(mask, logp, advantage, rank=2))
    product = (logp - masked.mean(logp, mask)) * (advantage - masked.mean(advantage, mask))
    return jnp.where(mask, product, 0.0)


def clip_cov_mask(
    covariance: Array,
    mask: Array,
    *,
    key: Array,
    frac: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
) -> Array:
    """True on tokens that must not train: drawn at random where cov_low <= cov <= cov_high.

    They are frac * N, rounded down, of the N tokens of the batch given, or all in the range if
    those are fewer. Put 0 in the place of their policy loss; they still count.

    Args:
      covariance: [B, T] float32; of `token_covariance`. No gradient.
      mask: [B, T] bool; True on completion tokens. Elsewhere covariance may be anything, even nan.
      key: PRNG key; what is drawn depends on where the tokens lie in the batch.
      frac: share of all tokens.
      cov_low, cov_high: nats times reward units; the range.
    Returns:
      [B, T] bool, False off mask.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless 0 <= frac <= 1 and cov_low <= cov_high.
    Source: arXiv:2505.22617 (The Entropy Mechanism, Clip-Cov).
    """
    _check_frac(frac)
    if not cov_low <= cov_high:
        raise ValueError(f"cov_low={cov_low}, cov_high={cov_high}: expected cov_low <= cov_high")
    (covariance,) = masked.clean(mask, covariance, rank=2)
    in_range = mask & (covariance >= cov_low) & (covariance <= cov_high)
    noise = jax.random.uniform(key, mask.shape)
    return _first(noise, in_range, jnp.floor(frac * _count(mask) + _ROUNDING))


def kl_cov_mask(covariance: Array, mask: Array, *, frac: float = 2e-3) -> Array:
    """True on the frac * N tokens, rounded down, of highest covariance among the N given.

    On these a KL between the policy and the one that sampled, times a coefficient (the paper's is
    1), is added to the policy loss, for instance `k2(logp, old_logp, mask)`.

    Args:
      covariance: [B, T] float32; of `token_covariance`. No gradient.
      mask: [B, T] bool; True on completion tokens. Elsewhere covariance may be anything, even nan.
      frac: share of all tokens; the paper has 2e-3 for 7 and 2e-4 for 32 billion parameters.
    Returns:
      [B, T] bool, False off mask.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless 0 <= frac <= 1.
    Source: arXiv:2505.22617 (The Entropy Mechanism, KL-Cov).
    """
    _check_frac(frac)
    (covariance,) = masked.clean(mask, covariance, rank=2)
    return _first(-covariance, mask, jnp.floor(frac * _count(mask) + _ROUNDING))


_ROUNDING = 1e-3
"""Tokens. frac * N in float32 may miss a whole number by a little, on the wrong side."""


def _count(mask: Array) -> Array:
    return jnp.sum(mask, dtype=jnp.float32)


def _first(order: Array, mask: Array, num: Array) -> Array:
    """True on the `num` masked tokens of lowest `order`, or on all of them; ties by position."""
    order = jnp.where(mask, jax.lax.stop_gradient(order), jnp.inf)
    ranks = jnp.argsort(jnp.argsort(order, axis=None, stable=True))
    return mask & (ranks.reshape(mask.shape) < num)


def _check_frac(frac: float) -> None:
    if not 0 <= frac <= 1:
        raise ValueError(f"frac={frac}: expected a share of the tokens, 0 <= frac <= 1")
