"""Controllers of the KL coefficient, step by step in plain Python."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses

adaptive = functools.partial(losses.adaptive_kl_control, num_samples=64)
target = functools.partial(losses.target_kl_control, target=6.0)


def coefficient(controller, kl, kl_coef=0.2):
    out = controller(losses.KlControl(jnp.float32(kl_coef)), jnp.float32(kl))
    assert out.kl_coef.dtype == jnp.float32 and out.kl_coef.shape == ()
    return float(out.kl_coef)


def test_fixed():
    assert coefficient(losses.fixed_kl_control, 100.0, 0.25) == 0.25


@pytest.mark.parametrize(
    ("kl", "error"),
    [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (7.2, 0.2), (60.0, 0.2), (0.0, -0.2), (-3.0, -0.2)],
)
def test_adaptive_by_hand(kl, error):
    # The error relative to a target of 6 is clipped at a fifth; 64 samples of a horizon of 10000.
    expected = 0.2 * (1 + error * 64 / 10000)
    np.testing.assert_allclose(coefficient(adaptive, kl), expected, rtol=1e-6)


def test_adaptive_against_a_loop():
    kls = np.random.default_rng(0).exponential(4.0, 50)
    beta, state = 0.1, losses.KlControl(jnp.float32(0.1))
    step = jax.jit(
        functools.partial(losses.adaptive_kl_control, target=3.0, horizon=500, num_samples=100)
    )
    for kl in kls:
        error = min(max((kl - 3.0) / 3.0, -0.2), 0.2)
        beta *= 1 + error * 100 / 500
        state = step(state, jnp.float32(kl))
    assert abs(beta / 0.1 - 1) > 0.05
    np.testing.assert_allclose(state.kl_coef, beta, rtol=1e-5)


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(9.01, 2), (8.99, 1), (6.0, 1), (4.01, 1), (3.99, 0.5), (0.0, 0.5), (100.0, 2)],
)
def test_target_by_hand(kl, factor):
    # 6 * 1.5 = 9 and 6 / 1.5 = 4.
    np.testing.assert_allclose(coefficient(target, kl), 0.2 * factor, rtol=1e-6)


@pytest.mark.parametrize("controller", [adaptive, target])
def test_the_kl_is_driven_to_its_target(controller):
    # A policy whose KL falls as the coefficient rises: KL = 1 / kl_coef, 6 at 1/6.
    state = losses.KlControl(jnp.float32(5.0))
    step = jax.jit(lambda s: controller(s, 1.0 / s.kl_coef))
    for _ in range(3000):
        state = step(state)
    assert 4.0 <= 1 / float(state.kl_coef) <= 9.0


@pytest.mark.parametrize("controller", [losses.fixed_kl_control, adaptive, target])
def test_nan_leaves_the_coefficient_and_it_carries_no_gradient(controller):
    assert coefficient(controller, math.nan) == np.float32(0.2)
    assert math.isfinite(coefficient(controller, math.inf))
    if controller is not losses.fixed_kl_control:
        assert coefficient(controller, math.inf) == coefficient(controller, 1e30) > 0.2
    state = losses.KlControl(jnp.float32(0.2))
    assert jax.grad(lambda kl: controller(state, kl).kl_coef)(jnp.float32(6.3)) == 0


def test_errors():
    state, kl = losses.KlControl(jnp.float32(0.2)), jnp.float32(1.0)
    for controller in (losses.adaptive_kl_control, losses.target_kl_control):
        options = {"num_samples": 1} if controller is losses.adaptive_kl_control else {}
        with pytest.raises(ValueError, match="target=0: expected target > 0"):
            controller(state, kl, target=0, **options)
    for num_samples in (0, 50):
        with pytest.raises(ValueError, match=f"num_samples={num_samples}, horizon=10: expected"):
            losses.adaptive_kl_control(state, kl, num_samples=num_samples, horizon=10)
    for controller in (losses.fixed_kl_control, adaptive, target):
        with pytest.raises(AssertionError):
            controller(state, jnp.ones(3))
