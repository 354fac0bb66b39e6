"""KL estimators against the exact KL of small categoricals, by enumeration of every outcome."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from tests.losses.case import Case, oracle_tests


def oracle(term):
    """Entry by entry; the reference is a constant."""

    def terms(logp, ref_logp, mask):
        out = np.zeros(mask.shape)
        for i in zip(*np.nonzero(mask), strict=True):
            out[i] = term(logp[i] - ref_logp[i])
        return out

    return terms


def weighted_oracle(logp, old_logp, ref_logp, mask):
    """The importance weight times the estimate, in probabilities."""
    out = np.zeros(mask.shape)
    for i in zip(*np.nonzero(mask), strict=True):
        p, old, ref = np.exp(logp[i]), np.exp(old_logp[i]), np.exp(ref_logp[i])
        out[i] = p / old * (ref / p - np.log(ref / p) - 1)
    return out


TestOracles = oracle_tests(
    [
        Case(losses.k1, oracle(lambda d: d)),
        Case(losses.k2, oracle(lambda d: d**2 / 2)),
        Case(losses.k3, oracle(lambda d: np.exp(-d) - 1 + d)),
        Case(losses.weighted_k3, weighted_oracle),
    ]
)

LOGITS = np.array([0.3, -1.2, 0.9, 0.1])
P = np.exp(LOGITS) / np.exp(LOGITS).sum()
REF = np.array([0.1, 0.4, 0.3, 0.2])
KL = (P * np.log(P / REF)).sum()
REVERSE = (REF * np.log(REF / P)).sum()
# d KL / d logits of a softmax: p_i (log(p_i / ref_i) - KL).
KL_GRAD = P * (np.log(P / REF) - KL)


def log(p):
    return jnp.log(jnp.asarray(p, jnp.float32))[None]


def expected_value_and_gradient(estimator, old=P):
    """Mean of the estimator over x ~ old, and of its gradient: the sampling itself is held fixed.

    `estimator` is of logp, ref_logp and mask.
    """

    def mean(logits):
        logp = jax.nn.log_softmax(logits)[None]
        terms = estimator(logp, log(REF), jnp.ones((1, 4), bool))
        return jnp.sum(jnp.asarray(old, jnp.float32) * terms[0])

    return jax.value_and_grad(mean)(jnp.asarray(LOGITS, jnp.float32))


def test_k1_and_k3_are_unbiased_and_of_the_right_sign():
    assert abs(KL - REVERSE) > 0.02, "the two directions must differ, or the sign is not tested"
    for estimator in (losses.k1, losses.k3):
        np.testing.assert_allclose(expected_value_and_gradient(estimator)[0], KL, rtol=1e-5)
    assert abs(expected_value_and_gradient(losses.k2)[0] - KL) > 1e-3  # biased, as it should be


def test_on_policy_gradients():
    np.testing.assert_allclose(expected_value_and_gradient(losses.k1)[1], np.zeros(4), atol=1e-6)
    np.testing.assert_allclose(expected_value_and_gradient(losses.k2)[1], KL_GRAD, rtol=1e-5)
    # k3: E[(1 - ref / p) d log p] = p - ref through the softmax: the gradient of the other KL.
    np.testing.assert_allclose(expected_value_and_gradient(losses.k3)[1], P - REF, rtol=1e-5)


@pytest.mark.parametrize("old", [P, np.array([0.4, 0.1, 0.2, 0.3])])
def test_weighted_k3_has_value_and_gradient_of_the_exact_kl_on_policy_and_off(old):
    def estimator(logp, ref_logp, mask):
        return losses.weighted_k3(logp, log(old), ref_logp, mask)

    value, grad = expected_value_and_gradient(estimator, old)
    np.testing.assert_allclose(value, KL, rtol=1e-5)
    np.testing.assert_allclose(grad, KL_GRAD, rtol=1e-5, atol=1e-7)


def test_off_policy_k2_and_k3_have_another_gradient():
    old = np.array([0.4, 0.1, 0.2, 0.3])
    for estimator in (losses.k1, losses.k2, losses.k3):
        grad = expected_value_and_gradient(estimator, old)[1]
        assert np.abs(grad - KL_GRAD).max() > 0.05


def test_weighted_k3_by_hand():
    # r = 0.5 / 0.25 = 2 and ref / p = 0.125 / 0.5 = 1/4: 2 (1/4 - 1 + log 4), slope 2 log 4.
    args = [jnp.log(jnp.array([[p, 0.3]])) for p in (0.5, 0.25, 0.125)]
    mask = jnp.array([[True, False]])
    grads = jax.grad(lambda *x: losses.weighted_k3(*x, mask).sum(), (0, 1, 2))(*args)
    expected = [[2 * (np.log(4) - 0.75), 0]]
    np.testing.assert_allclose(losses.weighted_k3(*args, mask), expected, rtol=1e-6)
    np.testing.assert_allclose(grads[0], [[2 * np.log(4), 0]], rtol=1e-6)
    assert not grads[1].any() and not grads[2].any()


def test_weighted_k3_far_from_the_others_pushes_the_right_way():
    def slope(logp, old, ref):
        x = [jnp.array([[value]]) for value in (logp, old, ref)]
        on = jnp.ones((1, 1), bool)
        value, grad = jax.value_and_grad(lambda a: losses.weighted_k3(a, *x[1:], on).sum())(x[0])
        assert jnp.isfinite(value)
        return grad.item()

    # Far below the reference a step against the gradient, r d, raises logp; far above, lowers it.
    assert slope(-1e4, -1e4, 0.0) == -1e4
    assert slope(0.0, 0.0, -1e4) == 1e4
    assert slope(-1e4, 0.0, 0.0) == 0.0
    np.testing.assert_allclose(slope(0.0, -1e4, -2.0), np.exp(20) * 2, rtol=1e-6)
    # Near it the two terms of the derivative cancel in float32: 1e-5, to a part in 1e4 here.
    np.testing.assert_allclose(slope(-1.0, -1.0, -1.0 - 2**-17), 2**-17, rtol=1e-4)


@pytest.mark.parametrize("estimator", [losses.k1, losses.k2, losses.k3])
def test_finite_at_extremes(estimator):
    logp, ref = jnp.array([[-1e4, 0.0]]), jnp.array([[0.0, -1e4]])
    on = jnp.ones((1, 2), bool)
    value, grad = jax.value_and_grad(lambda x: estimator(x, ref, on).sum())(logp)
    assert jnp.isfinite(value) and jnp.isfinite(grad).all()


def test_k3_keeps_its_sign_and_precision_near_zero():
    # exp(-d) - 1 + d in float32 is off by 6e-8 here, more than the value, and may be negative.
    d = np.geomspace(1e-9, 1e-2, 701).astype(np.float32)
    d = np.concatenate([d, -d])[None]
    terms = losses.k3(jnp.asarray(d), jnp.zeros_like(d), jnp.ones(d.shape, bool))
    assert (terms >= 0).all()
    kept = np.abs(d) >= 1e-4
    x = d[kept].astype(np.float64)
    np.testing.assert_allclose(terms[kept], x**2 / 2 - x**3 / 6 + x**4 / 24, rtol=3e-3)


def test_k3_far_below_the_reference():
    def total(d):
        return losses.k3(d, jnp.zeros_like(d), jnp.ones(d.shape, bool)).sum()

    # Up to d = -20 a step against the gradient, 1 - exp(-d), raises d; beyond there is none.
    value, grad = jax.value_and_grad(total)(jnp.array([[-25.0]]))
    np.testing.assert_allclose(value, np.exp(20) - 21, rtol=1e-6)
    assert grad.tolist() == [[0.0]]
    np.testing.assert_allclose(jax.grad(total)(jnp.array([[-19.0]])), [[1 - np.exp(19)]], rtol=1e-6)
