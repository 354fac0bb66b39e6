"""The DPO family against loops over pairs, by hand, and in what its papers claim."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from tests.losses.case import Case, oracle_tests
from tests.losses.preferences import (
    LOG2,
    LOG3,
    assert_finite_at_extremes,
    gains,
    gradients,
    means,
    pairs,
    per_pair,
    sigmoid,
    softplus,
    without_slope,
)


def gain(p):
    return (p["chosen"] - p["rejected"]) - (p["ref_chosen"] - p["ref_rejected"])


def mean_gain(p):
    won, lost = gains(p)
    return won / p["chosen_len"] - lost / p["rejected_len"]


def dpo(p, beta=0.1, label_smoothing=0.0):
    kept = softplus(-beta * gain(p))
    return (1 - label_smoothing) * kept + label_smoothing * softplus(beta * gain(p))


def soft(p, preference_prob, beta=0.1):
    kept, flipped = softplus(-beta * gain(p)), softplus(beta * gain(p))
    return preference_prob * kept + (1 - preference_prob) * flipped


def robust(p, beta=0.1, label_smoothing=0.1):
    kept, flipped = softplus(-beta * gain(p)), softplus(beta * gain(p))
    e = label_smoothing
    return ((1 - e) * kept - e * flipped) / (1 - 2 * e)


def exo(p, beta=0.1, label_smoothing=1e-3):
    total = 0.0
    for sign, target in ((1, 1 - label_smoothing), (-1, label_smoothing)):
        q = sigmoid(sign * beta * gain(p))
        total += q * np.log(q / target)
    return total


def discopop(p, beta=0.05, tau=0.05):
    z = beta * gain(p)
    g = sigmoid(z / tau)
    return (1 - g) * softplus(-z) + g * np.exp(-z)


def dpop(p, beta=0.3, penalty_coef=50.0):
    won, lost = gains(p)
    return softplus(-beta * (won - lost - penalty_coef * max(0.0, -won)))


def wpo(p, weights, beta=0.01, max_weight=1.0):
    return min(weights, max_weight) * softplus(-beta * gain(p))


def dpo_and_others(pairs):
    parts = ((0.8, functools.partial(losses.dpo, beta=0.2)), (1.5, losses.chosen_nll))
    return losses.mixture(pairs, parts=parts)


def ipo_mean(p, beta=0.1):
    return (mean_gain(p) - 1 / (2 * beta)) ** 2


TestOracles = oracle_tests(
    [
        Case(losses.dpo, per_pair(dpo)),
        Case(losses.dpo, per_pair(dpo), {"beta": 0.5, "label_smoothing": 0.2}),
        Case(losses.soft_dpo, without_slope(soft, "preference_prob"), {"beta": 0.3}, frozen=True),
        Case(losses.robust_dpo, per_pair(robust)),
        Case(losses.robust_dpo, per_pair(robust), {"beta": 0.5, "label_smoothing": 0.3}),
        Case(
            losses.length_normalized_dpo,
            per_pair(lambda p, beta=5.0: softplus(-beta * mean_gain(p))),
        ),
        Case(losses.wpo, without_slope(wpo, "weights"), frozen=True),
        Case(
            losses.wpo, without_slope(wpo, "weights"), {"beta": 0.3, "max_weight": 0.5}, frozen=True
        ),
        Case(losses.dpop, per_pair(dpop)),
        Case(losses.dpop, per_pair(dpop), {"beta": 0.1, "penalty_coef": 0.5}),
        Case(losses.hinge, per_pair(lambda p, beta=0.1: max(0.0, 1 - beta * gain(p)))),
        Case(losses.ipo, per_pair(lambda p, beta=0.1: (gain(p) - 1 / (2 * beta)) ** 2)),
        Case(losses.ipo_mean, per_pair(ipo_mean)),
        Case(losses.ipo_mean, per_pair(ipo_mean), {"beta": 0.4}),
        Case(losses.exo, per_pair(exo)),
        Case(losses.exo, per_pair(exo), {"beta": 0.5, "label_smoothing": 0.1}),
        Case(losses.discopop, per_pair(discopop)),
        Case(losses.discopop, per_pair(discopop), {"beta": 0.3, "tau": 0.5}),
        Case(
            dpo_and_others,
            per_pair(lambda p: 0.8 * dpo(p, beta=0.2) - 1.5 * means(p)[0]),
        ),
    ]
)

# pi / pi_ref = 2 and 2/3, so that exp(d) = 3; of 2 and 3 tokens.
D_W, D_L = LOG2, np.log(2 / 3)
HAND = pairs(-5.0 + D_W, -7.0 + D_L, -5.0, -7.0, lengths=(2, 3))


@pytest.mark.parametrize(
    ("loss", "rest", "options", "expected"),
    [
        (losses.dpo, (), {"beta": 1.0}, -np.log(3 / 4)),
        (losses.dpo, (), {"beta": 2.0}, -np.log(9 / 10)),
        (
            losses.dpo,
            (),
            {"beta": 1.0, "label_smoothing": 0.1},
            -0.9 * np.log(3 / 4) - 0.1 * np.log(1 / 4),
        ),
        (losses.soft_dpo, (0.3,), {"beta": 1.0}, -0.3 * np.log(3 / 4) - 0.7 * np.log(1 / 4)),
        (losses.robust_dpo, (), {"beta": 1.0}, (-0.9 * np.log(3 / 4) + 0.1 * np.log(1 / 4)) / 0.8),
        (losses.length_normalized_dpo, (), {"beta": 6.0}, np.log(1 + 1 / (2**3 * 1.5**2))),
        (losses.wpo, (0.5,), {"beta": 1.0}, -0.5 * np.log(3 / 4)),
        (losses.wpo, (4.0,), {"beta": 1.0}, -1.0 * np.log(3 / 4)),
        (losses.wpo, (4.0,), {"beta": 1.0, "max_weight": np.inf}, -4.0 * np.log(3 / 4)),
        (losses.dpop, (), {"beta": 1.0}, -np.log(3 / 4)),  # chosen has gained: no penalty
        (losses.hinge, (), {"beta": 0.5}, 1 - 0.5 * LOG3),
        (losses.hinge, (), {"beta": 1.0}, 0.0),
        (losses.ipo, (), {"beta": 1.0}, (LOG3 - 0.5) ** 2),
        (losses.ipo_mean, (), {"beta": 1.0}, (D_W / 2 - D_L / 3 - 0.5) ** 2),
        (
            losses.exo,
            (),
            {"beta": 1.0, "label_smoothing": 0.1},
            3 / 4 * np.log(0.75 / 0.9) + 1 / 4 * np.log(0.25 / 0.1),
        ),
        (
            losses.discopop,
            (),
            {"beta": 1.0, "tau": 1.0},
            1 / 4 * -np.log(3 / 4) + 3 / 4 * (1 / 3),
        ),
    ],
)
def test_by_hand(loss, rest, options, expected):
    got = loss(HAND, *[jnp.array([x]) for x in rest], **options)
    np.testing.assert_allclose(got, [expected], rtol=2e-6, atol=1e-7)


def test_dpop_by_hand():
    # D_w = -log 2, D_l = -log 6: d = log 3, less 1 * log 2 of penalty: sigmoid(log 1.5) = 0.6.
    given = pairs(-LOG2, -np.log(6.0))
    got = losses.dpop(given, beta=1.0, penalty_coef=1.0)
    np.testing.assert_allclose(got, [-np.log(0.6)], rtol=1e-6)


def test_defaults_of_the_papers():
    # d = 1 / beta at each default beta: sigmoid(1) throughout.
    one = np.log(1 + np.exp(-1))
    for loss, beta in ((losses.dpo, 0.1), (losses.dpop, 0.3), (losses.length_normalized_dpo, 5)):
        np.testing.assert_allclose(loss(pairs(1 / beta, 0.0)), [one], rtol=1e-6)
    weights = jnp.ones(1)
    np.testing.assert_allclose(losses.wpo(pairs(100.0, 0.0), weights), [one], rtol=1e-6)
    np.testing.assert_allclose(losses.dpop(pairs(-0.1, 0.0)), [np.log(1 + np.exp(1.53))], rtol=1e-6)


def random_pairs(seed=0, n=64):
    chosen, rejected, ref_chosen, ref_rejected = np.random.default_rng(seed).normal(0, 5, (4, n))
    return pairs(chosen, rejected, ref_chosen, ref_rejected)


def gain_of(given):
    return np.asarray(gain(given._asdict()), np.float64)


def test_dpo_gradient_is_that_of_the_paper():
    # Sec. 4: -beta sigmoid(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l)).
    given, beta = random_pairs(), 0.3
    chosen, rejected = gradients(losses.dpo, given, beta=beta)
    weight = beta * sigmoid(-beta * gain_of(given))
    np.testing.assert_allclose(chosen, -weight, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(rejected, weight, rtol=1e-5, atol=1e-7)


def swapped(given):
    return given._replace(
        chosen=given.rejected,
        rejected=given.chosen,
        ref_chosen=given.ref_rejected,
        ref_rejected=given.ref_chosen,
    )


@pytest.mark.parametrize("flip", [0.1, 0.4])
def test_robust_dpo_is_unbiased_under_flipped_labels(flip):
    given = random_pairs()
    seen = functools.partial(losses.robust_dpo, label_smoothing=flip)
    mean = (1 - flip) * seen(given) + flip * seen(swapped(given))
    np.testing.assert_allclose(mean, losses.dpo(given), rtol=1e-4, atol=1e-5)


def test_soft_labels_between_both_orders():
    given = random_pairs()
    prob = jnp.full(64, 0.8)
    np.testing.assert_allclose(
        losses.soft_dpo(given, prob), losses.dpo(given, label_smoothing=0.2), rtol=1e-5
    )
    np.testing.assert_allclose(
        losses.soft_dpo(given, jnp.zeros(64)), losses.dpo(swapped(given)), rtol=1e-6
    )


def test_where_ipo_and_exo_are_at_rest():
    # Unlike that of DPO, their minimum is at a finite gain: 1 / (2 beta), and where q = p.
    for loss, d in (
        (losses.ipo, 1 / (2 * 0.1)),
        (losses.ipo_mean, 1 / (2 * 0.1)),
        (losses.exo, np.log(0.999 / 0.001) / 0.1),
    ):
        given = pairs(d, 0.0)
        np.testing.assert_allclose(loss(given, beta=0.1), [0.0], atol=1e-6)
        np.testing.assert_allclose(gradients(loss, given, beta=0.1), 0.0, atol=1e-6)


def test_dpop_holds_the_chosen_completion_up():
    # Less likely than under the reference by 1, but by 9 less than the rejected one.
    given = pairs(-1.0, -10.0)
    dpo, _ = gradients(losses.dpo, given)
    dpop, _ = gradients(losses.dpop, given, beta=0.1)
    # beta (1 + 50) sigmoid(beta (50 - 9)) against beta sigmoid(-beta 9).
    np.testing.assert_allclose(dpop, [-0.1 * 51 * sigmoid(4.1)], rtol=1e-5)
    np.testing.assert_allclose(dpo, [-0.1 * sigmoid(-0.9)], rtol=1e-5)


LOSSES = [
    (losses.dpo, (), {"label_smoothing": 0.1}),
    (losses.dpo, (), {}),
    (losses.soft_dpo, (jnp.full(16, 0.3),), {}),
    (losses.robust_dpo, (), {}),
    (losses.length_normalized_dpo, (), {}),
    (losses.wpo, (jnp.full(16, 0.3),), {}),
    (losses.dpop, (), {}),
    (losses.hinge, (), {}),
    (losses.ipo, (), {}),
    (losses.ipo_mean, (), {}),
    (losses.exo, (), {"beta": 1.0}),
    (losses.discopop, (), {"beta": 1.0}),
    (losses.discopop, (), {"beta": 1.0, "tau": 1.0}),
]


@pytest.mark.parametrize(("loss", "rest", "options"), LOSSES)
def test_finite_at_extremes(loss, rest, options):
    assert_finite_at_extremes(loss, *rest, **options)


@pytest.mark.parametrize("loss", [losses.dpo, losses.discopop, losses.exo])
def test_what_is_badly_wrong_is_still_pushed(loss):
    chosen, rejected = gradients(loss, pairs(-1e4, 0.0), beta=0.1)
    if loss is losses.exo:  # q = (0, 1): a minimum of its own, which only its authors' p can leave
        np.testing.assert_allclose([chosen, rejected], 0.0, atol=1e-6)
    else:
        np.testing.assert_allclose([chosen, rejected], [[-0.1], [0.1]], rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "rest", "options", "message"),
    [
        *[(loss, rest, {"beta": 0.0}, r"beta=0\.0: expected beta > 0") for loss, rest, _ in LOSSES],
        (losses.dpo, (), {"label_smoothing": 0.5}, "expected 0 <= label_smoothing < 0.5"),
        (losses.robust_dpo, (), {"label_smoothing": 0.5}, "expected 0 <= label_smoothing < 0.5"),
        (losses.exo, (), {"label_smoothing": 0.0}, "expected label_smoothing > 0"),
        (losses.exo, (), {"label_smoothing": 0.5}, "expected 0 <= label_smoothing < 0.5"),
        (losses.dpop, (), {"penalty_coef": 0.0}, "expected penalty_coef > 0"),
        (losses.wpo, (jnp.ones(1),), {"max_weight": 0.0}, "expected max_weight > 0"),
        (losses.discopop, (), {"tau": 0.0}, r"tau=0\.0: expected 0 < tau <= 1"),
        (losses.discopop, (), {"tau": 1.5}, r"tau=1\.5: expected 0 < tau <= 1"),
        (losses.mixture, (), {"parts": ()}, "expected at least one pair"),
    ],
)
def test_errors(loss, rest, options, message):
    with pytest.raises(ValueError, match=message):
        loss(HAND, *rest, **options)


def test_a_length_of_zero_is_not_hidden():
    given = pairs([-1.0, 0.0], [-1.0, -1.0], lengths=(0, 1))
    assert not np.isfinite(losses.ipo_mean(given)).any()
    assert np.isfinite(losses.ipo(given)).all()  # reads no length
    with pytest.raises(AssertionError):
        losses.ipo_mean(given._replace(chosen_len=jnp.ones(2)))
