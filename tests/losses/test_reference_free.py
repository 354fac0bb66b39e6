"""Losses without a reference against loops over pairs, by hand, and in their special cases."""

import numpy as np
import pytest

from alignjax import losses
from tests.losses.case import Case, oracle_tests
from tests.losses.preferences import (
    LOG2,
    LOG3,
    assert_finite_at_extremes,
    gradients,
    means,
    pairs,
    per_pair,
    sigmoid,
    softplus,
)


def simpo(p, beta=2.0, gamma_beta_ratio=0.5):
    won, lost = means(p)
    return softplus(-(beta * won - beta * lost - gamma_beta_ratio * beta))


def alphapo(p, beta=2.5, gamma_beta_ratio=0.1, alpha=0.25):
    won, lost = (beta * (1 - np.exp(m) ** -alpha) / alpha for m in means(p))
    return softplus(-(won - lost - gamma_beta_ratio * beta))


def cpo(p, beta=0.1, nll_coef=1.0):
    return softplus(-beta * (p["chosen"] - p["rejected"])) - nll_coef * p["chosen"]


def orpo(p, coef=0.1):
    likely, unlikely = (np.exp(m) for m in means(p))
    ratio = (likely / (1 - likely)) / (unlikely / (1 - unlikely))
    return -np.log(likely) - coef * np.log(sigmoid(np.log(ratio)))


TestOracles = oracle_tests(
    [
        Case(losses.simpo, per_pair(simpo)),
        Case(losses.simpo, per_pair(simpo), {"beta": 0.5, "gamma_beta_ratio": 1.5}),
        Case(losses.alphapo, per_pair(alphapo)),
        Case(
            losses.alphapo,
            per_pair(alphapo),
            {"beta": 0.5, "gamma_beta_ratio": 0.7, "alpha": -0.5},
        ),
        Case(losses.cpo, per_pair(cpo)),
        Case(losses.cpo, per_pair(cpo), {"beta": 0.5, "nll_coef": 0.3}),
        Case(losses.orpo, per_pair(orpo)),
        Case(losses.orpo, per_pair(orpo), {"coef": 1.5}),
        Case(losses.chosen_nll, per_pair(lambda p: -means(p)[0])),
    ]
)

# Averages of -1 and -2 nats, of -log 2 and -log 4.
NATS = pairs(-2.0, -6.0, lengths=(2, 3))
HALVES = pairs(-2 * LOG2, -3 * 2 * LOG2, lengths=(2, 3))


@pytest.mark.parametrize(
    ("loss", "given", "options", "expected"),
    [
        # gamma = 0.5 * 2 = 1: 2 * (-1 + 2) - 1 = 1.
        (losses.simpo, NATS, {"beta": 2.0, "gamma_beta_ratio": 0.5}, np.log(1 + np.exp(-1))),
        (losses.simpo, NATS, {}, np.log(1 + np.exp(-1))),
        # The authors' Llama 3 instruct: beta 2.5, gamma 1.375 = 0.55 * 2.5.
        (
            losses.simpo,
            NATS,
            {"beta": 2.5, "gamma_beta_ratio": 0.55},
            np.log(1 + np.exp(-(2.5 - 1.375))),
        ),
        # r = 1 - 2 and 1 - 4.
        (
            losses.alphapo,
            HALVES,
            {"beta": 1.0, "gamma_beta_ratio": 0.0, "alpha": 1.0},
            np.log(1 + np.exp(-2)),
        ),
        # alpha = -1: r = p - 1.
        (
            losses.alphapo,
            HALVES,
            {"beta": 4.0, "gamma_beta_ratio": 0.25, "alpha": -1.0},
            np.log(1 + np.exp(-(4 / 2 - 4 / 4 - 1))),
        ),
        (losses.cpo, pairs(-1.0, -1.0 - LOG3), {"beta": 1.0}, -np.log(3 / 4) + 1.0),
        (losses.cpo, pairs(-1.0, -1.0 - LOG3), {"beta": 1.0, "nll_coef": 0}, -np.log(3 / 4)),
        # Odds of 1 and of 1/3.
        (losses.orpo, HALVES, {}, LOG2 - 0.1 * np.log(3 / 4)),
        (losses.orpo, HALVES, {"coef": 0.0}, LOG2),
        (losses.chosen_nll, NATS, {}, 1.0),
    ],
)
def test_by_hand(loss, given, options, expected):
    np.testing.assert_allclose(loss(given, **options), [expected], rtol=1e-6)


def test_what_the_reference_thinks_is_not_read():
    given = pairs([-2.0], [-6.0], np.nan, np.inf)
    for loss in (losses.simpo, losses.alphapo, losses.cpo, losses.orpo, losses.chosen_nll):
        assert np.isfinite(loss(given)).all()
        assert np.isfinite(gradients(loss, given)).all()


@pytest.mark.parametrize("alpha", [1e-6, -1e-6])
def test_alphapo_without_its_shape_is_simpo(alpha):
    given = pairs(*-np.random.default_rng(0).exponential(3, (2, 64)), lengths=(2, 3))
    settings = {"beta": 1.5, "gamma_beta_ratio": 0.4}
    shaped = losses.alphapo(given, alpha=alpha, **settings)
    np.testing.assert_allclose(shaped, losses.simpo(given, **settings), rtol=1e-4)


def test_cpo_is_dpo_of_a_uniform_reference_plus_sft():
    given = pairs([-3.0, -9.0], [-4.0, -2.0], -5.0, -5.0)
    expected = losses.dpo(given) - 2.0 * given.chosen
    np.testing.assert_allclose(losses.cpo(given, nll_coef=2.0), expected, rtol=1e-6)


def test_orpo_odds_keep_their_digits_on_both_sides_of_their_branch():
    m = -np.concatenate([np.geomspace(2e-6, 60, 200), [LOG2, LOG2 - 1e-6, LOG2 + 1e-6]])
    m = m.astype(np.float32)
    # Against a rejected completion of even odds: coef log(1 + 1 / odds) = -coef m.
    odds = losses.orpo(pairs(m, -LOG2 + 0 * m), coef=1e4) + m
    np.testing.assert_allclose(odds, -1e4 * np.float64(m), rtol=3e-6, atol=1e-5)


def test_orpo_where_a_completion_is_certain():
    certain, unsure = pairs(0.0, -1.0), pairs(-1.0, 0.0)
    assert abs(losses.orpo(certain)[0]) < 1e-5  # nothing left to lose
    # The odds stop at 1e6: -log sigmoid(log(odds of exp(-1)) - log(1e6)).
    log_odds = -1 - np.log(1 - np.exp(-1)) - np.log(1e6)
    np.testing.assert_allclose(losses.orpo(unsure), [1 - 0.1 * log_odds], rtol=1e-5)
    # It is still pushed down: the slope of the log-odds is 1 / (1 - p).
    _, rejected = gradients(losses.orpo, unsure)
    np.testing.assert_allclose(rejected, [0.1 * 1e6], rtol=1e-3)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (losses.simpo, {}),
        (losses.alphapo, {}),
        (losses.alphapo, {"alpha": -1.0}),
        (losses.cpo, {}),
        (losses.orpo, {}),
        (losses.chosen_nll, {}),
    ],
)
def test_finite_at_extremes(loss, options):
    assert_finite_at_extremes(loss, **options)


def test_alphapo_far_down_is_still_pushed_up():
    # alpha m = -25: r goes on from exp(20) with the slope it has there, beta exp(20).
    given = pairs(-100.0, 0.0)
    reward = -(np.exp(20) * 6 - 1) / 0.25
    loss = losses.alphapo(given, beta=1.0, gamma_beta_ratio=0.0, alpha=0.25)
    np.testing.assert_allclose(loss, [-reward], rtol=1e-6)
    chosen, _ = gradients(losses.alphapo, given, beta=1.0, gamma_beta_ratio=0.0, alpha=0.25)
    np.testing.assert_allclose(chosen, [-np.exp(20)], rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (losses.simpo, {"beta": 0.0}, "expected beta > 0"),
        (losses.simpo, {"gamma_beta_ratio": -0.1}, "expected gamma_beta_ratio >= 0"),
        (losses.alphapo, {"beta": 0.0}, "expected beta > 0"),
        (losses.alphapo, {"gamma_beta_ratio": -0.1}, "expected gamma_beta_ratio >= 0"),
        (losses.alphapo, {"alpha": 0}, "alpha=0: expected alpha other than 0"),
        (losses.cpo, {"beta": 0.0}, "expected beta > 0"),
        (losses.cpo, {"nll_coef": -1.0}, "expected nll_coef >= 0"),
        (losses.orpo, {"coef": -1.0}, "expected coef >= 0"),
    ],
)
def test_errors(loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(NATS, **options)
