"""Scores of a reward model and what people said -> losses, one for each example.

Scores are read at the last token of the completion, its stop token, found by length and never by
token id: padding may be the same id.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core import masked


def bradley_terry(
    chosen_score: Array, rejected_score: Array, is_valid: Array, *, center_coef: float = 0.0
) -> Array:
    """Loss -log sigmoid(r_w - r_l) + center_coef (r_w + r_l)^2.

    Args:
      chosen_score: [N] float32, reward units; score of the preferred completion. Carries gradient.
      rejected_score: [N] float32, reward units; of the other one. Carries gradient.
      is_valid: [N] bool; False where there is no pair. There, scores may be anything, even nan.
      center_coef: >= 0; keeps the scores, of which only differences are learnt, around 0. The
        source uses 0.01.
    Returns:
      [N] float32, nats, exactly 0 where not valid.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless center_coef >= 0.
    Source: arXiv:2203.02155 eq. 1 (InstructGPT) for K = 2; centering: arXiv:2312.09244.
    """
    if center_coef < 0:
        raise ValueError(f"center_coef={center_coef}: expected center_coef >= 0")
    chosen, rejected = masked.clean(is_valid, chosen_score, rejected_score, rank=1)
    loss = -jax.nn.log_sigmoid(chosen - rejected) + center_coef * (chosen + rejected) ** 2
    return jnp.where(is_valid, loss, 0.0)


def bradley_terry_margin(
    chosen_score: Array, rejected_score: Array, margin: Array, is_valid: Array
) -> Array:
    """Loss -log sigmoid(r_w - r_l - margin).

    Arguments, result and errors as in `bradley_terry`, and

    Args:
      margin: [N] float32, reward units; larger for pairs that people told apart more easily.
        Gradient stopped.
    Source: arXiv:2307.09288 eq. 2 (Llama 2), which has margins 0 to 3 in four steps.
    """
    chosen, rejected, margin = masked.clean(is_valid, chosen_score, rejected_score, margin, rank=1)
    loss = -jax.nn.log_sigmoid(chosen - rejected - jax.lax.stop_gradient(margin))
    return jnp.where(is_valid, loss, 0.0)


def soft_bradley_terry(
    chosen_score: Array, rejected_score: Array, preference_prob: Array, is_valid: Array
) -> Array:
    """Loss -p log sigmoid(r_w - r_l) - (1 - p) log sigmoid(r_l - r_w), p = preference_prob.

    At p = 1/2, a tie, it is least where both scores are equal.

    Arguments, result and errors as in `bradley_terry`, and

    Args:
      preference_prob: [N] float32 in [0, 1]; how likely it is that chosen is the better one.
        Gradient stopped.
    Source: arXiv:2309.00267 sec. 2.2.1 (RLAIF): cross-entropy with the softmax of both scores.
    """
    chosen, rejected, prob = masked.clean(
        is_valid, chosen_score, rejected_score, preference_prob, rank=1
    )
    prob, logits = jax.lax.stop_gradient(prob), chosen - rejected
    loss = -prob * jax.nn.log_sigmoid(logits) - (1 - prob) * jax.nn.log_sigmoid(-logits)
    return jnp.where(is_valid, loss, 0.0)


def kwise_ranking(scores: Array, ranks: Array, is_valid: Array) -> Array:
    """Loss -log sigmoid(r_i - r_j), mean over the pairs i, j of one prompt of which i is better.

    All pairs of one prompt are one example: shuffled, each completion would be seen K - 1 times.

    Args:
      scores: [N, K] float32, reward units; of K completions of each prompt. Carries gradient.
      ranks: [N, K] int32; 1 the best. Completions of one rank are not compared.
      is_valid: [N, K] bool; False where there is no completion. There, inputs may be anything.
    Returns:
      [N] float32, nats; 0 for a prompt with nothing to compare, which `is_comparable` tells: it
      must not count in a mean.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: arXiv:2203.02155 eq. 1 (InstructGPT).
    """
    (scores,) = masked.clean(is_valid, scores, rank=2)
    losses = -jax.nn.log_sigmoid(scores[:, :, None] - scores[:, None, :])
    return masked.mean(losses, _is_better(ranks, is_valid), (1, 2))


def plackett_luce(scores: Array, ranks: Array, is_valid: Array) -> Array:
    """Loss sum_i log(sum_j exp r_j) - r_i, j over completion i itself and those worse than it.

    Minus the log-probability of drawing the completions in their order, each with probability
    proportional to exp r among those that are left. Completions of one rank are not compared.
    Arguments, result and errors as in `kwise_ranking`.
    Source: R. L. Plackett, "The Analysis of Permutations" (1975); of preferences:
    arXiv:2305.18290 app. A.3.
    """
    (scores,) = masked.clean(is_valid, scores, rank=2)
    is_left = _is_better(ranks, is_valid) | jnp.eye(scores.shape[1], dtype=bool)
    left = jnp.where(is_left, scores[:, None, :], -jnp.inf)
    return jnp.sum(jax.nn.logsumexp(left, axis=2) - scores, axis=1)


def is_comparable(ranks: Array, is_valid: Array) -> Array:
    """Whether a prompt has two completions of unlike rank: [N] bool.

    Arguments and errors as in `kwise_ranking`.
    """
    return _is_better(ranks, is_valid).any((1, 2))


def regression(score: Array, target: Array, is_valid: Array) -> Array:
    """Loss (score - target)^2.

    Args:
      score: [N] float32, reward units. Carries gradient.
      target: [N] float32, reward units; what people gave. Gradient stopped.
      is_valid: [N] bool; False where there is no target. There, inputs may be anything, even nan.
    Returns:
      [N] float32, reward units squared, exactly 0 where not valid.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: least squares; of attributes such as helpfulness: arXiv:2406.08673 (HelpSteer2).
    """
    score, target = masked.clean(is_valid, score, target, rank=1)
    return (score - jax.lax.stop_gradient(target)) ** 2


def process_reward(logits: Array, labels: Array, mask: Array) -> Array:
    """Per-step loss -y log sigmoid(x) - (1 - y) log sigmoid(-x), x = logits, y = labels.

    Args:
      logits: [B, T] float32, nats; log-odds that the step ending at this token is right. Carries
        gradient.
      labels: [B, T] float32 in [0, 1]; 1 for a right step, or how often it led to the right answer.
        Gradient stopped.
      mask: [B, T] bool; True at the last token of each step with a label. Elsewhere inputs may be
        anything, even inf.
    Returns:
      [B, T] float32, nats, exactly 0 off mask.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: arXiv:2312.08935 (Math-Shepherd); arXiv:2305.20050 ("Let's verify step by step").
    """
    logits, labels = masked.clean(mask, logits, labels, rank=2)
    labels = jax.lax.stop_gradient(labels)
    loss = -labels * jax.nn.log_sigmoid(logits) - (1 - labels) * jax.nn.log_sigmoid(-logits)
    return jnp.where(mask, loss, 0.0)


def _is_better(ranks: Array, is_valid: Array) -> Array:
    """[N, K, K] bool; whether completion i is ranked above completion j, both valid."""
    chex.assert_rank([ranks, is_valid], 2)
    chex.assert_equal_shape([ranks, is_valid])
    chex.assert_type([ranks, is_valid], [jnp.int32, bool])
    is_pair = is_valid[:, :, None] & is_valid[:, None, :]
    return is_pair & (ranks[:, :, None] < ranks[:, None, :])
