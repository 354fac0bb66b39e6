"""Losses of reward models against loops, by hand, and where they are one another."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from tests.losses.case import Case, oracle_tests
from tests.losses.preferences import LOG2, LOG3, softplus


def bradley_terry(chosen_score, rejected_score, is_valid, center_coef=0.0):
    out = np.zeros(len(is_valid))
    for n in np.flatnonzero(is_valid):
        w, l = chosen_score[n], rejected_score[n]
        out[n] = softplus(-(w - l)) + center_coef * (w + l) ** 2
    return out


def with_margin(chosen_score, rejected_score, is_valid, frozen, **_):
    out = np.zeros(len(is_valid))
    for n in np.flatnonzero(is_valid):
        out[n] = softplus(-(chosen_score[n] - rejected_score[n] - frozen["margin"][n]))
    return out


def soft(chosen_score, rejected_score, is_valid, frozen, **_):
    out = np.zeros(len(is_valid))
    for n in np.flatnonzero(is_valid):
        gain, p = chosen_score[n] - rejected_score[n], frozen["preference_prob"][n]
        out[n] = p * softplus(-gain) + (1 - p) * softplus(gain)
    return out


def comparisons(ranks, is_valid):
    """(better, worse) of one prompt."""
    on = np.flatnonzero(is_valid)
    return [(i, j) for i, j in itertools.permutations(on, 2) if ranks[i] < ranks[j]]


def kwise(scores, ranks, is_valid):
    out = np.zeros(len(scores))
    for n in range(len(scores)):
        terms = [
            softplus(scores[n, j] - scores[n, i]) for i, j in comparisons(ranks[n], is_valid[n])
        ]
        out[n] = np.mean(terms) if terms else 0.0
    return out


def is_comparable(ranks, is_valid):
    return np.array([any(comparisons(*both)) for both in zip(ranks, is_valid, strict=True)])


def plackett_luce(scores, ranks, is_valid):
    out = np.zeros(len(scores))
    for n in range(len(scores)):
        worse = comparisons(ranks[n], is_valid[n])
        for i in np.flatnonzero(is_valid[n]):
            left = [i] + [j for better, j in worse if better == i]
            out[n] -= np.log(np.exp(scores[n, i]) / sum(np.exp(scores[n, j]) for j in left))
    return out


def regression(score, is_valid, frozen, **_):
    return np.where(is_valid, (score - frozen["target"]) ** 2, 0.0)


def process_reward(logits, mask, frozen, **_):
    out = np.zeros(mask.shape)
    for at in zip(*np.nonzero(mask), strict=True):
        p, y = 1 / (1 + np.exp(-logits[at])), frozen["labels"][at]
        out[at] = -y * np.log(p) - (1 - y) * np.log(1 - p)
    return out


TestOracles = oracle_tests(
    [
        Case(losses.bradley_terry, bradley_terry),
        Case(losses.bradley_terry, bradley_terry, {"center_coef": 0.01}),
        Case(losses.bradley_terry_margin, with_margin, frozen=True),
        Case(losses.soft_bradley_terry, soft, frozen=True),
        Case(losses.kwise_ranking, kwise),
        Case(losses.plackett_luce, plackett_luce),
        Case(losses.is_comparable, is_comparable),
        Case(losses.regression, regression, frozen=True),
        Case(losses.process_reward, process_reward, frozen=True),
    ]
)

ONE = jnp.ones(1, bool)


def row(*x, dtype=jnp.float32):
    return jnp.array([x], dtype)


def test_pairs_by_hand():
    chosen, rejected = jnp.array([5 + LOG3]), jnp.array([5.0])
    loss = losses.bradley_terry(chosen, rejected, ONE, center_coef=0.01)
    np.testing.assert_allclose(loss, [-np.log(3 / 4) + 0.01 * (10 + LOG3) ** 2], rtol=1e-6)
    # A margin of log 6: sigmoid(log 3 - log 6) = 1 / 3.
    loss = losses.bradley_terry_margin(chosen, rejected, jnp.array([np.log(6.0)]), ONE)
    np.testing.assert_allclose(loss, [LOG3], rtol=1e-6)
    prob = jnp.array([0.3])
    loss = losses.soft_bradley_terry(chosen, rejected, prob, ONE)
    np.testing.assert_allclose(loss, [-0.3 * np.log(3 / 4) - 0.7 * np.log(1 / 4)], rtol=1e-6)
    loss = losses.regression(jnp.array([1.5]), jnp.array([-0.5]), ONE)
    assert loss.tolist() == [4.0]


def test_process_reward_by_hand():
    logits, on = row(LOG3, LOG3, LOG3, 0.0), row(True, True, True, False, dtype=bool)
    loss = losses.process_reward(logits, row(1.0, 0.0, 0.25, 1.0), on)
    soft = -0.25 * np.log(3 / 4) - 0.75 * np.log(1 / 4)
    np.testing.assert_allclose(loss, [[-np.log(3 / 4), -np.log(1 / 4), soft, 0]], rtol=1e-6)


def test_lists_by_hand():
    # Strengths exp(r) of 2, 1 and 3, ranked second, third and first.
    scores, on = row(LOG2, 0.0, LOG3), row(True, True, True, dtype=bool)
    strict = row(2, 3, 1, dtype=jnp.int32)
    # Pairs: 3 beats 2, 3 beats 1, 2 beats 1.
    mean = -(np.log(3 / 5) + np.log(3 / 4) + np.log(2 / 3)) / 3
    np.testing.assert_allclose(losses.kwise_ranking(scores, strict, on), [mean], rtol=1e-6)
    # 3 of all 6, then 2 of 3.
    expected = [-np.log(3 / 6) - np.log(2 / 3)]
    np.testing.assert_allclose(losses.plackett_luce(scores, strict, on), expected, rtol=1e-6)
    # The first two tied: only their pairs with the third remain.
    tied = row(2, 2, 1, dtype=jnp.int32)
    mean = -(np.log(3 / 5) + np.log(3 / 4)) / 2
    np.testing.assert_allclose(losses.kwise_ranking(scores, tied, on), [mean], rtol=1e-6)
    np.testing.assert_allclose(losses.plackett_luce(scores, tied, on), [LOG2], rtol=1e-6)


def test_two_completions_are_a_pair():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(9, 2)), jnp.float32)
    ranks, on = jnp.tile(row(2, 1, dtype=jnp.int32), (9, 1)), jnp.ones((9, 2), bool)
    expected = losses.bradley_terry(scores[:, 1], scores[:, 0], jnp.ones(9, bool))
    for loss in (losses.kwise_ranking, losses.plackett_luce):
        np.testing.assert_allclose(loss(scores, ranks, on), expected, rtol=1e-6)
    margin = jnp.zeros(9)
    loss = losses.bradley_terry_margin(scores[:, 1], scores[:, 0], margin, jnp.ones(9, bool))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_plackett_luce_is_a_distribution_over_orders():
    orders = jnp.array(list(itertools.permutations([1, 2, 3, 4])), jnp.int32)
    scores = jnp.tile(row(0.3, -1.2, 2.0, 0.7), (24, 1))
    loss = losses.plackett_luce(scores, orders, jnp.ones((24, 4), bool))
    np.testing.assert_allclose(np.exp(-loss).sum(), 1.0, rtol=1e-5)
    assert orders[loss.argmin()].tolist() == [3, 4, 1, 2]  # the order of the scores


def test_only_differences_of_scores_count():
    scores, ranks = row(0.5, -1.0, 2.0), row(1, 3, 2, dtype=jnp.int32)
    on = jnp.ones((1, 3), bool)
    for loss in (losses.kwise_ranking, losses.plackett_luce):
        np.testing.assert_allclose(loss(scores + 7, ranks, on), loss(scores, ranks, on), rtol=1e-5)
        grad = jax.grad(lambda s, f=loss: f(s, ranks, on).sum())(scores)
        np.testing.assert_allclose(grad.sum(), 0.0, atol=1e-6)
        assert grad[0, 0] < 0 < grad[0, 1]  # the best up, the worst down


def test_prompts_with_nothing_to_compare():
    ranks = jnp.array([[1, 1, 1], [1, 2, 2], [1, 2, 3], [1, 2, 1]], jnp.int32)
    on = jnp.array([[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 1, 1]], bool)
    assert losses.is_comparable(ranks, on).tolist() == [False, False, False, True]
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    for loss in (losses.kwise_ranking, losses.plackett_luce):
        values = loss(scores, ranks, on)
        assert (values[:3] == 0).all() and values[3] > 0
        grad = jax.grad(lambda s, f=loss: f(s, ranks, on).sum())(scores)
        assert (grad[:3] == 0).all()


def assert_finite(loss, x, *rest):
    value, grad = jax.value_and_grad(lambda x: loss(x, *rest).sum())(x)
    assert np.isfinite(value) and np.isfinite(grad).all()
    return grad


def test_finite_at_extremes():
    ends, other, on = jnp.array([1e4, -1e4]), jnp.array([-1e4, 1e4]), jnp.ones(2, bool)
    assert_finite(losses.bradley_terry, ends, other, on)
    assert_finite(losses.bradley_terry_margin, ends, other, jnp.ones(2), on)
    assert_finite(losses.soft_bradley_terry, ends, other, jnp.array([1.0, 0.5]), on)
    assert_finite(losses.regression, ends, other, on)
    scores, every = row(1e4, 0.0, -1e4), jnp.ones((1, 3), bool)
    for ranks in ([1, 2, 3], [3, 2, 1], [1, 1, 2]):
        for loss in (losses.kwise_ranking, losses.plackett_luce):
            assert_finite(loss, scores, row(*ranks, dtype=jnp.int32), every)
    grad = assert_finite(losses.process_reward, scores, row(0.0, 0.5, 1.0), every)
    assert grad.tolist() == [[1.0, 0.0, -1.0]]  # what is badly wrong is still pushed


def test_errors():
    with pytest.raises(ValueError, match=r"center_coef=-0\.1: expected center_coef >= 0"):
        losses.bradley_terry(jnp.zeros(1), jnp.zeros(1), ONE, center_coef=-0.1)
    every = jnp.ones((1, 2), bool)
    for ranks in (row(1.0, 2.0), row(1, 2, 3, dtype=jnp.int32)):
        with pytest.raises(AssertionError):
            losses.kwise_ranking(row(0.0, 0.0), ranks, every)
