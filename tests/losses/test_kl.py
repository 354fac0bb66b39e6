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


TestOracles = oracle_tests(
    [
        Case(losses.k1, oracle(lambda d: d)),
        Case(losses.k2, oracle(lambda d: d**2 / 2)),
        Case(losses.k3, oracle(lambda d: np.exp(-d) - 1 + d)),
    ]
)

LOGITS = np.array([0.3, -1.2, 0.9, 0.1])
P = np.exp(LOGITS) / np.exp(LOGITS).sum()
REF = np.array([0.1, 0.4, 0.3, 0.2])
KL = (P * np.log(P / REF)).sum()
REVERSE = (REF * np.log(REF / P)).sum()
# d KL / d logits of a softmax: p_i (log(p_i / ref_i) - KL).
KL_GRAD = P * (np.log(P / REF) - KL)


def expected_value_and_gradient(estimator):
    """Mean of the estimator over x ~ P, and of its gradient: the sampling itself is held fixed."""

    def mean(logits):
        logp = jax.nn.log_softmax(logits)[None]
        ref_logp = jnp.asarray(np.log(REF), jnp.float32)[None]
        terms = estimator(logp, ref_logp, jnp.ones((1, 4), bool))
        return jnp.sum(jnp.asarray(P, jnp.float32) * terms[0])

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


@pytest.mark.parametrize(
    ("estimator", "oracle", "slope"),
    [
        (losses.k1, lambda d: d, lambda d: np.ones_like(d)),
        (losses.k2, lambda d: d**2 / 2, lambda d: d),
        (losses.k3, lambda d: np.exp(-d) - 1 + d, lambda d: 1 - np.exp(-d)),
    ],
)
def test_random_ragged_batches(estimator, oracle, slope):
    rng = np.random.default_rng(2)
    mask = rng.random((5, 9)) < 0.5
    logp, ref = -rng.exponential(size=(2, 5, 9)).astype(np.float32)
    dirty = [jnp.asarray(np.where(mask, x, bad)) for x, bad in ((logp, np.nan), (ref, np.inf))]
    d = logp.astype(np.float64) - ref
    terms = estimator(*dirty, jnp.asarray(mask))
    np.testing.assert_allclose(terms, np.where(mask, oracle(d), 0), rtol=1e-5, atol=1e-6)
    grads = jax.grad(lambda a, b: estimator(a, b, jnp.asarray(mask)).sum(), (0, 1))(*dirty)
    np.testing.assert_allclose(grads[0], np.where(mask, slope(d), 0), rtol=1e-5, atol=1e-6)
    assert (grads[1] == 0).all()


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
