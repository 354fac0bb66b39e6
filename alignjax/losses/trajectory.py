"""Rewards and values of tokens -> advantages and returns, token by token, backwards in time.

Masked positions (tool output, padding) are skipped: the successor of a token is the next token of
its sequence that the policy chose, and what lies between costs no discount. Sequences of a packed
row never see one another, and rows are never mixed, so that a batch axis sharded over devices
stays where it is.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core import masked
from alignjax.losses import segments
from alignjax.losses.advantage import global_whiten
from alignjax.losses.ratio import capped_exp, token_log_ratio


class Gae(NamedTuple):
    """Advantages for the policy and what the values should have been."""

    advantages: Array
    """[B, T] float32, reward units, exactly 0 off mask. No gradient."""
    returns: Array
    """[B, T] float32, reward units, exactly 0 off mask. No gradient."""


class VTrace(NamedTuple):
    """Advantages for the policy and what the values should have been, off policy."""

    advantages: Array
    """[B, T] float32, reward units, exactly 0 off mask. No gradient."""
    targets: Array
    """[B, T] float32, reward units, exactly 0 off mask. No gradient."""


def gae(
    rewards: Array,
    old_values: Array,
    bootstrap: Array,
    mask: Array,
    segment_ids: Array,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> Gae:
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t; returns A + V.

    Args:
      rewards: [B, T] float32, reward units; what came of choosing the token. Gradient stopped.
      old_values: [B, T] float32, reward units; value, before the update, of the state in which the
        token was chosen, so of all tokens before it. Gradient stopped.
      bootstrap: [B, T] float32, reward units; V_{t+1} at the last masked token of each sequence: 0
        where the episode ended, the value after the token where it was cut. Read nowhere else.
        Gradient stopped.
      mask: [B, T] bool; True on the tokens that the policy chose. Elsewhere inputs may be anything,
        even inf.
      segment_ids: [B, T] int32, 0 <= segment_ids <= T; the sequence of each token within its row.
      gamma: discount for each token, dimensionless.
      gae_lambda: dimensionless; 0 trusts the values (TD error), 1 the rewards (returns - V).
    Returns:
      Gae: advantages and returns, the latter to be taken before the former are whitened.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless 0 <= gamma <= 1 and 0 <= gae_lambda <= 1.
    Source: arXiv:1506.02438 eq. 16; the defaults are those of the code of arXiv:1909.08593.
    """
    _check_fractions(gamma=gamma, gae_lambda=gae_lambda)
    rewards, values, bootstrap = _constants(mask, rewards, old_values, bootstrap)
    is_last = _is_last(mask, segment_ids)
    errors = rewards + gamma * _following(values, bootstrap, mask, is_last) - values
    advantages = _discounted(errors, gamma * gae_lambda, mask, is_last)
    return Gae(advantages, advantages + values)


def returns_to_go(rewards: Array, mask: Array, segment_ids: Array, *, gamma: float = 1.0) -> Array:
    """G_t = sum_l gamma^l r_{t+l} over the masked tokens of the sequence from t on.

    Args:
      rewards, mask, segment_ids, gamma: as in `gae`.
    Returns:
      [B, T] float32, reward units, exactly 0 off mask. No gradient.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless 0 <= gamma <= 1.
    Source: R. J. Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist
    Reinforcement Learning" (1992), without what came before the token.
    """
    _check_fractions(gamma=gamma)
    (rewards,) = _constants(mask, rewards)
    return _discounted(rewards, gamma, mask, _is_last(mask, segment_ids))


def reinforce_pp(rewards: Array, mask: Array, segment_ids: Array, *, gamma: float = 1.0) -> Array:
    """Advantage `global_whiten(returns_to_go(r))`, over all tokens of the whole batch given.

    Arguments, result and errors as in `returns_to_go`; rewards with their KL penalty, as
    `token_rewards` gives them. Source: arXiv:2501.03262 (REINFORCE++).
    """
    return global_whiten(returns_to_go(rewards, mask, segment_ids, gamma=gamma), mask)


def vtrace(
    policy_logp: Array,
    old_logp: Array,
    rewards: Array,
    old_values: Array,
    bootstrap: Array,
    mask: Array,
    segment_ids: Array,
    *,
    gamma: float = 1.0,
    vtrace_lambda: float = 1.0,
    max_rho: float = 1.0,
    max_c: float = 1.0,
    max_pg_rho: float = 1.0,
) -> VTrace:
    """Targets v_t = V_t + delta_t + gamma c_t (v_{t+1} - V_{t+1}), for tokens of an older policy.

    With r = exp(policy_logp - old_logp), delta_t = min(r, max_rho) (r_t + gamma V_{t+1} - V_t) and
    c_t = vtrace_lambda min(r, max_c). The advantage is
    min(r, max_pg_rho) (r_t + gamma v_{t+1} - V_t).

    Args:
      policy_logp: [B, T] float32, nats; log-prob of the token under the policy that trains.
        Gradient stopped.
      old_logp: [B, T] float32, nats; the same under the policy that sampled it. Gradient stopped.
      rewards, old_values, bootstrap, mask, segment_ids, gamma: as in `gae`; v_{t+1}, too, is the
        bootstrap at the last masked token of a sequence.
      vtrace_lambda: dimensionless; how far the targets look ahead.
      max_rho: dimensionless; what the targets converge to: at infinity the values of the policy, at
        0 those of the one that sampled.
      max_c: dimensionless, at most max_rho in the paper; how fast they do.
      max_pg_rho: dimensionless; limit of the ratio in the advantage.
    Returns:
      VTrace: advantages, which hold the ratio already, and targets of the values.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless 0 <= gamma <= 1, 0 <= vtrace_lambda <= 1 and the limits are > 0.
    Source: arXiv:1802.01561 eq. 1, remarks 1 and 2, and sec. 4.2 (IMPALA). We differ in one point:
    r stops at exp(20), so that no float overflows.
    """
    _check_fractions(gamma=gamma, vtrace_lambda=vtrace_lambda)
    if min(max_rho, max_c, max_pg_rho) <= 0:
        raise ValueError(
            f"max_rho={max_rho}, max_c={max_c}, max_pg_rho={max_pg_rho}: expected all > 0"
        )
    ratio = capped_exp(token_log_ratio(jax.lax.stop_gradient(policy_logp), old_logp, mask))
    rewards, values, bootstrap = _constants(mask, rewards, old_values, bootstrap)
    is_last = _is_last(mask, segment_ids)

    def errors(next_values: Array, limit: float) -> Array:
        return jnp.minimum(ratio, limit) * (rewards + gamma * next_values - values)

    deltas = errors(_following(values, bootstrap, mask, is_last), max_rho)
    decay = gamma * vtrace_lambda * jnp.minimum(ratio, max_c)
    targets = values + _discounted(deltas, decay, mask, is_last)
    advantages = errors(_following(targets, bootstrap, mask, is_last), max_pg_rho)
    return VTrace(jnp.where(mask, advantages, 0.0), targets)


def _check_fractions(**fractions: float) -> None:
    for name, x in fractions.items():
        if not 0 <= x <= 1:
            raise ValueError(f"{name}={x}: expected 0 <= {name} <= 1")


def _constants(mask: Array, *arrays: Array) -> tuple[Array, ...]:
    return masked.clean(mask, *map(jax.lax.stop_gradient, arrays), rank=2)


def _is_last(mask: Array, segment_ids: Array) -> Array:
    chex.assert_equal_shape([mask, segment_ids])
    chex.assert_type(segment_ids, jnp.int32)
    return segments.is_last(mask, segment_ids)


def _discounted(x: Array, decay: Array | float, mask: Array, is_last: Array) -> Array:
    """y_t = x_t + decay_t y_{t+1}, where t + 1 is the next masked token of the sequence."""
    x = jnp.where(mask, x, 0.0)
    factor = jnp.where(is_last, 0.0, jnp.where(mask, decay, 1.0)).astype(x.dtype)
    return jnp.where(mask, _backwards(x, factor), 0.0)


def _following(x: Array, bootstrap: Array, mask: Array, is_last: Array) -> Array:
    """x of the next masked token of the sequence, the bootstrap if there is none. x is 0 off mask.

    Off mask the result means nothing.
    """
    nearest = _backwards(x, (~mask).astype(x.dtype))  # at t or after
    return jnp.where(is_last, bootstrap, jnp.pad(nearest[:, 1:], ((0, 0), (0, 1))))


def _backwards(x: Array, factor: Array) -> Array:
    """y_t = x_t + factor_t y_{t+1} along each row, 0 after its end, in log2(T) parallel steps."""

    def then(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        return earlier[0] + earlier[1] * later[0], earlier[1] * later[1]

    return jax.lax.associative_scan(then, (x, factor), reverse=True, axis=1)[0]
