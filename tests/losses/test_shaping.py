"""Rewards as they are shaped, and running moments, from the formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from tests.losses.case import Case, oracle_tests


def entry_by_entry(term):
    """term(reward, ...) of each valid entry; the other arrays are those between the two."""

    def oracle(rewards, is_valid, **kwargs):
        arrays = [kwargs.pop(name) for name in list(kwargs) if name.startswith("has_")]
        out = np.zeros(rewards.shape)
        for i in zip(*np.nonzero(is_valid), strict=True):
            out[i] = term(rewards[i], *(x[i] for x in arrays), **kwargs)
        return out

    return oracle


missing_eos = entry_by_entry(lambda r, eos, penalty=1.0: r if eos else r - penalty)
clip = entry_by_entry(lambda r, low, high: min(max(r, low), high))


def token_rewards(score, kl, mask, segment_ids, *, kl_coef):
    out = np.zeros(mask.shape)
    for b, t in zip(*np.nonzero(mask), strict=True):
        out[b, t] = -kl_coef * kl[b, t]
        later = mask[b, t + 1 :] & (segment_ids[b, t + 1 :] == segment_ids[b, t])
        if not later.any():
            out[b, t] += score[b, t]
    return out


TestOracles = oracle_tests(
    [
        Case(losses.missing_eos_penalty, missing_eos),
        Case(losses.missing_eos_penalty, missing_eos, {"penalty": 0.25}),
        Case(losses.clip_rewards, clip, {"low": -0.5, "high": 1.0}),
        Case(losses.clip_rewards, clip, {"low": 0.25, "high": 0.5}),
        Case(losses.token_rewards, token_rewards, {"kl_coef": 0.1}),
    ]
)


def test_overlong_penalty_by_hand():
    # DAPO's own numbers: expected length 16,384, a buffer of 4,096, so a limit of 20,480.
    lengths = jnp.array([1, 16383, 16384, 16385, 18432, 20479, 20480, 20481, 30000])
    expected = [0, 0, 0, -1 / 4096, -0.5, -4095 / 4096, -1, -1, -1]
    penalty = losses.overlong_penalty(lengths, max_len=20480, buffer=4096)
    np.testing.assert_allclose(penalty, expected, rtol=1e-6)
    assert penalty.dtype == jnp.float32


@pytest.mark.parametrize("buffer", [0, -1, 11])
def test_overlong_penalty_errors(buffer):
    with pytest.raises(ValueError, match="0 < buffer <= max_len"):
        losses.overlong_penalty(jnp.array([1]), max_len=10, buffer=buffer)


def test_overlong_penalty_takes_whole_tokens():
    with pytest.raises(AssertionError):
        losses.overlong_penalty(jnp.array([1.0]), max_len=10, buffer=5)


def test_missing_eos_penalty_by_hand():
    rewards, valid = jnp.array([[2.0, 2.0, jnp.nan]]), jnp.array([[True, True, False]])
    out = losses.missing_eos_penalty(rewards, jnp.array([[True, False, False]]), valid)
    assert out.tolist() == [[2.0, 1.0, 0.0]]


def test_clip_rewards_by_hand():
    rewards, valid = jnp.array([[9.0, 1.5, -9.0, 9.0]]), jnp.array([[True, True, True, False]])
    assert losses.clip_rewards(rewards, valid, low=1, high=2).tolist() == [[2.0, 1.5, 1.0, 0.0]]


def test_token_rewards_by_hand():
    # Two sequences in a row; the score of each is read at its last token, and nowhere else.
    mask = jnp.array([[True, True, False, True]])
    segments = jnp.array([[1, 1, 1, 2]], jnp.int32)
    score = jnp.array([[jnp.nan, 3.0, jnp.nan, -1.0]])
    kl = jnp.array([[0.5, -2.0, jnp.nan, 4.0]])
    out = losses.token_rewards(score, kl, mask, segments, kl_coef=0.5)
    assert out.tolist() == [[-0.25, 3.0 + 1.0, 0.0, -1.0 - 2.0]]
    # The coefficient of a controller is an array.
    same = losses.token_rewards(score, kl, mask, segments, kl_coef=jnp.float32(0.5))
    np.testing.assert_array_equal(same, out)


def test_token_rewards_sum_to_the_penalised_score():
    rng = np.random.default_rng(0)
    kl, score = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(2, 3, 7)))
    on, ids = jnp.ones((3, 7), bool), jnp.ones((3, 7), jnp.int32)
    out = losses.token_rewards(score, kl, on, ids, kl_coef=0.2)
    np.testing.assert_allclose(out.sum(1), score[:, -1] - 0.2 * kl.sum(1), rtol=1e-5)


def ragged(rng, shape, mean=0.0):
    """Rewards, which of them are valid, and the valid ones alone."""
    rewards = rng.normal(mean, 2.0, shape)
    valid = rng.random(shape) < 0.7
    dirty = np.where(valid, rewards, rng.choice([np.nan, np.inf, -1e30], shape))
    return jnp.asarray(dirty), jnp.asarray(valid), rewards[valid]


@pytest.mark.parametrize("splits", [[], [1], [5], [1, 2, 7, 19]])
def test_moments_are_those_of_all_rewards_however_split(splits):
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        rewards, valid, seen = ragged(rng, (20, 3), mean=50.0)
        state = losses.init_moments()
        for part in np.split(np.arange(20), splits):
            state = losses.update_moments(state, rewards[part], valid[part])
        np.testing.assert_allclose(state.mean, seen.mean(), rtol=1e-12)
        np.testing.assert_allclose(state.variance, seen.var(), rtol=1e-12)
        assert state.num_rewards == len(seen)


def test_moments_by_hand():
    on = jnp.ones((1, 2), bool)
    state = losses.update_moments(losses.init_moments(), jnp.array([[1.0, 3.0]]), on)
    assert tuple(map(float, state)) == (2.0, 1.0, 2.0)
    # 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4.
    state = losses.update_moments(state, jnp.array([[5.0, 7.0]]), on)
    assert tuple(map(float, state)) == (4.0, 5.0, 4.0)
    out = losses.normalize_rewards(state, jnp.array([[4.0, 9.0]]), on)
    np.testing.assert_allclose(out, [[0, 5 / np.sqrt(5)]], rtol=1e-6)
    out = losses.normalize_rewards(state, jnp.array([[4.0, 9.0]]), on, shift_mean=False)
    np.testing.assert_allclose(out, [[4, 4 + 5 / np.sqrt(5)]], rtol=1e-6)


def test_moments_of_nothing_change_nothing():
    off = jnp.zeros((1, 2), bool)
    rewards = jnp.array([[jnp.nan, jnp.inf]])
    for state in (
        losses.init_moments(),
        losses.update_moments(losses.init_moments(), jnp.array([[1.0, 3.0]]), ~off),
    ):
        assert losses.update_moments(state, rewards, off) == state
        assert losses.normalize_rewards(state, rewards, off).tolist() == [[0, 0]]
    rewards = jnp.array([[5.0, -2.0]])
    np.testing.assert_allclose(
        losses.normalize_rewards(losses.init_moments(), rewards, ~off), rewards, rtol=1e-6
    )


def test_moments_keep_precision_in_float32_far_from_zero():
    rng = np.random.default_rng(2)
    x = (1000 + rng.normal(size=(400, 2, 8))).astype(np.float32)
    on = jnp.ones((2, 8), bool)
    update = jax.jit(losses.update_moments)
    state = losses.init_moments()
    for part in x:
        state = update(state, part, on)
    assert state.mean.dtype == state.variance.dtype == state.num_rewards.dtype == jnp.float32
    np.testing.assert_allclose(state.mean, x.astype(np.float64).mean(), rtol=1e-6)
    np.testing.assert_allclose(state.variance, x.astype(np.float64).var(), rtol=1e-3)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_normalized_rewards(shift_mean, eps):
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        state = losses.RunningMoments(*map(jnp.float64, (0.7, 2.5, 9.0)))
        rewards, valid, kept = ragged(rng, (4, 3))
        normalize = functools.partial(losses.normalize_rewards, shift_mean=shift_mean, eps=eps)
        out = normalize(state, rewards, valid)
        expected = (kept - 0.7) / np.sqrt(2.5 + eps) + (0 if shift_mean else 0.7)
        np.testing.assert_allclose(out[valid], expected, rtol=1e-12)
        assert (out[~valid] == 0).all()
        assert (jax.grad(lambda r: normalize(state, r, valid).sum())(rewards) == 0).all()


def test_finite_at_extremes():
    on, ids = jnp.ones((1, 2), bool), jnp.ones((1, 2), jnp.int32)
    x = jnp.array([[1e4, -1e4]])
    assert np.isfinite(losses.token_rewards(x, x, on, ids, kl_coef=1.0)).all()
    state = losses.update_moments(losses.init_moments(), x, on)
    np.testing.assert_allclose(losses.normalize_rewards(state, x, on), [[1, -1]], rtol=1e-6)


def test_moments_pass_no_gradient_on():
    def total(rewards):
        state = losses.update_moments(losses.init_moments(), rewards, jnp.ones((1, 2), bool))
        return state.mean + state.variance

    assert (jax.grad(total)(jnp.array([[1.0, 4.0]])) == 0).all()


def test_rewards_that_never_vary_are_divided_by_the_root_of_the_default_eps():
    state = losses.init_moments()._replace(variance=jnp.zeros(()))
    found = losses.normalize_rewards(state, jnp.array([[2.0, -1.0]]), jnp.ones((1, 2), bool))
    np.testing.assert_allclose(found, [[2e4, -1e4]], rtol=1e-6)


def test_errors():
    rewards, on = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match="penalty=-1: expected penalty >= 0"):
        losses.missing_eos_penalty(rewards, on, on, penalty=-1)
    with pytest.raises(ValueError, match="low=1, high=1: expected low < high"):
        losses.clip_rewards(rewards, on, low=1, high=1)
    with pytest.raises(ValueError, match="eps=0: expected eps > 0"):
        losses.normalize_rewards(losses.init_moments(), rewards, on, eps=0)
    with pytest.raises(AssertionError):
        losses.missing_eos_penalty(rewards, rewards, on)
    with pytest.raises(AssertionError):
        losses.missing_eos_penalty(rewards, on[:, :1], on)
    with pytest.raises(AssertionError):
        losses.token_rewards(rewards[:, :1], rewards, on, on.astype(jnp.int32), kl_coef=1)
    with pytest.raises(AssertionError):
        losses.update_moments(losses.init_moments(), rewards[0], on[0])
