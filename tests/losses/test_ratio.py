"""Ratios: their levels, weights for another engine's tokens, and what is too far off policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from alignjax.losses.ratio import capped_exp, token_log_ratio
from tests.losses.case import Case, oracle_tests


def of_sequences(reduce):
    """Each sequence's reduced log-probs, back at its tokens."""

    def oracle(logp, mask, segment_ids):
        out = np.zeros(mask.shape)
        for row in range(len(mask)):
            for segment in set(segment_ids[row]):
                at = mask[row] & (segment_ids[row] == segment)
                if at.any():
                    out[row, at] = reduce(logp[row, at])
        return out

    return oracle


def gspo_token(logp, mask, segment_ids, frozen):
    """Eq. 14: the mean is a constant, and the token over itself is 1 with a gradient."""
    mean = of_sequences(np.mean)(frozen["logp"], mask, segment_ids)
    return np.where(mask, mean + np.log(np.exp(logp) / np.exp(frozen["logp"])), 0)


def weight_oracle(rule):
    def oracle(old_logp, rollout_logp, mask, **options):
        out = np.zeros(mask.shape)
        for i in zip(*np.nonzero(mask), strict=True):
            out[i] = rule(np.exp(old_logp[i]) / np.exp(rollout_logp[i]), **options)
        return out

    return oracle


def off_policy_oracle(logp, old_logp, advantage, mask, segment_ids, max_divergence):
    kept = np.zeros(mask.shape, bool)
    for i, t in zip(*np.nonzero(mask), strict=True):
        at = mask[i] & (segment_ids[i] == segment_ids[i, t])
        divergence = (old_logp[i, at] - logp[i, at]).sum() / at.sum()
        kept[i, t] = not (advantage[i, t] < 0 and divergence > max_divergence)
    return kept


truncated = weight_oracle(lambda k, cap=2.0: min(k, cap))
within = weight_oracle(lambda k, low=0.5, high=5.0: k if low <= k <= high else 0)
LEVELS = [
    losses.token_level,
    losses.sequence_level,
    losses.sequence_mean_level,
    losses.sequence_token_level,
]

TestOracles = oracle_tests(
    [
        Case(losses.token_level, lambda logp, mask, segment_ids: np.where(mask, logp, 0)),
        Case(losses.sequence_level, of_sequences(np.sum)),
        Case(losses.sequence_mean_level, of_sequences(np.mean)),
        Case(losses.sequence_token_level, gspo_token, frozen=True),
        Case(losses.truncated_weight, truncated),
        Case(losses.truncated_weight, truncated, {"cap": 0.7}),
        Case(losses.masked_weight, within),
        Case(losses.masked_weight, within, {"low": 0.9, "high": 1.3}),
        # A mean of multiples of 1/64 that equals 1/4 does so in every float type.
        Case(losses.off_policy_sequence_mask, off_policy_oracle, {"max_divergence": 0.25}),
        Case(losses.off_policy_sequence_mask, off_policy_oracle, {"max_divergence": 0.0}),
    ]
)

IDS = jnp.array([[1, 1, 2, 2]])
ON = jnp.array([[True, True, True, False]])
LOGP = jnp.array([[-1.0, -3.0, -5.0, np.nan]])


def test_log_ratio_by_hand():
    logp = jnp.array([[-1.0, np.inf, np.nan, -2.0]])
    other = jnp.array([[-3.0, np.inf, 0.0, -1.0]])
    mask = jnp.array([[True, False, False, True]])
    assert token_log_ratio(logp, other, mask).tolist() == [[2, 0, 0, -1]]
    grads = jax.grad(lambda a, b: token_log_ratio(a, b, mask).sum(), (0, 1))(logp, other)
    assert grads[0].tolist() == [[1, 0, 0, 1]]
    assert grads[1].tolist() == [[0, 0, 0, 0]]


def test_capped_exp():
    x = jnp.array([-jnp.inf, -1.0, 0.0, 19.0, 21.0, 1e30, jnp.inf])
    value, grad = capped_exp(x), jax.grad(lambda x: capped_exp(x).sum())(x)
    below = np.exp([-np.inf, -1.0, 0.0, 19.0])
    np.testing.assert_allclose(value, [*below, *[np.exp(20.0)] * 3], rtol=1e-6)
    np.testing.assert_allclose(grad, [*below, 0, 0, 0], rtol=1e-6)
    assert np.isnan(capped_exp(jnp.nan)) and np.isnan(jax.grad(capped_exp)(jnp.nan))


def test_levels_by_hand():
    # Sequences {-1, -3} and {-5}; weights 1, 10, 100 tell where a gradient comes from.
    weights = jnp.array([[1.0, 10.0, 100.0, 1000.0]])
    expected = {
        losses.token_level: ([[-1, -3, -5, 0]], [[1, 10, 100, 0]]),
        losses.sequence_level: ([[-4, -4, -5, 0]], [[11, 11, 100, 0]]),
        losses.sequence_mean_level: ([[-2, -2, -5, 0]], [[5.5, 5.5, 100, 0]]),
        losses.sequence_token_level: ([[-2, -2, -5, 0]], [[1, 10, 100, 0]]),
    }
    for level, (values, slopes) in expected.items():
        assert level(LOGP, ON, IDS).tolist() == values, level.__name__
        grad = jax.grad(lambda x, level=level: (weights * level(x, ON, IDS)).sum())(LOGP)
        assert grad.tolist() == slopes, level.__name__


@pytest.mark.parametrize("level", LEVELS)
def test_the_ratio_of_a_policy_to_itself_is_exactly_one(level):
    logp = -jax.random.exponential(jax.random.key(0), (3, 7))
    ids, on = jnp.ones((3, 7), jnp.int32), jnp.ones((3, 7), bool)
    ratio = capped_exp(token_log_ratio(level(logp, on, ids), level(logp, on, ids), on))
    assert (ratio == 1).all()


def test_gspo_and_gspo_token_have_one_gradient_where_advantages_agree():
    """Sec. 4.3: equal in objective, clipping condition and gradient."""
    rng = np.random.default_rng(0)
    ids = jnp.asarray(np.sort(rng.integers(1, 4, (4, 9)), axis=1), jnp.int32)
    on = jnp.asarray(rng.random((4, 9)) < 0.8)
    old, shift = -rng.exponential(size=(4, 9)), 0.05 * rng.normal(size=(4, 9))
    logp, old = jnp.asarray(old + shift, jnp.float32), jnp.asarray(old, jnp.float32)
    advantage = jnp.where(ids % 2 == 0, 1.5, -0.5)

    def total(logp, level):
        out = losses.ppo_clip(
            level(logp, on, ids), level(old, on, ids), advantage, on, clip_low=0.01, clip_high=0.02
        )
        return losses.sequence_mean(out.loss, on, ids).total, out.is_clipped

    grad = jax.grad(total, has_aux=True)
    whole, clipped = grad(logp, losses.sequence_mean_level)
    by_token, clipped_by_token = grad(logp, losses.sequence_token_level)
    assert clipped.any() and not clipped[on].all()
    np.testing.assert_array_equal(clipped, clipped_by_token)
    np.testing.assert_allclose(whole, by_token, rtol=1e-5, atol=1e-7)


def test_weights_by_hand():
    ratio = jnp.array([[1.5, 6.0, 0.4, 4.0]])
    on = jnp.array([[True, True, True, False]])
    old, rollout = jnp.log(ratio) - 3, jnp.full((1, 4), -3.0)
    np.testing.assert_allclose(
        losses.truncated_weight(old, rollout, on), [[1.5, 2, 0.4, 0]], rtol=1e-6
    )
    np.testing.assert_allclose(losses.masked_weight(old, rollout, on), [[1.5, 0, 0, 0]], rtol=1e-6)


def test_weights_at_the_level_of_sequences():
    # Log-ratios {log 2, log 2} and {log 3}: the sequences' are 4 and 3.
    old, rollout = jnp.log(jnp.array([[2.0, 2.0, 3.0, 1.0]])), jnp.zeros((1, 4))
    at = [losses.sequence_level(x, ON, IDS) for x in (old, rollout)]
    weights = losses.masked_weight(*at, ON, high=3.5)
    np.testing.assert_allclose(weights, [[0, 0, 3, 0]], rtol=1e-6)


def test_a_weight_below_its_cap_moves_the_mean_to_the_trainers_policy():
    old, rollout = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.35, 0.25])
    value = np.array([1.0, -2.0, 5.0])
    logs = [jnp.log(jnp.asarray([x], jnp.float32)) for x in (old, rollout)]
    for weight in (losses.truncated_weight, losses.masked_weight):
        w = weight(*logs, jnp.ones((1, 3), bool))
        np.testing.assert_allclose((rollout * w[0] * value).sum(), (old * value).sum(), rtol=1e-5)


def test_off_policy_mask_by_hand():
    logp = jnp.array([[-2.0, -3.0, -1.0, -1.0, -4.0, -4.0, np.nan]])
    old = jnp.array([[-1.0, -2.5, -1.0, -2.0, -1.0, -1.0, 0.0]])
    ids = jnp.array([[1, 1, 2, 2, 3, 3, 3]])
    on = jnp.array([[True] * 6 + [False]])
    # Means of old - logp: (1 + 0.5) / 2 = 0.75, (0 - 1) / 2 = -0.5, (3 + 3) / 2 = 3.
    bad = jnp.full((1, 7), -1.0)
    keep = losses.off_policy_sequence_mask(logp, old, bad, on, ids, max_divergence=0.7)
    assert keep.tolist() == [[False, False, True, True, False, False, False]]
    keep = losses.off_policy_sequence_mask(logp, old, bad, on, ids, max_divergence=0.75)
    assert keep.tolist() == [[True, True, True, True, False, False, False]]
    for good in (jnp.zeros((1, 7)), -bad):
        keep = losses.off_policy_sequence_mask(logp, old, good, on, ids, max_divergence=0.0)
        assert keep.tolist() == on.tolist()


@pytest.mark.parametrize("level", LEVELS)
def test_finite_at_extremes(level):
    logp, old = jnp.array([[-1e4, -1e4, 0.0]]), jnp.array([[0.0, 0.0, -1e4]])
    ids, on = jnp.array([[1, 1, 2]]), jnp.ones((1, 3), bool)

    def total(logp):
        at = level(logp, on, ids), level(old, on, ids)
        weights = losses.truncated_weight(*at, on) + losses.masked_weight(*at, on)
        return (weights + capped_exp(token_log_ratio(*at, on))).sum()

    value, grad = jax.value_and_grad(total)(logp)
    assert jnp.isfinite(value) and jnp.isfinite(grad).all()


def test_errors():
    x, on, ids = jnp.zeros((1, 2)), jnp.ones((1, 2), bool), jnp.ones((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="cap=0"):
        losses.truncated_weight(x, x, on, cap=0)
    for low, high in [(-0.1, 2.0), (1.1, 2.0), (0.5, 0.9)]:
        with pytest.raises(ValueError, match=f"low={low}, high={high}"):
            losses.masked_weight(x, x, on, low=low, high=high)
    for worst in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="max_divergence="):
            losses.off_policy_sequence_mask(x, x, x, on, ids, max_divergence=worst)
    for level in LEVELS:
        with pytest.raises(AssertionError):
            level(x, jnp.ones((1, 3), bool), ids)
