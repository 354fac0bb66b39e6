"""Pairs of completions -> DPO under other divergences from the reference, one loss for each pair.

The loss is -log sigmoid(beta f'(u_w) - beta f'(u_l)), u = pi / pi_ref, with f of the divergence
D_f(pi || pi_ref) that the policy pays for. Of the reverse KL f'(u) = log u + 1: that is `dpo`.
Source of all: arXiv:2309.16240 (f-DPO).
"""

import jax
from jax import Array

from alignjax.losses.pairs import Pairs, check_positive, log_ratios, valid
from alignjax.losses.ratio import straight_expm1


def f_dpo_forward_kl(pairs: Pairs, *, beta: float = 0.1) -> Array:
    """f-DPO with the forward KL: f'(u) = -1 / u.

    Arguments, result and errors as in `dpo`. Beyond log u = -20 f' goes on in a straight line, with
    the slope it has there, so that no float overflows.
    """
    chosen, rejected = log_ratios(pairs)
    # 1 - 1 / u, more exact near u = 1; a constant cancels between the two, here and below.
    return _loss(pairs, -straight_expm1(-chosen), -straight_expm1(-rejected), beta)


def f_dpo_js(pairs: Pairs, *, beta: float = 0.1) -> Array:
    """f-DPO with the Jensen-Shannon divergence: f'(u) = log(2u / (1 + u)).

    Arguments, result and errors as in `dpo`.
    """
    chosen, rejected = log_ratios(pairs)
    return _loss(pairs, jax.nn.log_sigmoid(chosen), jax.nn.log_sigmoid(rejected), beta)


def f_dpo_alpha(pairs: Pairs, *, alpha: float = 0.5, beta: float = 0.1) -> Array:
    """f-DPO with an alpha-divergence: f'(u) = (1 - u^-alpha) / alpha.

    alpha to 0 is `dpo`, alpha to 1 `f_dpo_forward_kl`. Arguments, result and errors as in `dpo`,
    and alpha, 0 < alpha < 1. Beyond log u = -20 / alpha f' goes on in a straight line.
    """
    if not 0 < alpha < 1:
        raise ValueError(
            f"alpha={alpha}: expected 0 < alpha < 1; 0 would be dpo, 1 f_dpo_forward_kl"
        )
    chosen, rejected = (-straight_expm1(-alpha * x) / alpha for x in log_ratios(pairs))
    return _loss(pairs, chosen, rejected, beta)


def _loss(pairs: Pairs, chosen: Array, rejected: Array, beta: float) -> Array:
    check_positive("beta", beta)
    return valid(pairs, -jax.nn.log_sigmoid(beta * (chosen - rejected)))
