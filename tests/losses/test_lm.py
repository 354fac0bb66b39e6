"""Losses of a language model, on the mask and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from tests.losses.case import Case, oracle_tests


def oracle(term):
    """Entry by entry: `term` of what each argument holds there, and of what it held before."""

    def terms(mask, label_smoothing=None, frozen=None, **args):
        out = np.zeros(mask.shape)
        more = {} if label_smoothing is None else {"e": label_smoothing}
        for i in zip(*np.nonzero(mask), strict=True):
            before = [] if frozen is None else [frozen[name][i] for name in args]
            out[i] = term(*(x[i] for x in args.values()), *before, **more)
        return out

    return terms


def smoothed(logp, mean_logp, e=0.1):
    return (1 - e) * -logp + e * -mean_logp


TestOracles = oracle_tests(
    [
        Case(losses.cross_entropy, oracle(lambda logp: -logp)),
        Case(losses.dft, oracle(lambda logp, before: -np.exp(before) * logp), frozen=True),
        Case(losses.z_loss, oracle(lambda log_z: log_z**2)),
        Case(losses.label_smoothed, oracle(smoothed)),
        Case(losses.label_smoothed, oracle(smoothed), {"label_smoothing": 0.4}),
    ]
)

ON = jnp.ones((1, 2), bool)


def test_value_and_gradient_by_hand():
    logps = jnp.array([[np.nan, -0.5, -2.0], [-np.inf, 3.0, -0.25]], jnp.float32)
    mask = jnp.array([[False, True, True], [False, False, True]])
    assert losses.cross_entropy(logps, mask).tolist() == [[0, 0.5, 2.0], [0, 0, 0.25]]
    grad = jax.grad(lambda x: losses.cross_entropy(x, mask).sum())(logps)
    assert grad.tolist() == [[0, -1, -1], [0, 0, -1]]


def test_dft_by_hand():
    """Probabilities 1/2 and 1/8: the unlikely token weighs a quarter of the likely one."""
    logps = jnp.log(jnp.array([[1 / 2, 1 / 8]]))
    expected = [[-1 / 2 * np.log(1 / 2), -1 / 8 * np.log(1 / 8)]]
    np.testing.assert_allclose(losses.dft(logps, ON), expected, rtol=1e-6)
    grad = jax.grad(lambda x: losses.dft(x, ON).sum())(logps)
    np.testing.assert_allclose(grad, [[-1 / 2, -1 / 8]], rtol=1e-6)


def test_z_loss_by_hand():
    log_z = jnp.array([[3.0, -0.5]])
    assert losses.z_loss(log_z, ON).tolist() == [[9.0, 0.25]]
    assert jax.grad(lambda x: losses.z_loss(x, ON).sum())(log_z).tolist() == [[6.0, -1.0]]


def test_label_smoothed_is_the_cross_entropy_of_a_smoothed_label():
    """p = (3/4, 1/4), the first token, e = 0.2: the label is 0.8 + 0.2 / 2 and 0.2 / 2."""
    logp, other = np.log(3 / 4), np.log(1 / 4)
    mean = (logp + other) / 2
    out = losses.label_smoothed(
        jnp.full((1, 2), logp), jnp.full((1, 2), mean), ON, label_smoothing=0.2
    )
    np.testing.assert_allclose(out, [[-(0.9 * logp + 0.1 * other)] * 2], rtol=1e-6)
    none = losses.label_smoothed(jnp.full((1, 2), logp), jnp.ones((1, 2)), ON, label_smoothing=0)
    np.testing.assert_allclose(none, losses.cross_entropy(jnp.full((1, 2), logp), ON), rtol=1e-6)


@pytest.mark.parametrize("value", [-1e4, 0.0, 1e4])
def test_finite_at_extremes(value):
    x = jnp.full((1, 2), value)

    def total(x):
        terms = losses.dft(-jnp.abs(x), ON) + losses.label_smoothed(x, -x, ON)
        return (terms + losses.z_loss(x, ON)).sum()

    assert all(jnp.isfinite(y).all() for y in jax.value_and_grad(total)(x))


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_smoothing_that_is_no_share(value):
    with pytest.raises(ValueError, match=f"label_smoothing={value}: expected 0 to 1"):
        losses.label_smoothed(jnp.zeros((1, 2)), jnp.zeros((1, 2)), ON, label_smoothing=value)


@pytest.mark.parametrize(
    ("logps", "mask"),
    [
        (jnp.zeros((2, 3)), jnp.ones((2, 3))),
        (jnp.zeros((2, 3)), jnp.ones((2, 2), bool)),
        (jnp.zeros(3), jnp.ones(3, bool)),
        (jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool)),
    ],
)
def test_shapes_and_types_are_checked(logps, mask):
    with pytest.raises(AssertionError):
        losses.cross_entropy(logps, mask)
