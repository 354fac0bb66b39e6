"""Losses of single completions against loops, by hand, and in what their papers claim."""

import jax
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
    pairs,
    per_pair,
    sigmoid,
    softplus,
    without_slope,
)


def kto(
    sequence_logp,
    ref_sequence_logp,
    is_desirable,
    is_valid,
    frozen,
    beta=0.1,
    desirable_weight=1.0,
    undesirable_weight=1.0,
    **_,
):
    out = np.zeros(len(is_valid))
    for n in np.flatnonzero(is_valid):
        above = sequence_logp[n] - ref_sequence_logp[n] - max(0.0, frozen["kl"])
        if is_desirable[n]:
            out[n] = desirable_weight * (1 - sigmoid(beta * above))
        else:
            out[n] = undesirable_weight * (1 - sigmoid(-beta * above))
    return out


def kto_kl(is_valid, frozen, **_):
    total, count = 0.0, 0
    for n in np.flatnonzero(is_valid):
        total += frozen["mismatched_logp"][n] - frozen["ref_mismatched_logp"][n]
        count += 1
    return np.array(total), np.array(float(count))


def bco(p, delta, beta=0.01):
    won, lost = gains(p)
    return softplus(-(beta * won - delta)) + softplus(beta * lost - delta)


def nca(p, beta=0.01):
    won, lost = gains(p)
    return softplus(-beta * won) + (softplus(beta * won) + softplus(beta * lost)) / 2


def sppo(p, beta=0.001):
    won, lost = gains(p)
    return (won - 1 / (2 * beta)) ** 2 + (lost + 1 / (2 * beta)) ** 2


def apo_zero(p, beta=0.1):
    won, lost = gains(p)
    return -sigmoid(beta * won) + sigmoid(beta * lost)


def apo_down(p, beta=0.1):
    won, lost = gains(p)
    return sigmoid(beta * won) - sigmoid(beta * won - beta * lost)


def transport(a, b):
    """The k-th smallest a of the batch against the k-th smallest b, where that a came from."""

    def terms(pairs, beta=0.01):
        on = np.flatnonzero(pairs["is_valid"])
        valid = {name: x[on] for name, x in pairs.items()}
        high, low = a(valid), b(valid)
        out = np.zeros(len(pairs["is_valid"]))
        by_a = sorted(range(len(on)), key=lambda i: high[i])
        for k, i in enumerate(by_a):
            out[on[i]] = softplus(-beta * (high[i] - sorted(low)[k]))
        return out

    return terms


AOT = transport(
    lambda p: p["chosen"] - p["rejected"], lambda p: p["ref_chosen"] - p["ref_rejected"]
)
AOT_UNPAIRED = transport(lambda p: gains(p)[0], lambda p: gains(p)[1])

TestOracles = oracle_tests(
    [
        Case(losses.kto, kto, frozen=True),
        Case(
            losses.kto,
            kto,
            {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.7},
            frozen=True,
        ),
        Case(losses.kto_kl, kto_kl, frozen=True),
        Case(losses.bco, without_slope(bco, "delta"), frozen=True),
        Case(losses.bco, without_slope(bco, "delta"), {"beta": 0.5}, frozen=True),
        Case(losses.nca, per_pair(nca)),
        Case(losses.nca, per_pair(nca), {"beta": 0.5}),
        Case(losses.sppo, per_pair(sppo)),
        Case(losses.sppo, per_pair(sppo), {"beta": 0.2}),
        Case(losses.apo_zero, per_pair(apo_zero)),
        Case(losses.apo_zero, per_pair(apo_zero), {"beta": 0.5}),
        Case(losses.apo_down, per_pair(apo_down)),
        Case(losses.apo_down, per_pair(apo_down), {"beta": 0.5}),
        Case(losses.aot, AOT),
        Case(losses.aot, AOT, {"beta": 0.5}),
        Case(losses.aot_unpaired, AOT_UNPAIRED),
        Case(losses.aot_unpaired, AOT_UNPAIRED, {"beta": 0.5}),
    ]
)

# pi / pi_ref = 2 and 2/3: sigmoid(D_w) = 2/3, sigmoid(D_l) = 2/5, sigmoid(D_w - D_l) = 3/4.
HAND = pairs(-5.0 + LOG2, -7.0 + np.log(2 / 3), -5.0, -7.0)


@pytest.mark.parametrize(
    ("loss", "rest", "options", "expected"),
    [
        # sigmoid(log 2 - log 2) and sigmoid(log 2 - log 2/3).
        (losses.bco, (LOG2,), {"beta": 1.0}, -np.log(1 / 2) - np.log(3 / 4)),
        (losses.nca, (), {"beta": 1.0}, -np.log(2 / 3) - (np.log(1 / 3) + np.log(3 / 5)) / 2),
        (losses.sppo, (), {"beta": 1.0}, (LOG2 - 0.5) ** 2 + (np.log(2 / 3) + 0.5) ** 2),
        (losses.apo_zero, (), {"beta": 1.0}, 2 / 5 - 2 / 3),
        (losses.apo_down, (), {"beta": 1.0}, 2 / 3 - 3 / 4),
        (losses.aot, (), {"beta": 1.0}, -np.log(3 / 4)),
        (losses.aot_unpaired, (), {"beta": 1.0}, -np.log(3 / 4)),
    ],
)
def test_by_hand(loss, rest, options, expected):
    got = loss(HAND, *[jnp.array(x) for x in rest], **options)
    np.testing.assert_allclose(got, [expected], rtol=2e-6)


ON = jnp.array([True, True])


def test_kto_by_hand():
    # D = log 6 and -log 3/2, z = log 2: sigmoid(log 3) = 3/4, sigmoid(log 2 + log 3/2) = 3/4.
    logp = jnp.array([-5.0 + np.log(6.0), -7.0 - np.log(1.5)])
    ref_logp = jnp.array([-5.0, -7.0])
    loss = losses.kto(
        logp,
        ref_logp,
        jnp.array([True, False]),
        jnp.array(LOG2),
        ON,
        beta=1.0,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    np.testing.assert_allclose(loss, [2 / 4, 3 / 4], rtol=2e-6)


def test_kto_baseline_is_never_below_zero():
    given = (jnp.array([LOG3, 0.0]), jnp.zeros(2), jnp.array([True, False]))
    below = losses.kto(*given, jnp.array(-9.0), ON, beta=1.0)
    np.testing.assert_allclose(below, [1 / 4, 1 / 2], rtol=1e-6)


def test_kto_kl_adds_up_over_micro_batches():
    logp, ref_logp = jnp.array([-1.0, -2.0, jnp.nan]), jnp.array([-3.0, -7.0, 0.0])
    on = jnp.array([True, True, False])
    total, weight = losses.kto_kl(logp, ref_logp, on)
    assert (float(total), float(weight)) == (2.0 + 5.0, 2.0)
    parts = [losses.kto_kl(logp[i], ref_logp[i], on[i]) for i in (slice(0, 1), slice(1, 3))]
    assert sum(p.total for p in parts) == 7.0 and sum(p.weight for p in parts) == 2.0
    assert losses.kto_kl(logp, ref_logp, jnp.zeros(3, bool)) == (0.0, 0.0)


def test_kto_learns_little_from_what_is_far_off():
    # Prospect theory's claim: the slope is largest at the baseline, and vanishes on both sides.
    def slope(gain, good):
        args = (jnp.zeros(1), jnp.array([good]), jnp.zeros(()), jnp.ones(1, bool))
        return jax.grad(lambda x: losses.kto(x, *args).sum())(jnp.array([gain]))[0]

    for good, sign in ((True, -1), (False, 1)):
        np.testing.assert_allclose(slope(0.0, good), sign * 0.1 / 4, rtol=1e-6)
        for gain in (-100.0, 100.0):
            assert 0 < sign * slope(gain, good) < 0.1 * 1e-4


def test_bco_is_an_upper_bound_of_dpo():
    # Theorem of the paper, for any shift of the rewards.
    given = pairs(*np.random.default_rng(0).normal(0, 5, (4, 64)))
    for delta in (-1.0, 0.0, 2.0):
        assert (losses.bco(given, jnp.array(delta), beta=0.1) > losses.dpo(given, beta=0.1)).all()


def test_sppo_is_at_rest_half_an_eta_from_the_reference():
    given = pairs(500.0, -500.0)
    np.testing.assert_allclose(losses.sppo(given), [0.0], atol=1e-6)  # eta = 1000
    np.testing.assert_allclose(gradients(losses.sppo, given), 0.0, atol=1e-4)


def test_which_way_apo_pushes():
    given = pairs(0.0, -10.0)
    chosen, rejected = gradients(losses.apo_zero, given)
    assert chosen[0] < 0 < rejected[0]  # up and down
    chosen, rejected = gradients(losses.apo_down, given)
    assert chosen[0] > 0 and rejected[0] > 0  # both down


def test_nca_holds_the_chosen_completion_where_dpo_lets_it_fall():
    # d is the same, but both completions have lost 100 nats: only NCA now pushes chosen up.
    given = pairs(-100.0, -150.0)
    assert gradients(losses.nca, given, beta=1.0)[0] < -0.9
    assert abs(gradients(losses.dpo, given, beta=1.0)[0]) < 1e-6


BATCH = pairs(
    [3.0, np.nan, 1.0, 7.0],
    [1.0, np.nan, 4.0, 2.0],
    [1.0, -np.inf, 5.0, 2.0],
    [2.0, 0.0, 3.0, 2.0],
    is_valid=[True, False, True, True],
)


def test_aot_sorts_the_valid_pairs_by_hand():
    # a = 2, -3, 5; b = -1, 2, 0, sorted -1, 0, 2: gaps 2 - 0, -3 + 1, 5 - 2.
    gaps = np.array([2.0, np.inf, -2.0, 3.0])
    np.testing.assert_allclose(losses.aot(BATCH, beta=1.0), softplus(-gaps), rtol=1e-6)
    # a = 2, -4, 5; b = -1, 1, 0: gaps 2 - 0, -4 + 1, 5 - 1.
    gaps = np.array([2.0, np.inf, -3.0, 4.0])
    np.testing.assert_allclose(losses.aot_unpaired(BATCH, beta=1.0), softplus(-gaps), rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.aot, losses.aot_unpaired], ids=lambda f: f.__name__)
def test_aot_follows_the_order_of_the_batch(loss):
    moved = jax.tree.map(lambda x: x[jnp.array([2, 3, 0, 1])], BATCH)
    np.testing.assert_allclose(loss(moved), loss(BATCH)[jnp.array([2, 3, 0, 1])], rtol=1e-6)


def test_aot_unpaired_does_not_read_who_was_paired():
    order = jnp.array([2, 1, 3, 0])  # the invalid one stays where it is
    moved = {name: getattr(BATCH, name)[order] for name in ("rejected", "ref_rejected")}
    np.testing.assert_allclose(
        losses.aot_unpaired(BATCH._replace(**moved)), losses.aot_unpaired(BATCH), rtol=1e-6
    )


LOSSES = [
    (losses.bco, (jnp.array(0.5),)),
    (losses.nca, ()),
    (losses.sppo, ()),
    (losses.apo_zero, ()),
    (losses.apo_down, ()),
    (losses.aot, ()),
    (losses.aot_unpaired, ()),
]


@pytest.mark.parametrize(("loss", "rest"), LOSSES)
def test_finite_at_extremes(loss, rest):
    assert_finite_at_extremes(loss, *rest, beta=1.0)
    with pytest.raises(ValueError, match=r"beta=0\.0: expected beta > 0"):
        loss(HAND, *rest, beta=0.0)


def test_kto_is_finite_at_extremes():
    ends = jnp.array([0.0, -1e4])
    for good in (True, False):
        args = (ends[::-1], jnp.full(2, good), jnp.zeros(()), ON)
        value, grad = jax.value_and_grad(lambda x, a=args: losses.kto(x, *a, beta=1.0).sum())(ends)
        assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize("name", ["beta", "desirable_weight", "undesirable_weight"])
def test_kto_errors(name):
    with pytest.raises(ValueError, match=f"{name}=0: expected {name} > 0"):
        losses.kto(jnp.zeros(2), jnp.zeros(2), ON, jnp.zeros(()), ON, **{name: 0})
    with pytest.raises(AssertionError):
        losses.kto(jnp.zeros(2), jnp.zeros(2), ON, jnp.zeros(2), ON)
