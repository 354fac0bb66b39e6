"""Pairs of completions -> losses of the DPO family, one for each pair.

All read only D_w and D_l, what the policy's log-prob of the chosen and of the rejected completion
has gained on the reference's, and most only d = D_w - D_l. Log-probs are sums over tokens unless
the name says otherwise. beta is the strength of the pull to the reference.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core import masked
from alignjax.losses.pairs import Pairs, check_positive, log_ratios, per_token, valid


def dpo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    """Loss -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d), e = label_smoothing.

    Args:
      pairs: Pairs of [N]; see there for what carries gradient.
      beta: dimensionless.
      label_smoothing: probability that a label is wrong; above 0 this is conservative DPO.
    Returns:
      [N] float32, nats, exactly 0 where not valid.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than that of `Pairs`.
      ValueError: unless beta > 0 and 0 <= label_smoothing < 0.5.
    Source: arXiv:2305.18290 eq. 7; smoothing: E. Mitchell, "A note on DPO with noisy preferences
    and relationship to IPO" (2023).
    """
    check_positive("beta", beta)
    _check_smoothing(label_smoothing)
    return valid(pairs, _cross_entropy(beta * _gain(pairs), 1 - label_smoothing))


def soft_dpo(pairs: Pairs, preference_prob: Array, *, beta: float = 0.1) -> Array:
    """Loss -p log sigmoid(beta d) - (1 - p) log sigmoid(-beta d), p = preference_prob.

    Arguments, result and errors as in `dpo`, and

    Args:
      preference_prob: [N] float32 in [0, 1]; how sure the judge is that chosen is the better one.
        Gradient stopped.
    Source: arXiv:2305.18290 eq. 7 with soft labels; of AI feedback: arXiv:2309.00267.
    """
    check_positive("beta", beta)
    (prob,) = masked.clean(pairs.is_valid, preference_prob, rank=1)
    return valid(pairs, _cross_entropy(beta * _gain(pairs), jax.lax.stop_gradient(prob)))


def robust_dpo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Array:
    """Loss [-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)] / (1 - 2e).

    Its mean over labels that are flipped with probability e = label_smoothing is `dpo` on the true
    ones. It may be negative. Arguments, result and errors as in `dpo`.
    Source: arXiv:2403.00409 (rDPO).
    """
    check_positive("beta", beta)
    _check_smoothing(label_smoothing)
    logits = beta * _gain(pairs)
    kept = (1 - label_smoothing) * jax.nn.log_sigmoid(logits)
    flipped = label_smoothing * jax.nn.log_sigmoid(-logits)
    return valid(pairs, (flipped - kept) / (1 - 2 * label_smoothing))


def length_normalized_dpo(pairs: Pairs, *, beta: float = 5.0) -> Array:
    """Loss -log sigmoid(beta (D_w / T_w - D_l / T_l)), T the lengths of the completions.

    Arguments, result and errors as in `dpo`.
    Source: arXiv:2411.15124 (Tulu 3), with its beta.
    """
    check_positive("beta", beta)
    chosen, rejected = per_token(pairs, *log_ratios(pairs))
    return valid(pairs, -jax.nn.log_sigmoid(beta * (chosen - rejected)))


def wpo(pairs: Pairs, weights: Array, *, beta: float = 0.01, max_weight: float = 1.0) -> Array:
    """Loss -min(w, max_weight) log sigmoid(beta d), w the weight of the pair.

    Arguments, result and errors as in `dpo`, and

    Args:
      weights: [N] float32, dimensionless; product of the `wpo_weights` of both completions.
        Gradient stopped.
      max_weight: dimensionless, > 0; inf leaves the weights as they are.
    Source: arXiv:2406.11827 eq. 2 (WPO), which has no max_weight; the authors' code has 1.
    """
    check_positive("beta", beta)
    check_positive("max_weight", max_weight)
    (weights,) = masked.clean(pairs.is_valid, jax.lax.stop_gradient(weights), rank=1)
    return -jnp.minimum(weights, max_weight) * jax.nn.log_sigmoid(beta * _gain(pairs))


def dpop(pairs: Pairs, *, beta: float = 0.3, penalty_coef: float = 50.0) -> Array:
    """Loss -log sigmoid(beta (d - penalty_coef max(0, -D_w))).

    The penalty keeps the chosen completion at least as likely as the reference has it. Arguments,
    result and errors as in `dpo`, and

    Args:
      penalty_coef: dimensionless, > 0; called lambda in the paper.
    Source: arXiv:2402.13228 (Smaug, DPO-Positive).
    """
    check_positive("beta", beta)
    check_positive("penalty_coef", penalty_coef)
    chosen, rejected = log_ratios(pairs)
    penalty = penalty_coef * jax.nn.relu(-chosen)
    return valid(pairs, -jax.nn.log_sigmoid(beta * (chosen - rejected - penalty)))


def hinge(pairs: Pairs, *, beta: float = 0.1) -> Array:
    """Loss max(0, 1 - beta d).

    Arguments, result and errors as in `dpo`.
    Source: SLiC-HF, arXiv:2305.10425 sec. 2, with log-probs against the reference as in
    arXiv:2309.06657 (RSO, hinge-norm).
    """
    check_positive("beta", beta)
    return valid(pairs, jax.nn.relu(1 - beta * _gain(pairs)))


def ipo(pairs: Pairs, *, beta: float = 0.1) -> Array:
    """Loss (d - 1 / (2 beta))^2, of sums over tokens as the paper writes it; see `ipo_mean`.

    Arguments, result and errors as in `dpo`; beta is called tau in the paper.
    Source: arXiv:2310.12036 eq. 17 (IPO).
    """
    check_positive("beta", beta)
    return valid(pairs, (_gain(pairs) - 1 / (2 * beta)) ** 2)


def ipo_mean(pairs: Pairs, *, beta: float = 0.1) -> Array:
    """Loss (D_w / T_w - D_l / T_l - 1 / (2 beta))^2, T the lengths of the completions.

    With sums one margin would be asked of long and short completions alike; the authors confirmed
    that their results for language models are those of averages. Arguments, result and errors as
    in `dpo`.
    Source: arXiv:2310.12036 eq. 17 (IPO).
    """
    check_positive("beta", beta)
    chosen, rejected = per_token(pairs, *log_ratios(pairs))
    return valid(pairs, (chosen - rejected - 1 / (2 * beta)) ** 2)


def exo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Array:
    """Loss KL(q || p), q = sigmoid(beta (d, -d)), p = (1 - e, e), e = label_smoothing.

    Unlike `dpo`, which has p and q the other way round, it makes the policy seek a mode. Arguments,
    result and errors as in `dpo`, but label_smoothing may not be 0: the loss would be infinite.
    Source: arXiv:2402.00856 eq. 16 (EXO, of pairs).
    """
    check_positive("beta", beta)
    check_positive("label_smoothing", label_smoothing)
    _check_smoothing(label_smoothing)
    logits = beta * _gain(pairs)
    won, lost = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    loss = jnp.exp(won) * (won - jnp.log1p(-label_smoothing))
    return valid(pairs, loss + jnp.exp(lost) * (lost - jnp.log(label_smoothing)))


def discopop(pairs: Pairs, *, beta: float = 0.05, tau: float = 0.05) -> Array:
    """Loss (1 - g) (-log sigmoid z) + g exp(-z), z = beta d, g = sigmoid(z / tau).

    Arguments, result and errors as in `dpo`, and

    Args:
      tau: dimensionless, 0 < tau <= 1; width of the change from one loss to the other.
    Source: arXiv:2406.08414 eq. 5 (DiscoPOP, log-ratio modulated loss).
    """
    check_positive("beta", beta)
    if not 0 < tau <= 1:
        raise ValueError(f"tau={tau}: expected 0 < tau <= 1")
    z = beta * _gain(pairs)
    logistic = jax.nn.sigmoid(-z / tau) * -jax.nn.log_sigmoid(z)
    # As one exponent, at most 0: exp(-z) alone overflows where g is about to make nothing of it.
    return valid(pairs, logistic + jnp.exp(jax.nn.log_sigmoid(z / tau) - z))


def mixture(pairs: Pairs, *, parts: Sequence[tuple[float, Callable[[Pairs], Array]]]) -> Array:
    """Sum of losses, each times its weight.

    Args:
      pairs: Pairs of [N].
      parts: pairs of weight and loss, a function of `pairs` alone: `functools.partial` fixes the
        rest. ((1.0, dpo), (1.0, chosen_nll)) is iterative RPO, arXiv:2404.19733 eq. 1;
        ((0.8, dpo), (0.2, functools.partial(bco, delta=delta)), (1.0, chosen_nll)) is MPO,
        arXiv:2411.10442.
    Returns:
      [N] float32, exactly 0 where not valid.
    Raises:
      ValueError: if parts is empty.
    """
    if not parts:
        raise ValueError("parts=(): expected at least one pair of weight and loss")
    return sum((weight * loss(pairs) for weight, loss in parts), jnp.zeros(()))


def _gain(pairs: Pairs) -> Array:
    chosen, rejected = log_ratios(pairs)
    return chosen - rejected


def _cross_entropy(logits: Array, prob: Array | float) -> Array:
    return -prob * jax.nn.log_sigmoid(logits) - (1 - prob) * jax.nn.log_sigmoid(-logits)


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: expected 0 <= label_smoothing < 0.5")
