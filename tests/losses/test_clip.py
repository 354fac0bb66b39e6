"""Surrogates against their papers' formulas in float64, and what each does with the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from tests.losses.case import Case, oracle_tests


def of_tokens(term):
    """`term` of one token's ratio, advantage and the options is its loss, is_low and is_high."""

    def oracle(logp, old_logp, advantage, mask, **options):
        out = np.zeros(mask.shape), np.zeros(mask.shape, bool), np.zeros(mask.shape, bool)
        for i in zip(*np.nonzero(mask), strict=True):
            ratio = np.exp(logp[i]) / np.exp(old_logp[i])
            for x, value in zip(out, term(ratio, advantage[i], **options), strict=True):
                x[i] = value
        return out

    return oracle


@of_tokens
def ppo(r, a, clip_low=0.2, clip_high=0.2):
    loss = -min(r * a, min(max(r, 1 - clip_low), 1 + clip_high) * a)
    return loss, a < 0 and r < 1 - clip_low, a > 0 and r > 1 + clip_high


@of_tokens
def dual(r, a, clip_low=0.2, clip_high=0.2, dual=3.0):
    objective = min(r * a, min(max(r, 1 - clip_low), 1 + clip_high) * a)
    if a < 0:
        objective = max(objective, dual * a)
    is_high = r > (1 + clip_high if a > 0 else dual) and a != 0
    return -objective, a < 0 and r < 1 - clip_low, is_high


@of_tokens
def soft(r, a, tau_pos=1.0, tau_neg=1.05):
    tau = tau_pos if a > 0 else tau_neg
    return -4 / tau / (1 + np.exp(-tau * (r - 1))) * a, False, False


def cispo(logp, old_logp, advantage, mask, frozen, clip_low=1.0, clip_high=4.0):
    """The weight is a constant: it is made of log-probs before they were perturbed."""
    out = np.zeros(mask.shape), np.zeros(mask.shape, bool), np.zeros(mask.shape, bool)
    for i in zip(*np.nonzero(mask), strict=True):
        r = np.exp(frozen["logp"][i]) / np.exp(old_logp[i])
        out[0][i] = -min(max(r, 1 - clip_low), 1 + clip_high) * advantage[i] * logp[i]
        out[1][i], out[2][i] = r < 1 - clip_low, r > 1 + clip_high
    return out


def reinforce(logp, old_logp, advantage, mask):
    nowhere = np.zeros(mask.shape, bool)
    return np.where(mask, -advantage * logp, 0), nowhere, nowhere


def geometric(logp, old_logp, advantage, mask, segment_ids, clip_low=0.4, clip_high=0.4):
    """With s the sign of A: (product over tokens of min(r^s, clip(r)^s))^(s / length) A."""
    loss = np.zeros(mask.shape)
    is_low, is_high = np.zeros(mask.shape, bool), np.zeros(mask.shape, bool)
    for i, t in zip(*np.nonzero(mask), strict=True):
        at = np.flatnonzero(mask[i] & (segment_ids[i] == segment_ids[i, t]))
        product = 1.0
        for u in at:
            r, s = np.exp(logp[i, u]) / np.exp(old_logp[i, u]), np.sign(advantage[i, u])
            clipped = min(max(r, np.exp(-clip_low)), np.exp(clip_high))
            product *= r if s == 0 else min(r**s, clipped**s) ** s
            if u == t:
                is_low[i, t] = s < 0 and r < np.exp(-clip_low)
                is_high[i, t] = s > 0 and r > np.exp(clip_high)
        loss[i, t] = -advantage[i, t] * product ** (1 / len(at))
    return loss, is_low, is_high


TestOracles = oracle_tests(
    [
        Case(losses.ppo_clip, ppo),
        Case(losses.ppo_clip, ppo, {"clip_low": 0.2, "clip_high": 0.28}),
        Case(losses.ppo_clip, ppo, {"clip_low": 0.0, "clip_high": 0.0}),
        Case(losses.ppo_clip, ppo, {"clip_low": 0.5, "clip_high": 10.0}),
        Case(losses.dual_clip, dual),
        Case(losses.dual_clip, dual, {"clip_low": 0.3, "clip_high": 0.9, "dual": 1.5}),
        Case(losses.cispo, cispo, frozen=True),
        Case(losses.cispo, cispo, {"clip_low": 0.4, "clip_high": 0.3}, frozen=True),
        Case(losses.sapo, soft),
        Case(losses.sapo, soft, {"tau_pos": 0.5, "tau_neg": 3.0}),
        Case(losses.reinforce, reinforce),
        Case(losses.gmpo, geometric),
        Case(losses.gmpo, geometric, {"clip_low": 0.1, "clip_high": 0.7}),
    ]
)

TOKENWISE = [losses.ppo_clip, losses.dual_clip, losses.cispo, losses.sapo, losses.reinforce]


def gmpo_of_one_sequence(logp, old_logp, advantage, mask, **options):
    ids = jnp.ones(mask.shape, jnp.int32)
    return losses.gmpo(logp, old_logp, advantage, mask, ids, **options)


def at_ratio(function, ratio, advantage, **options):
    """The surrogate of one row of tokens, and the gradient of its sum by logp; old_logp is 0."""
    advantage = jnp.asarray([advantage], jnp.float32)
    zero, on = jnp.zeros_like(advantage), jnp.ones(advantage.shape, bool)

    def total(logp):
        out = function(logp, zero, advantage, on, **options)
        return out.loss.sum(), out

    grad, out = jax.grad(total, has_aux=True)(jnp.log(jnp.asarray([ratio], jnp.float32)))
    return out, grad[0]


def test_ppo_by_hand():
    out, _ = at_ratio(
        losses.ppo_clip,
        [1.5, 1.5, 0.5, 0.5, 1.1],
        [2.0, -2.0, 2.0, -2.0, 3.0],
        clip_low=0.2,
        clip_high=0.3,
    )
    np.testing.assert_allclose(out.loss, [[-2.6, 3.0, -1.0, 1.6, -3.3]], rtol=1e-6)
    assert out.is_high.tolist() == [[True, False, False, False, False]]
    assert out.is_low.tolist() == [[False, False, False, True, False]]
    assert out.is_clipped.tolist() == [[True, False, False, True, False]]


def test_default_clip():
    out, _ = at_ratio(losses.ppo_clip, [1.5, 0.5], [1.0, -1.0])
    np.testing.assert_allclose(out.loss, [[-1.2, 0.8]], rtol=1e-6)


def test_dual_clip_by_hand():
    # A < 0: 2 r up to the dual 3, then 6; below 0.8 it is PPO's. A > 0: PPO's.
    out, grad = at_ratio(losses.dual_clip, [2.0, 4.0, 0.5, 4.0], [-2.0, -2.0, -2.0, 2.0])
    np.testing.assert_allclose(out.loss, [[4.0, 6.0, 1.6, -2.4]], rtol=1e-6)
    np.testing.assert_allclose(grad, [4.0, 0.0, 0.0, 0.0], rtol=1e-6)
    assert out.is_high.tolist() == [[False, True, False, True]]
    assert out.is_low.tolist() == [[False, False, True, False]]


def test_dual_clip_bounds_what_ppo_leaves_unbounded():
    ratio, advantage = np.geomspace(0.1, 100, 50), np.full(50, -2.0)
    unbounded, _ = at_ratio(losses.ppo_clip, ratio, advantage)
    out, _ = at_ratio(losses.dual_clip, ratio, advantage, dual=5.0)
    np.testing.assert_array_equal(out.loss, np.minimum(unbounded.loss, 10.0))
    assert unbounded.loss.max() > 100


def test_cispo_by_hand():
    # Weights 1.5, 5 (the default cap) and 0.01 (no default floor); the loss is -w A log r.
    out, grad = at_ratio(losses.cispo, [1.5, 7.0, 0.01], [2.0, 2.0, -1.0])
    expected = [-3 * np.log(1.5), -10 * np.log(7), 0.01 * np.log(0.01)]
    np.testing.assert_allclose(out.loss[0], expected, rtol=1e-5)
    np.testing.assert_allclose(grad, [-3, -10, 0.01], rtol=1e-5)
    assert out.is_high.tolist() == [[False, True, False]] and not out.is_low.any()
    # Widths around 1: the range is [0.6, 1.2], whatever the sign of A.
    out, grad = at_ratio(
        losses.cispo, [3.0, 3.0, 0.1], [1.0, -1.0, 1.0], clip_low=0.4, clip_high=0.2
    )
    np.testing.assert_allclose(grad, [-1.2, 1.2, -0.6], rtol=1e-6)
    assert out.is_high.tolist() == [[True, True, False]]
    assert out.is_low.tolist() == [[False, False, True]]


def test_sapo_by_hand():
    # r = 3: 4 sigmoid(2) A and 4 / 1.05 sigmoid(2.1) A; the slope by log r is 4 r s (1 - s) A.
    out, grad = at_ratio(losses.sapo, [3.0, 3.0], [2.0, -2.0])
    s, t = 0.880797, 0.890903
    np.testing.assert_allclose(out.loss, [[-4 * s * 2, 4 / 1.05 * t * 2]], rtol=1e-5)
    np.testing.assert_allclose(grad, [-24 * s * (1 - s), 24 * t * (1 - t)], rtol=1e-4)
    assert not out.is_clipped.any()


def test_sapo_holds_back_what_is_bad_more_the_further_off_policy():
    ratio = np.array([0.2, 0.5, 2.0, 4.0])
    _, good = at_ratio(losses.sapo, ratio, np.ones(4))
    _, bad = at_ratio(losses.sapo, ratio, -np.ones(4))
    assert (bad > 0).all() and (bad < -good).all() and (-good < ratio).all()


def test_reinforce_by_hand():
    out, grad = at_ratio(losses.reinforce, [np.exp(-2.0), np.exp(-1.0)], [3.0, -0.5])
    np.testing.assert_allclose(out.loss, [[6.0, -0.5]], rtol=1e-6)
    assert grad.tolist() == [-3.0, 0.5] and not out.is_clipped.any()


def test_gmpo_by_hand():
    # Log-ratios 0.2 and 0.9: for A > 0 the second stops at 0.4, their mean is 0.3.
    ratio = np.exp([0.2, 0.9])
    out, grad = at_ratio(gmpo_of_one_sequence, ratio, [2.0, 2.0])
    np.testing.assert_allclose(out.loss, [[-2 * np.exp(0.3)] * 2], rtol=1e-6)
    # Each loss holds half of the first token's log-ratio and none of the second's.
    np.testing.assert_allclose(grad, [-2 * np.exp(0.3), 0], rtol=1e-6)
    assert out.is_high.tolist() == [[False, True]] and not out.is_low.any()
    # For A < 0 nothing stops it from above: the mean is 0.55.
    out, grad = at_ratio(gmpo_of_one_sequence, ratio, [-2.0, -2.0])
    np.testing.assert_allclose(out.loss, [[2 * np.exp(0.55)] * 2], rtol=1e-6)
    assert not out.is_clipped.any() and (grad > 0).all()
    # From below it stops at -0.4: mean (0.2 - 0.4) / 2.
    out, _ = at_ratio(gmpo_of_one_sequence, np.exp([0.2, -0.9]), [-2.0, -2.0])
    np.testing.assert_allclose(out.loss, [[2 * np.exp(-0.1)] * 2], rtol=1e-6)
    assert out.is_low.tolist() == [[False, True]] and not out.is_high.any()


def test_the_ratio_of_gspo_by_hand():
    # Log-ratios 0.1 and 0.5: the sequence's is their mean, 0.3, and 1.35 stops at 1.2.
    logp, on = jnp.array([[0.1, 0.5]]), jnp.ones((1, 2), bool)
    level = losses.sequence_mean_level(logp, on, jnp.array([[1, 1]]))
    bad = losses.ppo_clip(level, jnp.zeros((1, 2)), jnp.full((1, 2), -1.0), on)
    np.testing.assert_allclose(bad.loss, [[np.exp(0.3)] * 2], rtol=1e-6)
    good = losses.ppo_clip(level, jnp.zeros((1, 2)), jnp.full((1, 2), 1.0), on)
    np.testing.assert_allclose(good.loss, [[-1.2] * 2], rtol=1e-6)


def test_gmpo_without_a_clip_is_the_ratio_of_gspo():
    rng = np.random.default_rng(0)
    ids = jnp.asarray(np.sort(rng.integers(1, 4, (4, 9)), axis=1), jnp.int32)
    on = jnp.asarray(rng.random((4, 9)) < 0.8)
    logp, old = jnp.asarray(-rng.exponential(size=(2, 4, 9)), jnp.float32)
    advantage = jnp.where(ids == 2, -0.5, 1.5)
    level = [losses.sequence_mean_level(x, on, ids) for x in (logp, old)]
    wide = losses.gmpo(logp, old, advantage, on, ids, clip_low=99.0, clip_high=99.0)
    gspo = losses.ppo_clip(*level, advantage, on, clip_low=0.99, clip_high=99.0)
    np.testing.assert_allclose(wide.loss, gspo.loss, rtol=1e-5)


@pytest.mark.parametrize("function", [*TOKENWISE, gmpo_of_one_sequence])
def test_on_policy_gradient_is_minus_advantage(function):
    _, grad = at_ratio(function, [1.0, 1.0], [2.0, 2.0])
    np.testing.assert_allclose(grad, [-2.0, -2.0], rtol=1e-6)
    _, grad = at_ratio(function, [1.0, 1.0], [-3.0, -3.0])
    np.testing.assert_allclose(grad, [3.0, 3.0], rtol=1e-6)


@pytest.mark.parametrize("function", [losses.ppo_clip, losses.dual_clip, gmpo_of_one_sequence])
def test_a_clip_of_no_width_takes_no_gradient_on_policy(function):
    """A minimum of two equal terms would halve it."""
    for advantage in (2.0, -3.0):
        _, grad = at_ratio(function, [1.0, 1.0], [advantage] * 2, clip_low=0.0, clip_high=0.0)
        np.testing.assert_allclose(grad, [-advantage] * 2, rtol=1e-6)


@pytest.mark.parametrize("function", [*TOKENWISE, gmpo_of_one_sequence])
def test_no_loss_where_the_advantage_is_zero(function):
    out, grad = at_ratio(function, [20.0, 0.1], [0.0, 0.0])
    assert not out.loss.any() and not grad.any()
    assert function is losses.cispo or not out.is_clipped.any()


@pytest.mark.parametrize("function", [*TOKENWISE, gmpo_of_one_sequence])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_finite_at_extremes(function, advantage):
    logp = jnp.array([[0.0, -1e4, -3e38, 0.0]])
    old = jnp.array([[-1e4, 0.0, 0.0, -3e38]])
    on = jnp.ones((1, 4), bool)

    def total(x):
        return function(x, old, jnp.full((1, 4), advantage), on).loss.sum()

    value, grad = jax.value_and_grad(total)(logp)
    assert jnp.isfinite(value) and jnp.isfinite(grad).all()


@pytest.mark.parametrize("function", [*TOKENWISE, gmpo_of_one_sequence])
def test_shapes_and_dtypes(function):
    x, on = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    for i in range(3):
        for bad in (jnp.zeros((1, 3)), jnp.zeros((1, 2), jnp.int32)):
            with pytest.raises(AssertionError):
                function(*[bad if i == j else x for j in range(3)], on)
    with pytest.raises(AssertionError):
        function(x, x, x, jnp.ones((1, 2)))


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        *[
            (function, {"clip_low": low, "clip_high": high}, "0 <= clip_low < 1")
            for function in (losses.ppo_clip, losses.dual_clip)
            for low, high in [(-0.1, 0.2), (1.0, 0.2), (0.2, -0.1)]
        ],
        (losses.dual_clip, {"dual": 1.0}, "dual=1.0"),
        *[
            (function, {"clip_low": low, "clip_high": high}, f"clip_low={low}, clip_high={high}")
            for function in (losses.cispo, gmpo_of_one_sequence)
            for low, high in [(-0.1, 0.2), (0.2, -0.1)]
        ],
        (losses.sapo, {"tau_pos": 0.0}, "tau_pos=0.0"),
        (losses.sapo, {"tau_neg": -1.0}, "tau_neg=-1.0"),
    ],
)
def test_errors(function, options, message):
    x, on = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    with pytest.raises(ValueError, match=message):
        function(x, x, x, on, **options)
