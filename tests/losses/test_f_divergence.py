"""f-DPO against loops over pairs, by hand, and where its divergences meet."""

import numpy as np
import pytest

from alignjax import losses
from tests.losses.case import Case, oracle_tests
from tests.losses.preferences import (
    LOG2,
    assert_finite_at_extremes,
    gains,
    gradients,
    pairs,
    per_pair,
    softplus,
)


def f_dpo(slope):
    """slope(u, **options) is f'(u) of table 1 of the paper."""

    def term(p, beta=0.1, **options):
        won, lost = (slope(np.exp(gain), **options) for gain in gains(p))
        return softplus(-(beta * won - beta * lost))

    return per_pair(term)


def alpha_slope(u, alpha=0.5):
    return (1 - u**-alpha) / alpha


def js_slope(u):
    return np.log(2 * u / (1 + u))


TestOracles = oracle_tests(
    [
        Case(losses.f_dpo_forward_kl, f_dpo(lambda u: -1 / u), {"beta": 0.001}),
        Case(losses.f_dpo_forward_kl, f_dpo(lambda u: -1 / u)),
        Case(losses.f_dpo_js, f_dpo(js_slope)),
        Case(losses.f_dpo_js, f_dpo(js_slope), {"beta": 2.0}),
        Case(losses.f_dpo_alpha, f_dpo(alpha_slope)),
        Case(losses.f_dpo_alpha, f_dpo(alpha_slope), {"beta": 0.05, "alpha": 0.1}),
    ]
)


@pytest.mark.parametrize(
    ("loss", "options", "score"),
    [
        (losses.f_dpo_forward_kl, {}, -1 / 2 + 3 / 2),
        (losses.f_dpo_js, {}, np.log(4 / 3) - np.log(4 / 5)),
        (losses.f_dpo_alpha, {"alpha": 0.5}, 2 * (1 - 2**-0.5) - 2 * (1 - 1.5**0.5)),
    ],
)
@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_by_hand(loss, options, score, beta):
    # pi / pi_ref = 2 and 2/3.
    given = pairs(-5.0 + LOG2, -7.0 + np.log(2 / 3), -5.0, -7.0)
    expected = np.log(1 + np.exp(-beta * score))
    np.testing.assert_allclose(loss(given, beta=beta, **options), [expected], rtol=2e-6)


def random_pairs():
    return pairs(*np.random.default_rng(0).normal(0, 2, (4, 64)))


@pytest.mark.parametrize(
    ("alpha", "limit"), [(1e-6, losses.dpo), (1 - 1e-6, losses.f_dpo_forward_kl)]
)
def test_alpha_lies_between_the_reverse_and_the_forward_kl(alpha, limit):
    given = random_pairs()
    loss = losses.f_dpo_alpha(given, alpha=alpha)
    np.testing.assert_allclose(loss, limit(given), rtol=1e-4, atol=1e-6)
    grads = gradients(losses.f_dpo_alpha, given, alpha=alpha)
    np.testing.assert_allclose(grads, gradients(limit, given), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "options", "most"),
    [
        (losses.f_dpo_forward_kl, {}, 0 + 1),
        (losses.f_dpo_js, {}, LOG2),
        (losses.f_dpo_alpha, {"alpha": 0.25}, 1 / 0.25),
    ],
)
def test_rewards_other_than_that_of_the_reverse_kl_are_bounded(loss, options, most):
    # f' of infinity less f'(1): a chosen completion soon has all that there is to gain.
    gained = loss(pairs(100.0, 0.0), beta=1.0, **options)
    np.testing.assert_allclose(gained, [np.log(1 + np.exp(-most))], rtol=1e-6)


@pytest.mark.parametrize(
    "loss", [losses.f_dpo_forward_kl, losses.f_dpo_js, losses.f_dpo_alpha], ids=lambda f: f.__name__
)
def test_finite_at_extremes(loss):
    assert_finite_at_extremes(loss)
    with pytest.raises(ValueError, match=r"beta=0\.0: expected beta > 0"):
        loss(pairs(0.0, 0.0), beta=0.0)


def test_straight_beyond_20_nats():
    # f'(u) = -1 / u to log u = -20; from there the tangent: -exp(20) (1 + 5) at -25.
    def at(gain):
        return losses.f_dpo_forward_kl(pairs(gain, 0.0), beta=1e-9)

    score = -np.exp(20) * 6 + 1
    np.testing.assert_allclose(at(-25.0), [softplus(-1e-9 * score)], rtol=1e-6)
    # The slope stays: what lies far below the reference is still pushed up.
    chosen, _ = gradients(losses.f_dpo_forward_kl, pairs(-1e4, 0.0), beta=1.0)
    np.testing.assert_allclose(chosen, [-np.exp(20)], rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_errors(alpha):
    with pytest.raises(ValueError, match=r"alpha=.*: expected 0 < alpha < 1"):
        losses.f_dpo_alpha(pairs(0.0, 0.0), alpha=alpha)
