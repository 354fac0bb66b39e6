"""Small updates must move parameters as float64 would: float32 does, bfloat16 on average."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alignjax.core.types import Weighted
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.train.optim import OptimizerConfig, make_optimizer
from alignjax.train.rounding import apply_updates, stochastic_round
from alignjax.train.state import create_state
from alignjax.train.step import make_step

SPACING = 2.0**-13
"""Between neighbours in bfloat16 from 2^-6 to 2^-5, whose precision is 8 bits."""


def rounded(values, seed=0):
    x = jnp.asarray(values, jnp.float32)
    return np.asarray(stochastic_round(x, jax.random.key(seed))).astype(np.float64)


@pytest.mark.parametrize("share", [1 / 65536, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_is_the_value(share, sign):
    """Only the two neighbours come, as often as says how near they are."""
    n = 1 << 20
    value = sign * (0.02 // SPACING + share) * SPACING
    out = rounded(np.full(n, value))
    low, high = sign * (0.02 // SPACING) * SPACING, sign * (0.02 // SPACING + 1) * SPACING
    assert set(out) <= {low, high}
    # Five standard deviations of a mean of n Bernoulli draws.
    bound = 5 * SPACING * np.sqrt(share * (1 - share) / n)
    assert abs(out.mean() - value) < bound


def test_what_bfloat16_has_stays():
    bits = np.arange(1 << 16, dtype=np.uint16)
    everything = bits.view(ml_dtypes.bfloat16)
    out = np.asarray(
        stochastic_round(jnp.asarray(everything.astype(np.float32)), jax.random.key(1))
    )
    is_nan = np.isnan(everything.astype(np.float32))
    assert out.dtype == ml_dtypes.bfloat16 and is_nan.sum() > 200
    np.testing.assert_array_equal(out.view(np.uint16)[~is_nan], bits[~is_nan])
    assert np.isnan(out[is_nan].astype(np.float32)).all()


def test_infinities_and_nan_stay_and_the_largest_may_become_infinite():
    nan = np.array([0x7FFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    for seed in range(20):
        out = rounded([np.inf, -np.inf, *nan], seed)
        assert out[0] == np.inf and out[1] == -np.inf and np.isnan(out[2:]).all()
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    assert set(rounded(np.full(1000, np.finfo(np.float32).max))) <= {largest, np.inf}


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="x is bfloat16: expected float32"):
        stochastic_round(jnp.ones(2, jnp.bfloat16), jax.random.key(0))
    with pytest.raises(TypeError, match=r"\['w'\] is float16: float32 or bfloat16"):
        apply_updates({"w": jnp.ones(2, jnp.float16)}, {"w": jnp.ones(2)}, jax.random.key(0))


# --- a hundred steps of AdamW -----------------------------------------------------------------

RATE, DECAY, STEPS, START = 1e-6, 0.5, 100, 0.02


def linear(params, batch):
    """Its gradient is what the batch says, whatever the parameters."""
    total = sum(jnp.sum(params[name] * batch[name][0, 0]) for name in params)
    return Weighted(total.astype(jnp.float32), jnp.float32(1)), {}


def gradients():
    """[STEPS, 64, 64]: noise over a direction that stays the same."""
    rng = np.random.default_rng(0)
    return (1 + 0.5 * rng.normal(size=(STEPS, 64, 64))).astype(ml_dtypes.bfloat16)


def train(dtype, steps=STEPS, sharding=None):
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=RATE, weight_decay=DECAY, max_grad_norm=1e9), STEPS
    )
    w = jax.device_put(jnp.full((64, 64), START, dtype), sharding)
    state = create_state({"w": w}, optimizer.transform, jax.random.PRNGKey(3))
    step = make_step(linear, optimizer)
    for g in gradients()[:steps]:
        state, metrics = step(
            state, {"w": jnp.asarray(g)[None, None, None], "mask": np.ones((1, 1))}
        )
        assert float(metrics["num_skipped_updates"]) == 0
    return state


def oracle(start):
    """The same in float64 NumPy (arXiv:1711.05101 algorithm 2)."""
    w, m, v = np.full((64, 64), start), 0.0, 0.0
    for t, g in enumerate(gradients().astype(np.float64), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        w = w - RATE * ((m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + DECAY * w)
    return w


def test_float32_moves_as_float64_does():
    expected = oracle(START)
    assert 5e-5 < START - expected.mean() < 2e-4, "far below the spacing of bfloat16"
    moved = np.asarray(train(jnp.float32).params["w"], np.float64) - np.float32(START)
    # Each step rounds by up to 2^-30, half the spacing of float32 at 0.02: 1e-7 over all of them.
    np.testing.assert_allclose(moved, expected - START, atol=STEPS * 2.0**-30, rtol=0)


def test_bfloat16_rounded_to_the_nearest_would_not_move():
    w = jnp.full(8, START, jnp.bfloat16)
    for _ in range(STEPS):
        w = w + jnp.bfloat16(-2 * RATE)
    np.testing.assert_array_equal(w, jnp.full(8, START, jnp.bfloat16))


def test_bfloat16_moves_as_float64_does_on_average():
    start = float(np.array(START, ml_dtypes.bfloat16))
    expected = (oracle(start) - start).mean()
    state = train(jnp.bfloat16)
    assert state.params["w"].dtype == jnp.bfloat16
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (64, 64)]
    assert len(moments) == 2 and all(x.dtype == jnp.float32 for x in moments)
    moved = np.asarray(state.params["w"]).astype(np.float64) - start
    # Each weight makes about |expected| / SPACING jumps of SPACING: that many times its square is
    # the variance of its place. Five standard deviations of the mean of all weights.
    deviation = np.sqrt(abs(expected) * SPACING)
    assert abs(moved.mean() - expected) < 5 * deviation / 64
    assert abs(expected) > 10 * 5 * deviation / 64, "a bound that says something"
    assert moved.std() == pytest.approx(deviation, rel=0.1)


def test_gradients_of_bfloat16_parameters_are_summed_in_float32():
    """256 + 1 is 256 in bfloat16: ones after it would be lost."""
    optimizer = make_optimizer(OptimizerConfig(max_grad_norm=1e9), 1)
    params = {"w": jnp.ones((1, 1), jnp.bfloat16)}
    state = create_state(params, optimizer.transform, jax.random.PRNGKey(0))
    parts = np.array([256.0, 1.0, 1.0, 1.0]).reshape(4, 1, 1, 1, 1)
    batch = {"w": jnp.asarray(parts, jnp.bfloat16), "mask": np.ones((4, 1, 1))}
    _, metrics = make_step(linear, optimizer)(state, batch)
    assert float(metrics["grad_norm"]) == 259 / 4


def test_rounding_is_new_at_each_update_and_each_parameter():
    """Steps of half the spacing: with the same bits twice, no weight would move exactly once."""
    params = {name: jnp.full(4096, START // SPACING * SPACING, jnp.bfloat16) for name in "ab"}
    updates = jax.tree.map(lambda p: jnp.full(p.shape, SPACING / 2), params)
    once = apply_updates(params, updates, jax.random.key(0))
    assert 0.4 < np.mean(np.asarray(once["a"] == once["b"])) < 0.6
    optimizer = make_optimizer(OptimizerConfig(learning_rate=SPACING / 2), 2)
    state = create_state({"a": params["a"]}, optimizer.transform, jax.random.PRNGKey(0))
    step = make_step(linear, optimizer)
    batch = {"a": -jnp.ones((1, 1, 1, 4096)), "mask": np.ones((1, 1))}
    for _ in range(2):
        state, _ = step(state, batch)
    jumps = np.asarray(state.params["a"]).astype(float) / SPACING - START // SPACING
    shares = [np.mean(jumps == k) for k in range(3)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.04)  # 5 standard deviations


def test_a_state_taken_up_again_rounds_as_if_never_left():
    whole, half = train(jnp.bfloat16, 6), train(jnp.bfloat16, 3)
    half = jax.device_put(jax.device_get(half))
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=RATE, weight_decay=DECAY, max_grad_norm=1e9), STEPS
    )
    step = make_step(linear, optimizer)
    for g in gradients()[3:6]:
        half, _ = step(half, {"w": jnp.asarray(g)[None, None, None], "mask": np.ones((1, 1))})
    jax.tree.map(np.testing.assert_array_equal, whole, half)


def test_eight_devices_round_as_one():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharded = train(jnp.bfloat16, 20, NamedSharding(mesh, P("fsdp", "tensor")))
    one = train(jnp.bfloat16, 20)
    np.testing.assert_array_equal(np.asarray(sharded.params["w"]), np.asarray(one.params["w"]))
    assert np.unique(np.asarray(one.params["w"]).astype(float)).size > 1
