"""Group advantages and the overlong penalty, from the papers' formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses


def oracle(rewards, is_valid, ddof, eps):
    """(R - mean) / (std + eps) over the valid samples of each group; eps None leaves R - mean."""
    out = np.zeros(rewards.shape)
    for group, valid, result in zip(rewards, is_valid, out, strict=True):
        kept = group[valid].astype(np.float64)
        if len(kept) >= 2:
            deviations = kept - kept.mean()
            variance = (deviations**2).sum() / (len(kept) - ddof)
            result[valid] = deviations if eps is None else deviations / (np.sqrt(variance) + eps)
    return out


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("eps", [1e-4, 0.5])
def test_random_ragged_groups(ddof, eps):
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(40, 6)).astype(np.float32)
    is_valid = rng.random((40, 6)) < 0.6
    dirty = np.where(is_valid, rewards, rng.choice([np.nan, np.inf, -1e30], (40, 6)))
    args = jnp.asarray(dirty, jnp.float32), jnp.asarray(is_valid)
    zscore = losses.group_zscore(*args, ddof=ddof, eps=eps)
    center = losses.group_center(*args)
    np.testing.assert_allclose(zscore, oracle(rewards, is_valid, ddof, eps), atol=2e-6, rtol=2e-5)
    np.testing.assert_allclose(center, oracle(rewards, is_valid, ddof, None), atol=5e-7)
    assert (np.asarray(zscore)[~is_valid] == 0).all()
    assert (is_valid.sum(1) < 2).any(), "the case of a lone sample must be among these"


def test_by_hand():
    rewards = jnp.array([[1.0, 0, 0, 1.0], [1.0, 0, 0, 0]])
    valid = jnp.ones((2, 4), bool)
    zscore = losses.group_zscore(rewards, valid)
    std = np.array([[np.sqrt(1 / 3)], [0.5]])  # ddof 1, and eps 1e-4
    expected = np.array([[0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25]])
    np.testing.assert_allclose(zscore, expected / (std + 1e-4), rtol=1e-6)
    np.testing.assert_allclose(losses.group_center(rewards, valid), expected, rtol=1e-6)


@pytest.mark.parametrize("function", [losses.group_zscore, losses.group_center])
def test_no_baseline_no_advantage(function):
    rewards = jnp.array([[7.0, jnp.nan, jnp.inf], [1.0, 2.0, 3.0], [0.1, 0.1, 0.1], [5.0, 5.0, -9]])
    valid = jnp.array([[True, False, False], [False] * 3, [True] * 3, [True, True, False]])
    # A lone sample, none, three equal ones, two equal ones and an invalid one.
    assert (np.asarray(function(rewards, valid)) == 0).all()


@pytest.mark.parametrize("function", [losses.group_zscore, losses.group_center])
def test_rounding_of_the_mean_makes_no_advantage(function):
    # Seven times one of these, added and divided in float32, is not the reward.
    rewards = jnp.tile(jnp.array([[0.1], [0.3], [0.7], [0.9]]), (1, 7))
    assert (np.asarray(function(rewards, jnp.ones((4, 7), bool))) == 0).all()


@pytest.mark.parametrize("function", [losses.group_zscore, losses.group_center])
def test_rewards_carry_no_gradient(function):
    valid = jnp.ones((2, 3), bool)
    grad = jax.grad(lambda r: (function(r, valid) ** 2).sum())(jnp.arange(6.0).reshape(2, 3))
    assert (grad == 0).all()


def test_errors():
    one = jnp.ones((3, 1)), jnp.ones((3, 1), bool)
    for function in (losses.group_zscore, losses.group_center):
        with pytest.raises(ValueError, match="group_size=1 gives no baseline; use at least 2"):
            function(*one)
        with pytest.raises(AssertionError):
            function(jnp.ones(4), jnp.ones(4, bool))
        with pytest.raises(AssertionError):
            function(jnp.ones((2, 4)), jnp.ones((2, 4)))
    two = jnp.ones((3, 2)), jnp.ones((3, 2), bool)
    with pytest.raises(ValueError, match="ddof=2"):
        losses.group_zscore(*two, ddof=2)
    with pytest.raises(ValueError, match="eps=0"):
        losses.group_zscore(*two, eps=0)


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
