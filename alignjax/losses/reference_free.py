"""Pairs of completions -> losses that need no reference, one for each pair.

s is the policy's log-prob of a completion, a sum over its T tokens, and m = s / T; w chosen, l
rejected.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from alignjax.losses.pairs import Pairs, check_positive, per_token, policy_logps, valid
from alignjax.losses.ratio import straight_expm1

MAX_MEAN_LOGP = -1e-6
"""Nats. At a probability of 1 the odds are infinite: they stop growing this short of it."""


def simpo(pairs: Pairs, *, beta: float = 2.0, gamma_beta_ratio: float = 0.5) -> Array:
    """Loss -log sigmoid(beta (m_w - m_l) - gamma), gamma = gamma_beta_ratio beta.

    Args:
      pairs: Pairs of [N]; the reference is not read.
      beta: dimensionless.
      gamma_beta_ratio: nats a token, >= 0; the margin of m_w over m_l that is asked for. Libraries
        that take gamma itself want beta times this.
    Returns:
      [N] float32, nats, exactly 0 where not valid.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than that of `Pairs`.
      ValueError: unless beta > 0 and gamma_beta_ratio >= 0.
    Source: arXiv:2405.14734 eq. 6 (SimPO).
    """
    chosen, rejected = per_token(pairs, *policy_logps(pairs))
    return _with_margin(pairs, chosen, rejected, beta, gamma_beta_ratio)


def alphapo(
    pairs: Pairs, *, beta: float = 2.5, gamma_beta_ratio: float = 0.1, alpha: float = 0.25
) -> Array:
    """Loss -log sigmoid(r_w - r_l - gamma), r = beta (1 - exp(-alpha m)) / alpha.

    alpha to 0 is `simpo`; above 0 the reward falls ever more steeply as a completion becomes
    unlikely, below 0 ever less. Arguments, result and errors as in `simpo`, and alpha, not 0.
    Beyond alpha m = -20 the reward goes on in a straight line, so that no float overflows.
    Source: arXiv:2501.03884 (AlphaPO); the defaults are those for Mistral, table 3.
    """
    if alpha == 0:
        raise ValueError("alpha=0: expected alpha other than 0; 0 would be simpo")
    means = per_token(pairs, *policy_logps(pairs))
    chosen, rejected = (-straight_expm1(-alpha * x) / alpha for x in means)
    return _with_margin(pairs, chosen, rejected, beta, gamma_beta_ratio)


def cpo(pairs: Pairs, *, beta: float = 0.1, nll_coef: float = 1.0) -> Array:
    """Loss -log sigmoid(beta (s_w - s_l)) - nll_coef s_w.

    The second term is a sum over tokens, as in the paper; others average it, which is this with
    `mixture` of cpo(nll_coef=0) and `chosen_nll`. Arguments, result and errors as in `simpo`, and
    nll_coef, dimensionless, >= 0.
    Source: arXiv:2401.08417 sec. 3 (CPO).
    """
    check_positive("beta", beta)
    _check_not_negative("nll_coef", nll_coef)
    chosen, rejected = policy_logps(pairs)
    loss = -jax.nn.log_sigmoid(beta * (chosen - rejected)) - nll_coef * chosen
    return valid(pairs, loss)


def orpo(pairs: Pairs, *, coef: float = 0.1) -> Array:
    """Loss -m_w - coef log sigmoid(o_w - o_l), o = m - log(1 - exp(m)) the log-odds.

    Arguments, result and errors as in `simpo`, and coef, dimensionless, >= 0; called lambda in the
    paper. Above m = -1e-6 the odds stay where they are, with the gradient that they have there, so
    that they are finite even for a probability of 1.
    Source: arXiv:2403.07691 eq. 6 (ORPO).
    """
    _check_not_negative("coef", coef)
    chosen, rejected = per_token(pairs, *policy_logps(pairs))
    odds = -jax.nn.log_sigmoid(_log_odds(chosen) - _log_odds(rejected))
    return valid(pairs, -chosen + coef * odds)


def chosen_nll(pairs: Pairs) -> Array:
    """Loss -m_w: what supervised fine-tuning on the chosen completion has, for `mixture`.

    Arguments, result and errors as in `simpo`.
    Source: arXiv:2404.19733 eq. 1 (iterative RPO), the term that is added to `dpo`.
    """
    return -per_token(pairs, *policy_logps(pairs))[0]


def _with_margin(
    pairs: Pairs, chosen: Array, rejected: Array, beta: float, gamma_beta_ratio: float
) -> Array:
    check_positive("beta", beta)
    _check_not_negative("gamma_beta_ratio", gamma_beta_ratio)
    return valid(pairs, -jax.nn.log_sigmoid(beta * (chosen - rejected - gamma_beta_ratio)))


def _log_odds(m: Array) -> Array:
    m = m + jax.lax.stop_gradient(jnp.minimum(m, MAX_MEAN_LOGP) - m)
    return m - _log1mexp(m)


def _log1mexp(x: Array) -> Array:
    """log(1 - exp(x)) for x < 0. Each form loses its digits on the other's side of -log 2."""
    is_near = x > -math.log(2)
    near = jnp.log(-jnp.expm1(jnp.where(is_near, x, -1.0)))
    far = jnp.log1p(-jnp.exp(jnp.where(is_near, -1.0, x)))
    return jnp.where(is_near, near, far)


def _check_not_negative(name: str, value: float) -> None:
    if value < 0:
        raise ValueError(f"{name}={value}: expected {name} >= 0")
