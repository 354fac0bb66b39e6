"""Completions judged one by one -> losses that move each log-prob by itself, not their difference.

D is what the policy's log-prob of a completion, a sum over tokens, has gained on the reference's:
D_w of a chosen one, D_l of a rejected one. `kto` and `kto_kl` take completions that nobody paired;
the others take pairs.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core import masked
from alignjax.core.types import Weighted
from alignjax.losses.pairs import Pairs, check_positive, log_ratios, valid


def kto(
    sequence_logp: Array,
    ref_sequence_logp: Array,
    is_desirable: Array,
    kl: Array,
    is_valid: Array,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Array:
    """Loss lambda_D (1 - sigmoid(beta (D - z))) or lambda_U (1 - sigmoid(beta (z - D))).

    Args:
      sequence_logp: [N] float32, nats; the policy's log-prob of a completion. Carries gradient.
      ref_sequence_logp: [N] float32, nats; the same under the reference. Gradient stopped.
      is_desirable: [N] bool; which of the two losses it gets.
      kl: [] float32, nats; what a completion gains that has nothing to do with its prompt: total /
        weight of `kto_kl` over the global batch. z = max(0, kl). Gradient stopped.
      is_valid: [N] bool; False where there is no completion. There, inputs may be anything.
      beta: dimensionless.
      desirable_weight, undesirable_weight: dimensionless; lambda_D and lambda_U. The paper wants
        (lambda_D n_D) / (lambda_U n_U) in [1, 3/2], n the numbers of both in the data.
    Returns:
      [N] float32, dimensionless, exactly 0 where not valid; its mean is over all examples.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless beta, desirable_weight and undesirable_weight > 0.
    Source: arXiv:2402.01306 sec. 4 (KTO).
    """
    check_positive("beta", beta)
    check_positive("desirable_weight", desirable_weight)
    check_positive("undesirable_weight", undesirable_weight)
    chex.assert_rank(kl, 0)
    chex.assert_equal_shape([is_desirable, is_valid])
    chex.assert_type(is_desirable, bool)
    logp, ref_logp = masked.clean(is_valid, sequence_logp, ref_sequence_logp, rank=1)
    base = jax.lax.stop_gradient(jnp.maximum(kl, 0.0))
    gain = beta * (logp - jax.lax.stop_gradient(ref_logp) - base)
    loss = jnp.where(
        is_desirable,
        desirable_weight * jax.nn.sigmoid(-gain),
        undesirable_weight * jax.nn.sigmoid(gain),
    )
    return jnp.where(is_valid, loss, 0.0)


def kto_kl(mismatched_logp: Array, ref_mismatched_logp: Array, is_valid: Array) -> Weighted:
    """Sum of log pi(y' | x) - log pi_ref(y' | x) over completions y' of other prompts than x.

    Total / weight over the global batch is the `kl` of `kto`. y' may be the completion of the next
    prompt in the batch, the first one's for the last; a batch of one has no mismatched completion.

    Args:
      mismatched_logp: [N] float32, nats; the policy's log-prob of y' after x. Gradient stopped.
      ref_mismatched_logp: [N] float32, nats; the same under the reference. Gradient stopped.
      is_valid: [N] bool; False where there is no such pair. There, inputs may be anything.
    Returns:
      Weighted of [] float32, nats and pairs, without gradient; 0, 0 if there are none.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: arXiv:2402.01306 sec. 4 (KTO).
    """
    logp, ref_logp = masked.clean(is_valid, mismatched_logp, ref_mismatched_logp, rank=1)
    total = jax.lax.stop_gradient(jnp.sum(logp - ref_logp))
    return Weighted(total, jnp.sum(is_valid, dtype=jnp.float32))


def bco(pairs: Pairs, delta: Array, *, beta: float = 0.01) -> Array:
    """Loss -log sigmoid(beta D_w - delta) - log sigmoid(delta - beta D_l).

    Arguments, result and errors as in `dpo`, and

    Args:
      delta: [] float32, reward units; running mean over both kinds of the rewards beta D, see
        `implicit_rewards`. Gradient stopped.
    Source: arXiv:2404.04656 (BCO), without its weights for prompts of unlike feedback.
    """
    check_positive("beta", beta)
    chex.assert_rank(delta, 0)
    chosen, rejected = log_ratios(pairs)
    shift = jax.lax.stop_gradient(delta)
    won = jax.nn.log_sigmoid(beta * chosen - shift)
    return valid(pairs, -won - jax.nn.log_sigmoid(shift - beta * rejected))


def nca(pairs: Pairs, *, beta: float = 0.01) -> Array:
    """Loss -log sigmoid(beta D_w) - (log sigmoid(-beta D_w) + log sigmoid(-beta D_l)) / 2.

    Arguments, result and errors as in `dpo`.
    Source: arXiv:2402.05369 (NCA, of pairs), with its beta.
    """
    check_positive("beta", beta)
    chosen, rejected = (beta * x for x in log_ratios(pairs))
    noise = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return valid(pairs, -jax.nn.log_sigmoid(chosen) - 0.5 * noise)


def sppo(pairs: Pairs, *, beta: float = 0.001) -> Array:
    """Loss (D_w - 1 / (2 beta))^2 + (D_l + 1 / (2 beta))^2.

    Arguments, result and errors as in `dpo`; 1 / beta is called eta in the paper.
    Source: arXiv:2405.00675 eq. 4.7 (SPPO), where the chosen one is sure to win ("hard").
    """
    check_positive("beta", beta)
    chosen, rejected = log_ratios(pairs)
    return valid(pairs, (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2)


def apo_zero(pairs: Pairs, *, beta: float = 0.1) -> Array:
    """Loss sigmoid(beta D_l) - sigmoid(beta D_w): chosen up, rejected down.

    For chosen completions that are better than what the policy writes. Arguments, result and errors
    as in `dpo`.
    Source: arXiv:2408.06266 eq. 7 (APO); others add 1.
    """
    check_positive("beta", beta)
    chosen, rejected = log_ratios(pairs)
    return valid(pairs, jax.nn.sigmoid(beta * rejected) - jax.nn.sigmoid(beta * chosen))


def apo_down(pairs: Pairs, *, beta: float = 0.1) -> Array:
    """Loss sigmoid(beta D_w) - sigmoid(beta (D_w - D_l)): both down, rejected by more.

    For chosen completions that are worse than what the policy writes. Arguments, result and errors
    as in `dpo`.
    Source: arXiv:2408.06266 eq. 8 (APO); others add 1.
    """
    check_positive("beta", beta)
    chosen, rejected = log_ratios(pairs)
    gain = jax.nn.sigmoid(beta * (chosen - rejected))
    return valid(pairs, jax.nn.sigmoid(beta * chosen) - gain)


def aot(pairs: Pairs, *, beta: float = 0.01) -> Array:
    """Loss -log sigmoid(beta (a_(k) - b_(k))), a = s_w - s_l, b the same of the reference.

    The k-th smallest a of the whole batch given is held against the k-th smallest b: the policy's
    margins shall be larger as a distribution. So the result depends on the batch, and must be of
    all of it, not of a micro-batch. Invalid pairs take no part. Arguments and errors as in `dpo`.
    Returns:
      [N] float32, nats, exactly 0 where not valid; at each pair the loss of its own a.
    Source: arXiv:2406.05882 (AOT, paired), with its beta.
    """
    check_positive("beta", beta)
    chosen, rejected, ref_chosen, ref_rejected = masked.clean(
        pairs.is_valid, pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected, rank=1
    )
    margin = jax.lax.stop_gradient(ref_chosen - ref_rejected)
    return _sorted_logistic(chosen - rejected, margin, pairs.is_valid, beta)


def aot_unpaired(pairs: Pairs, *, beta: float = 0.01) -> Array:
    """Loss -log sigmoid(beta (a_(k) - b_(k))), a = D_w, b = D_l: who was paired is not read.

    Arguments, result and errors as in `aot`.
    Source: arXiv:2406.05882 (AOT, unpaired), for as many chosen as rejected completions.
    """
    check_positive("beta", beta)
    return _sorted_logistic(*log_ratios(pairs), pairs.is_valid, beta)


def _sorted_logistic(a: Array, b: Array, is_valid: Array, beta: float) -> Array:
    last = jnp.where(is_valid, 0.0, jnp.inf)  # so that ranks of valid entries are 0 to n - 1
    rank = jnp.argsort(jnp.argsort(a + last))
    gap = jnp.where(is_valid, a - jnp.sort(b + last)[rank], 0.0)
    return jnp.where(is_valid, -jax.nn.log_sigmoid(beta * gap), 0.0)
