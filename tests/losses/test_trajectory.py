"""Advantages over time against their definitions as sums, sequence by sequence, in O(T^2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alignjax import losses
from tests.losses.case import Case, oracle_tests


def sequences(mask, segment_ids):
    """(row, times) of each sequence: the masked tokens alone, in order."""
    for b in range(len(mask)):
        for segment in set(segment_ids[b][mask[b]]):
            yield b, np.flatnonzero(mask[b] & (segment_ids[b] == segment))


def discounted(r, gamma):
    return [
        sum(gamma**n * r[t + n] for n in range(len(r) - t))
        for t in range(len(r))
    ]  # fmt: skip


def gae(rewards, old_values, bootstrap, mask, segment_ids, *, gamma=1.0, gae_lambda=0.95):
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for b, at in sequences(mask, segment_ids):
        r, v = rewards[b][at], np.append(old_values[b][at], bootstrap[b, at[-1]])
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(at))]
        advantages[b][at] = discounted(deltas, gamma * gae_lambda)
        returns[b][at] = advantages[b][at] + v[:-1]
    return advantages, returns


def returns_to_go(rewards, mask, segment_ids, *, gamma=1.0):
    out = np.zeros(mask.shape)
    for b, at in sequences(mask, segment_ids):
        out[b][at] = discounted(rewards[b][at], gamma)
    return out


def reinforce_pp(rewards, mask, segment_ids, *, gamma=1.0):
    out = returns_to_go(rewards, mask, segment_ids, gamma=gamma)
    if mask.any():
        x = out[mask]
        out[mask] = (x - x.mean()) / np.sqrt(x.var() + 1e-8)
    return out


def vtrace(
    policy_logp, old_logp, rewards, old_values, bootstrap, mask, segment_ids, *,
    gamma=1.0, vtrace_lambda=1.0, max_rho=1.0, max_c=1.0, max_pg_rho=1.0,
):  # fmt: skip
    """eq. 1: v_s = V_s + sum_t gamma^(t - s) (prod_{s <= i < t} c_i) delta_t."""
    advantages, targets = np.zeros(mask.shape), np.zeros(mask.shape)
    for b, at in sequences(mask, segment_ids):
        ratio = np.exp(policy_logp[b][at] - old_logp[b][at])
        r, v = rewards[b][at], np.append(old_values[b][at], bootstrap[b, at[-1]])
        vs = v.copy()
        for s in range(len(at)):
            for t in range(s, len(at)):
                c = np.prod([vtrace_lambda * min(max_c, ratio[i]) for i in range(s, t)])
                delta = min(max_rho, ratio[t]) * (r[t] + gamma * v[t + 1] - v[t])
                vs[s] += gamma ** (t - s) * c * delta
        targets[b][at] = vs[:-1]
        for t in range(len(at)):
            pg_rho = min(max_pg_rho, ratio[t])
            advantages[b, at[t]] = pg_rho * (r[t] + gamma * vs[t + 1] - v[t])
    return advantages, targets


TestOracles = oracle_tests(
    [
        Case(losses.gae, gae),
        Case(losses.gae, gae, {"gamma": 0.9, "gae_lambda": 0.5}),
        Case(losses.returns_to_go, returns_to_go),
        Case(losses.returns_to_go, returns_to_go, {"gamma": 0.7}),
        Case(losses.reinforce_pp, reinforce_pp),
        Case(losses.reinforce_pp, reinforce_pp, {"gamma": 0.9}, atol=1e-5),
        Case(losses.vtrace, vtrace),
        Case(
            losses.vtrace,
            vtrace,
            {"gamma": 0.9, "vtrace_lambda": 0.8, "max_rho": 3.0, "max_c": 1.5, "max_pg_rho": 2.0},
        ),
    ]
)

# Two sequences share a row; in the first, two tokens of a tool stand between what the policy chose.
MASK = jnp.array([[True, False, False, True, True, False]])
SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2]], jnp.int32)
REWARDS = jnp.array([[1.0, jnp.nan, 9.0, 2.0, 4.0, jnp.inf]])
VALUES = jnp.array([[0.5, 7.0, jnp.nan, 1.5, 3.0, 7.0]])
BOOTSTRAP = jnp.array([[jnp.nan, 7.0, 7.0, 0.0, 8.0, jnp.nan]])
ARGS = REWARDS, VALUES, BOOTSTRAP, MASK, SEGMENTS


def test_gae_by_hand():
    # gamma 1/2, lambda 1/2. The first sequence ends, the second is cut, with a value of 8 after it:
    # delta = 1 + 1.5 / 2 - 0.5 = 1.25; 2 + 0 / 2 - 1.5 = 0.5; 4 + 8 / 2 - 3 = 5.
    out = losses.gae(*ARGS, gamma=0.5, gae_lambda=0.5)
    assert out.advantages.tolist() == [[1.25 + 0.5 / 4, 0, 0, 0.5, 5, 0]]
    assert out.returns.tolist() == [[1.25 + 0.5 / 4 + 0.5, 0, 0, 2, 8, 0]]


def test_returns_to_go_by_hand():
    out = losses.returns_to_go(REWARDS, MASK, SEGMENTS, gamma=0.5)
    assert out.tolist() == [[1 + 2 / 2, 0, 0, 2, 4, 0]]


def test_reinforce_pp_by_hand():
    # Returns 3, 2, 4: mean 3, variance 2 / 3.
    out = losses.reinforce_pp(REWARDS, MASK, SEGMENTS)
    scale = np.sqrt(3 / 2)
    np.testing.assert_allclose(out, [[0, 0, 0, -scale, scale, 0]], atol=1e-6)


def test_vtrace_by_hand():
    # Ratios 2, 1/2, 1/2 with limits of 1: rho = c = 1, 1/2, 1/2; gamma 1/2.
    logp = jnp.log(jnp.array([[0.5, 1, 1, 0.25, 0.1, 1]]))
    old_logp = jnp.log(jnp.array([[0.25, 1, 1, 0.5, 0.2, 1]]))
    out = losses.vtrace(logp, old_logp, *ARGS, gamma=0.5)
    # Targets: 1.5 + 0.5 / 2 = 1.75; 0.5 + 1.25 + (1.75 - 1.5) / 2 = 1.875; 3 + 5 / 2 = 5.5.
    np.testing.assert_allclose(out.targets, [[1.875, 0, 0, 1.75, 5.5, 0]], rtol=1e-6)
    # Advantages: 1 + 1.75 / 2 - 0.5 = 1.375; (2 + 0 - 1.5) / 2 = 0.25; (4 + 8 / 2 - 3) / 2 = 2.5.
    np.testing.assert_allclose(out.advantages, [[1.375, 0, 0, 0.25, 2.5, 0]], rtol=1e-6)


def random_args(seed=0, shape=(4, 9)):
    rng = np.random.default_rng(seed)
    floats = [jnp.asarray(x, jnp.float32) for x in rng.normal(size=(3, *shape))]
    mask = jnp.asarray(rng.random(shape) < 0.7)
    return (*floats, mask, jnp.asarray(np.sort(rng.integers(1, 4, shape, np.int32), axis=1)))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_between_td_errors_and_returns(gamma):
    rewards, values, bootstrap, mask, segments = args = random_args()
    ends = np.zeros(mask.shape)
    td = np.zeros(mask.shape)
    for b, at in sequences(np.asarray(mask), np.asarray(segments)):
        ends[b, at[-1]] = bootstrap[b, at[-1]]
        v = np.append(np.asarray(values)[b][at], bootstrap[b, at[-1]])
        td[b][at] = np.asarray(rewards)[b][at] + gamma * v[1:] - v[:-1]
    out = losses.gae(*args, gamma=gamma, gae_lambda=0.0)
    np.testing.assert_allclose(out.advantages, td, atol=1e-5)
    out = losses.gae(*args, gamma=gamma, gae_lambda=1.0)
    whole = losses.returns_to_go(rewards + gamma * ends, mask, segments, gamma=gamma)
    np.testing.assert_allclose(out.returns, whole, atol=1e-5)
    np.testing.assert_allclose(out.advantages, jnp.where(mask, whole - values, 0), atol=1e-5)


def test_vtrace_on_policy_is_gae():
    # Remark 1: with ratio 1 the targets are the lambda-returns of the policy.
    args = random_args(1)
    logp = jnp.zeros(args[0].shape)
    options = {"gamma": 0.9}
    out = losses.vtrace(logp, logp, *args, vtrace_lambda=0.6, **options)
    expected = losses.gae(*args, gae_lambda=0.6, **options)
    np.testing.assert_allclose(out.targets, expected.returns, atol=1e-5)
    # The advantage looks one token ahead from the target: only at lambda 1 is it that of GAE.
    out = losses.vtrace(logp, logp, *args, **options)
    expected = losses.gae(*args, gae_lambda=1.0, **options)
    np.testing.assert_allclose(out.advantages, expected.advantages, atol=1e-5)


def every(args):
    """All of this module in one tuple of arrays, but `reinforce_pp`, which is over the batch."""
    rewards, values, _, mask, segments = args
    return (
        *losses.gae(*args, gamma=0.9),
        losses.returns_to_go(rewards, mask, segments, gamma=0.9),
        *losses.vtrace(values, rewards, *args, gamma=0.9, vtrace_lambda=0.9),
    )


def test_what_lies_between_chosen_tokens_does_not_matter():
    args = random_args(2, (2, 9))
    mask = np.asarray(args[3])
    for b in range(len(mask)):
        at = np.flatnonzero(mask[b])
        alone = every([x[b : b + 1, at] for x in args])
        for x, y in zip(every(args), alone, strict=True):
            np.testing.assert_allclose(x[b][at], y[0], rtol=1e-5, atol=1e-6)


def test_devices_do_not_matter():
    args = random_args(3, (8, 32))
    devices = jax.devices()[:8]
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,), devices=devices)
    spread = jax.device_put(args, NamedSharding(mesh, P("data")))
    compiled = jax.jit(every).lower(spread).compile()
    for x, y in zip(compiled(spread), every(args), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
        assert x.sharding.spec == P("data")
    text = compiled.as_text()
    assert not any(op in text for op in ("all-gather", "all-to-all", "collective-permute"))


def test_finite_at_extremes():
    on, ids = jnp.ones((1, 4), bool), jnp.ones((1, 4), jnp.int32)
    far, near = jnp.array([[-1e4, 0.0, 0.0, -1e4]]), jnp.array([[0.0, -1e4, -1e4, 0.0]])
    limits = {"max_rho": np.inf, "max_c": 1.0, "max_pg_rho": np.inf}
    for x in losses.vtrace(far, near, far, near, near, on, ids, **limits):
        assert np.isfinite(x).all()
    for x in losses.gae(far, near, near, on, ids):
        assert np.isfinite(x).all()


def test_errors():
    args = random_args()
    rewards, values, _, mask, segments = args
    for name in ("gamma", "gae_lambda"):
        for x in (-0.1, 1.1):
            with pytest.raises(ValueError, match=rf"{name}={x}: expected 0 <= {name} <= 1"):
                losses.gae(*args, **{name: x})
    with pytest.raises(ValueError, match="gamma=2"):
        losses.reinforce_pp(rewards, mask, segments, gamma=2)
    with pytest.raises(ValueError, match="vtrace_lambda=2"):
        losses.vtrace(values, values, *args, vtrace_lambda=2)
    for name in ("max_rho", "max_c", "max_pg_rho"):
        with pytest.raises(ValueError, match=f"{name}=0.*expected all > 0"):
            losses.vtrace(values, values, *args, **{name: 0})
    with pytest.raises(AssertionError):
        losses.gae(rewards, values, rewards[:, 0], mask, segments)
    with pytest.raises(AssertionError):
        losses.returns_to_go(rewards, mask, mask)
