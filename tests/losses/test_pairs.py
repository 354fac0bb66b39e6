"""From token log-probs to pairs: sums, lengths and weights of completions, packed or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from tests.losses import preferences
from tests.losses.case import Case, oracle_tests

S = 8


def completions(mask, segment_ids):
    """Row, segment id and token positions of every completion."""
    for row in range(len(mask)):
        for segment in range(1, S + 1):
            at = [
                t for t in range(mask.shape[1]) if mask[row, t] and segment_ids[row, t] == segment
            ]
            if at:
                yield row, segment, at


def sums_oracle(logp, mask, segment_ids, num_segments):
    sums, lengths = np.zeros((len(mask), S)), np.zeros((len(mask), S), np.int32)
    for row, segment, at in completions(mask, segment_ids):
        sums[row, segment - 1] = sum(logp[row, t] for t in at)
        lengths[row, segment - 1] = len(at)
    return sums, lengths, lengths > 0


def desensitized_oracle(logp, mask, segment_ids, shared_len, alpha=0.5):
    out = np.zeros(mask.shape)
    for row, _, at in completions(mask, segment_ids):
        for i, t in enumerate(at):
            out[row, t] = logp[row, t] if i < shared_len[row, t] else alpha * logp[row, t]
    return out


def weights_oracle(mask, segment_ids, num_segments, frozen, **_):
    out = np.zeros((len(mask), S))
    for row, segment, at in completions(mask, segment_ids):
        ratios = [
            np.exp(frozen["logp"][row, t]) / np.exp(frozen["log_collision"][row, t]) for t in at
        ]
        out[row, segment - 1] = np.prod(ratios) ** (1 / len(at))
    return out


def rewards_oracle(pairs, frozen, beta=0.1):
    on = pairs["is_valid"]
    chosen, rejected = preferences.gains(frozen["pairs"])
    return np.where(on, beta * chosen, 0), np.where(on, beta * rejected, 0)


TestOracles = oracle_tests(
    [
        Case(losses.sequence_logps, sums_oracle, {"num_segments": S}),
        Case(losses.length_desensitized_logps, desensitized_oracle),
        Case(losses.length_desensitized_logps, desensitized_oracle, {"alpha": 0.0}),
        Case(losses.wpo_weights, weights_oracle, {"num_segments": S}, frozen=True),
        Case(losses.implicit_rewards, rewards_oracle, frozen=True),
        Case(losses.implicit_rewards, rewards_oracle, {"beta": 2.0}, frozen=True),
    ]
)

PACKED = {
    "logp": jnp.array([[9.0, -1.0, -2.0, 9.0, -4.0, -8.0, 9.0]]),
    "mask": jnp.array([[False, True, True, False, True, True, False]]),
    "segment_ids": jnp.array([[1, 1, 1, 2, 2, 2, 0]], jnp.int32),
}


def test_packed_and_plain_rows_by_hand():
    packed = losses.sequence_logps(**PACKED, num_segments=3)
    assert packed.sums.tolist() == [[-3.0, -12.0, 0.0]]
    assert packed.lengths.tolist() == [[2, 2, 0]] and packed.lengths.dtype == jnp.int32
    assert packed.is_valid.tolist() == [[True, True, False]]
    plain = losses.sequence_logps(
        jnp.array([[9.0, -1.0, -2.0], [9.0, -4.0, -8.0]]),
        jnp.array([[False, True, True]] * 2),
        jnp.ones((2, 3), jnp.int32),
        num_segments=1,
    )
    assert plain.sums.tolist() == [[-3.0], [-12.0]]


def test_length_desensitized_by_hand():
    # The first completion's pair is shorter by one token, the second's is not shorter.
    shared = jnp.array([[0, 1, 1, 2, 2, 2, 0]], jnp.int32)
    logp = losses.length_desensitized_logps(**PACKED, shared_len=shared, alpha=0.25)
    assert logp.tolist() == [[0.0, -1.0, 0.25 * -2.0, 0.0, -4.0, -8.0, 0.0]]
    whole = losses.length_desensitized_logps(**PACKED, shared_len=shared, alpha=1.0)
    assert whole.tolist() == [[0.0, -1.0, -2.0, 0.0, -4.0, -8.0, 0.0]]


def test_wpo_weight_by_hand():
    # exp((log(1/2) - log(1/4) + log(1/8) - log(1/2)) / 2) = sqrt(2 / 4); 1 where p is uniform.
    logp = jnp.log(jnp.array([[0.5, 0.125, 0.1]]))
    collision = jnp.log(jnp.array([[0.25, 0.5, 0.1]]))
    ids = jnp.array([[1, 1, 2]], jnp.int32)
    on = jnp.ones((1, 3), bool)
    weights = losses.wpo_weights(logp, collision, on, ids, num_segments=3)
    np.testing.assert_allclose(weights, [[np.sqrt(0.5), 1.0, 0.0]], rtol=1e-6)


def test_wpo_weight_of_the_policys_own_samples_is_one_on_average():
    p = np.array([0.7, 0.2, 0.06, 0.04])
    collision = jnp.full((4, 1), np.log((p**2).sum()), jnp.float32)
    on, ids = jnp.ones((4, 1), bool), jnp.ones((4, 1), jnp.int32)
    logp = jnp.asarray(np.log(p)[:, None], jnp.float32)
    weights = losses.wpo_weights(logp, collision, on, ids, num_segments=1)
    np.testing.assert_allclose((p * weights[:, 0]).sum(), 1.0, rtol=1e-6)


def test_implicit_rewards_by_hand():
    given = preferences.pairs([-3.0, np.nan], [-9.0, 1.0], -5.0, -5.0, is_valid=[True, False])
    chosen, rejected = losses.implicit_rewards(given, beta=0.5)
    assert (chosen.tolist(), rejected.tolist()) == ([1.0, 0.0], [-2.0, 0.0])


def test_finite_at_extremes():
    on, ids = jnp.ones((1, 4), bool), jnp.array([[1, 2, 3, 4]], jnp.int32)
    logp, other = jnp.array([[-1e4, 0.0, -1e4, 0.0]]), jnp.array([[0.0, -1e4, -1e4, 0.0]])
    assert jnp.isfinite(losses.wpo_weights(logp, other, on, ids, num_segments=4)).all()
    grad = jax.grad(lambda x: losses.sequence_logps(x, on, ids, num_segments=4).sums.sum())(logp)
    assert (grad == 1).all()


def test_errors():
    shared = jnp.ones((1, 7), jnp.int32)
    for alpha in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"alpha=.*expected 0 <= alpha <= 1"):
            losses.length_desensitized_logps(**PACKED, shared_len=shared, alpha=alpha)
    with pytest.raises(AssertionError):
        losses.length_desensitized_logps(**PACKED, shared_len=shared.astype(jnp.float32))
    with pytest.raises(ValueError, match="beta=0: expected beta > 0"):
        losses.implicit_rewards(preferences.pairs(0.0, 0.0), beta=0)
