"""PPO's clipped surrogate against eq. 7 of arXiv:1707.06347 in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses


def oracle(logp, old, adv, mask, low, high):
    """-min(r A, clip(r) A), entry by entry, and its derivative by logp: -r A unless clipped."""
    loss, grad = np.zeros(logp.shape), np.zeros(logp.shape)
    for i in zip(*np.nonzero(mask), strict=True):
        r, a = np.exp(np.float64(logp[i]) - np.float64(old[i])), np.float64(adv[i])
        free, held = r * a, min(max(r, 1 - low), 1 + high) * a
        loss[i] = -min(free, held)
        grad[i] = -free if free <= held else 0.0
    return loss, grad


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.0, 0.0), (0.5, 10.0)])
def test_random_ragged_batches(low, high):
    rng = np.random.default_rng(1)
    shape = (16, 33)
    old = -rng.exponential(size=shape).astype(np.float32)
    logp = (old + rng.normal(scale=0.5, size=shape)).astype(np.float32)
    adv = rng.normal(size=shape).astype(np.float32)
    mask = rng.random(shape) < 0.5
    dirt = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32), (3, *shape))
    args = [jnp.asarray(np.where(mask, x, d)) for x, d in zip((logp, old, adv), dirt, strict=True)]

    def total(logp, old, adv):
        out = losses.ppo_clip(logp, old, adv, jnp.asarray(mask), clip_low=low, clip_high=high)
        return out.loss.sum(), out

    grads, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*args)
    loss, grad = oracle(logp, old, adv, mask, low, high)
    np.testing.assert_allclose(out.loss, loss, rtol=2e-6)
    np.testing.assert_allclose(grads[0], grad, rtol=2e-6)
    assert (grads[1] == 0).all() and (grads[2] == 0).all()
    ratio = np.exp(logp.astype(np.float64) - old)
    np.testing.assert_array_equal(out.is_low, mask & (ratio < 1 - low) & (adv < 0))
    np.testing.assert_array_equal(out.is_high, mask & (ratio > 1 + high) & (adv > 0))
    np.testing.assert_array_equal(out.is_clipped, mask & (grad == 0) & (adv != 0))
    assert out.is_low.any() and (out.is_high.any() or high == 10.0)


def test_by_hand():
    ratio = jnp.array([[1.5, 1.5, 0.5, 0.5, 1.1]])
    adv = jnp.array([[2.0, -2.0, 2.0, -2.0, 3.0]])
    out = losses.ppo_clip(
        jnp.log(ratio), jnp.zeros((1, 5)), adv, jnp.ones((1, 5), bool), clip_low=0.2, clip_high=0.3
    )
    np.testing.assert_allclose(out.loss, [[-2.6, 3.0, -1.0, 1.6, -3.3]], rtol=1e-6)
    assert out.is_high.tolist() == [[True, False, False, False, False]]
    assert out.is_low.tolist() == [[False, False, False, True, False]]
    assert out.is_clipped.tolist() == [[True, False, False, True, False]]


def test_default_clip():
    ratio, adv = jnp.array([[1.5, 0.5]]), jnp.array([[1.0, -1.0]])
    out = losses.ppo_clip(jnp.log(ratio), jnp.zeros((1, 2)), adv, jnp.ones((1, 2), bool))
    np.testing.assert_allclose(out.loss, [[-1.2, 0.8]], rtol=1e-6)


def test_nothing_is_clipped_where_the_advantage_is_zero():
    ratio, adv = jnp.array([[3.0, 0.1]]), jnp.zeros((1, 2))
    out = losses.ppo_clip(jnp.log(ratio), adv, adv, jnp.ones((1, 2), bool))
    assert not out.is_low.any() and not out.is_high.any()


@pytest.mark.parametrize("clip", [0.2, 0.0])
def test_on_policy_gradient_is_minus_advantage_whatever_the_clip(clip):
    adv = jnp.array([[2.0, -3.0]])
    zero, on = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    grad = jax.grad(
        lambda x: losses.ppo_clip(x, zero, adv, on, clip_low=clip, clip_high=clip).loss.sum()
    )(zero)
    assert grad.tolist() == [[-2.0, 3.0]]


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_finite_at_extremes(advantage):
    logp = jnp.array([[0.0, -1e4, -3e38, 0.0]])
    old = jnp.array([[-1e4, 0.0, 0.0, -3e38]])
    on = jnp.ones((1, 4), bool)

    def total(x):
        return losses.ppo_clip(x, old, jnp.full((1, 4), advantage), on).loss.sum()

    value, grad = jax.value_and_grad(total)(logp)
    assert jnp.isfinite(value) and jnp.isfinite(grad).all()


def test_errors():
    x, on = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    for low, high in [(-0.1, 0.2), (1.0, 0.2), (0.2, -0.1)]:
        with pytest.raises(ValueError, match="0 <= clip_low < 1"):
            losses.ppo_clip(x, x, x, on, clip_low=low, clip_high=high)
    with pytest.raises(AssertionError):
        losses.ppo_clip(x, x, jnp.zeros((1, 3)), on)
    with pytest.raises(AssertionError):
        losses.ppo_clip(x, x, x, jnp.ones((1, 2)))
    with pytest.raises(AssertionError):
        losses.ppo_clip(x, x, x.astype(jnp.int32), on)
