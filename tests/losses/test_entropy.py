"""The entropy bonus, and which tokens the masks of arXiv:2505.22617 and arXiv:2506.01939 take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from tests.losses.case import Case, oracle_tests


def covariance_oracle(frozen, **_):
    """Of the arguments before they were perturbed: it carries no gradient."""
    logp, advantage, mask = frozen["logp"], frozen["advantage"], frozen["mask"]
    on = list(zip(*np.nonzero(mask), strict=True))
    out = np.zeros(mask.shape)
    for i in on:
        mean_logp = sum(logp[j] for j in on) / len(on)
        mean_advantage = sum(advantage[j] for j in on) / len(on)
        out[i] = (logp[i] - mean_logp) * (advantage[i] - mean_advantage)
    return out


def largest(x, mask, num):
    """The `num` tokens of largest x; of equal ones the first."""
    out = np.zeros(mask.shape, bool)
    for i in sorted(zip(*np.nonzero(mask), strict=True), key=lambda i: (-x[i], i))[:num]:
        out[i] = True
    return out


def top_entropy_oracle(entropy, mask, frac=0.2):
    return largest(entropy, mask, int(np.ceil(np.round(frac * mask.sum(), 6))))


def kl_cov_oracle(covariance, mask, frac):
    return largest(covariance, mask, int(np.round(frac * mask.sum(), 6)))


def clip_cov_all(covariance, mask):
    """Of all tokens in the range none is left to chance."""
    return losses.clip_cov_mask(covariance, mask, key=jax.random.key(0), frac=1.0)


TestOracles = oracle_tests(
    [
        Case(losses.entropy_bonus, lambda entropy, mask: np.where(mask, -entropy, 0)),
        Case(losses.token_covariance, covariance_oracle, frozen=True),
        Case(losses.top_entropy_mask, top_entropy_oracle),
        Case(losses.top_entropy_mask, top_entropy_oracle, {"frac": 1.0}),
        Case(losses.kl_cov_mask, kl_cov_oracle, {"frac": 0.25}),
        Case(losses.kl_cov_mask, kl_cov_oracle, {"frac": 1.0}),
        Case(clip_cov_all, lambda covariance, mask: mask & (covariance >= 1) & (covariance <= 5)),
    ]
)

ON = jnp.ones((1, 10), bool)


def test_bonus_by_hand():
    entropy, mask = jnp.array([[0.5, 2.0, np.nan]]), jnp.array([[True, True, False]])
    assert losses.entropy_bonus(entropy, mask).tolist() == [[-0.5, -2.0, 0.0]]
    grad = jax.grad(lambda x: losses.entropy_bonus(x, mask).sum())(entropy)
    assert grad.tolist() == [[-1.0, -1.0, 0.0]]


def test_covariance_by_hand():
    logp = jnp.array([[-1.0, -2.0, np.inf], [-6.0, np.nan, np.nan]])
    advantage = jnp.array([[1.0, -1.0, 0.0], [3.0, 9.0, 9.0]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    # Means -3 and 1: (2)(0), (1)(-2), (-3)(2).
    assert losses.token_covariance(logp, advantage, mask).tolist() == [[0, -2, 0], [-6, 0, 0]]


def test_covariance_is_how_fast_a_step_along_the_advantage_lowers_the_entropy():
    p, advantage = np.array([0.5, 0.25, 0.125, 0.125]), np.array([1.0, -1.0, 0.5, -2.0])
    drawn = np.repeat(np.arange(4), (8 * p).astype(int))[None]  # each as often as it is likely
    covariance = losses.token_covariance(
        jnp.asarray(np.log(p)[drawn], jnp.float32),
        jnp.asarray(advantage[drawn], jnp.float32),
        jnp.ones(drawn.shape, bool),
    )

    def entropy(step):
        q = p * np.exp(step * advantage)
        q /= q.sum()
        return -(q * np.log(q)).sum()

    slope = (entropy(1e-5) - entropy(-1e-5)) / 2e-5
    assert abs(slope) > 0.1
    np.testing.assert_allclose(covariance.mean(), -slope, rtol=1e-4)


def test_top_entropy_by_hand():
    entropy = jnp.array([[3.0, 1.0, 2.0, 2.0, 9.0, 2.0, 0.1, 0.2, 0.3, 0.4, 0.5]])
    mask = jnp.arange(11)[None] != 4  # the largest is not there; 20% of ten tokens are two
    chosen = losses.top_entropy_mask(entropy, mask)
    assert np.flatnonzero(chosen).tolist() == [0, 2]
    assert np.flatnonzero(losses.top_entropy_mask(entropy, mask, frac=0.21)).tolist() == [0, 2, 3]
    assert not losses.top_entropy_mask(entropy, jnp.zeros((1, 11), bool)).any()


def test_a_whole_number_of_tokens_survives_rounding():
    x = jnp.arange(100.0)[None]
    # In float32 0.3 * 50 is above 15, and the product of 41 and the float32 next to 1 / 41 below 1.
    assert losses.top_entropy_mask(x, x < 50, frac=0.3).sum() == 15
    assert losses.kl_cov_mask(x, x < 41, frac=1 / 41).sum() == 1


def test_kl_cov_by_hand():
    # The default share of 1100 tokens is 2.2.
    covariance = jnp.zeros((2, 550)).at[1, 7].set(3.0).at[0, 5].set(2.0).at[1, 9].set(1.0)
    chosen = losses.kl_cov_mask(covariance, jnp.ones((2, 550), bool))
    assert np.argwhere(chosen).tolist() == [[0, 5], [1, 7]]
    assert not losses.kl_cov_mask(covariance[:, :200], jnp.ones((2, 200), bool)).any()


def test_clip_cov_draws_its_share_of_all_tokens_from_the_range():
    covariance = jnp.tile(jnp.linspace(-2.0, 8.0, 100), (100, 1))
    mask = jnp.ones((100, 100), bool).at[:50].set(False)
    draw = jax.jit(lambda key: losses.clip_cov_mask(covariance, mask, key=key, frac=0.02))
    chosen = draw(jax.random.key(1))
    assert chosen.sum() == 100  # 0.02 of the 5,000 tokens that are there
    in_range = mask & (covariance >= 1) & (covariance <= 5)
    assert (chosen <= in_range).all()
    np.testing.assert_array_equal(chosen, draw(jax.random.key(1)))
    assert (chosen != draw(jax.random.key(2))).any()
    default = losses.clip_cov_mask(covariance, mask, key=jax.random.key(1))
    assert default.sum() == 1  # 2e-4 of them


def test_clip_cov_takes_every_token_of_the_range_equally_often():
    covariance, keys = (
        jnp.array([[0.0, 1.0, 2.0, 3.0, 5.0, 6.0]]),
        jax.random.split(jax.random.key(0), 4000),
    )
    mask = jnp.ones((1, 6), bool)
    draws = jax.vmap(lambda key: losses.clip_cov_mask(covariance, mask, key=key, frac=0.34))(keys)
    # 0.34 * 6 is 2 of the 4 in the range: each with probability 1/2, give or take 5 sigma = 0.04.
    np.testing.assert_allclose(draws.mean((0, 1)), [0, 0.5, 0.5, 0.5, 0.5, 0], atol=0.04)


def test_finite_at_extremes():
    logp, advantage = jnp.array([[-1e4, 0.0]]), jnp.array([[1e4, -1e4]])
    covariance = losses.token_covariance(logp, advantage, jnp.ones((1, 2), bool))
    assert covariance.tolist() == [[-5e7, -5e7]]


def test_errors():
    x, key = jnp.zeros((1, 10)), jax.random.key(0)
    for frac in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match=f"frac={frac}"):
            losses.top_entropy_mask(x, ON, frac=frac)
    for frac in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"frac={frac}"):
            losses.kl_cov_mask(x, ON, frac=frac)
        with pytest.raises(ValueError, match=f"frac={frac}"):
            losses.clip_cov_mask(x, ON, key=key, frac=frac)
    with pytest.raises(ValueError, match=r"cov_low=3.0, cov_high=2.0"):
        losses.clip_cov_mask(x, ON, key=key, cov_low=3.0, cov_high=2.0)
    for function in (losses.entropy_bonus, losses.top_entropy_mask, losses.kl_cov_mask):
        with pytest.raises(AssertionError):
            function(x, ON[:, :3])
    with pytest.raises(AssertionError):
        losses.token_covariance(x, x[:, :3], ON)
