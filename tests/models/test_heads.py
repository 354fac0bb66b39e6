"""Reward and value heads: float64 by hand, packing, devices, and what is copied."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.models import Model, ModelConfig
from alignjax.models.heads import (
    ScalarModel,
    critic_from,
    last_values,
    read_scalar,
    reward_head,
    value_head,
)
from alignjax.sharding import MeshConfig, init_sharded, make_mesh, put_batch, shardings

CONFIG = ModelConfig(
    family="qwen3", vocab_size=19, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8,
    initializer_range=0.3,
)  # fmt: skip
MODEL = ScalarModel(Model(CONFIG))
APPLY = jax.jit(MODEL.apply)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def make_batch(batch=8, time=9, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 19, (batch, time)).astype(np.int32)
    positions = np.broadcast_to(np.arange(time, dtype=np.int32), (batch, time))
    return tokens, np.ones_like(tokens), positions


def test_initial_heads():
    """1023 dimensions: a standard deviation of 1 / 32."""
    kernel = np.concatenate([reward_head(jax.random.key(i), 1023)["kernel"] for i in range(40)])
    assert kernel.dtype == np.float32 and kernel.shape == (40 * 1023,)
    assert kernel.std() == pytest.approx(1 / 32, rel=5 / np.sqrt(2 * 40 * 1023))
    assert abs(kernel.mean()) < 5 / 32 / np.sqrt(40 * 1023)
    zeros = value_head(jax.random.key(0), 1023)["kernel"]
    assert zeros.dtype == jnp.float32 and zeros.shape == (1023,) and not zeros.any()


def test_a_value_is_the_product_of_hidden_state_and_head(params):
    hidden, _ = MODEL.decoder.apply(params["decoder"], *make_batch())
    expected = np.asarray(hidden, np.float64) @ np.asarray(params["head"]["kernel"], np.float64)
    assert expected.std() > 0.5
    np.testing.assert_allclose(APPLY(params, *make_batch()), expected, atol=1e-5)


def test_float32_inside(params):
    """Of bfloat16 hidden states the product is not rounded to bfloat16, 1e-3 to 1e-2 off."""
    half = dataclasses.replace(MODEL, decoder=Model(CONFIG, "bfloat16"))
    hidden, values = half.apply_both(params, *make_batch())
    assert hidden.dtype == jnp.bfloat16 and values.dtype == jnp.float32
    expected = np.asarray(hidden, np.float64) @ np.asarray(params["head"]["kernel"], np.float64)
    np.testing.assert_allclose(values, expected, atol=1e-5)
    text = jax.jit(read_scalar).lower(params["head"], hidden).as_text()
    assert "precision = [HIGHEST, HIGHEST]" in text and "bf16>, tensor" not in text


def test_both_come_from_one_pass(params):
    """What the policy sees is what the decoder alone gives."""
    hidden, values = jax.jit(MODEL.apply_both)(params, *make_batch())
    alone, _ = jax.jit(MODEL.decoder.apply)(params["decoder"], *make_batch())
    np.testing.assert_array_equal(hidden, alone)
    np.testing.assert_array_equal(values, APPLY(params, *make_batch()))

    def count(function):
        return jax.jit(function).lower(params, *make_batch()).as_text().count("dot_general")

    head_alone = 1
    decoder = lambda params, *batch: MODEL.decoder.apply(params["decoder"], *batch)[0]  # noqa: E731
    assert count(MODEL.apply_both) == count(decoder) + head_alone


def test_a_new_critic_says_0():
    critic = dataclasses.replace(MODEL, new_head=value_head)
    values = critic.apply(critic.init(jax.random.key(0)), *make_batch())
    np.testing.assert_array_equal(values, np.zeros((8, 9)))


def test_last_values_by_hand():
    nan = np.nan
    values = np.array([
        [1, 2, 3, 4, 5, nan],  # two sequences, then padding
        [nan, nan, 7, 8, 9, 10],  # padded on the left
        [nan, nan, nan, nan, nan, nan],  # nothing
        [1, 2, 3, 4, 5, 6],  # three, the second of one token
    ], np.float32)  # fmt: skip
    ids = [[1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1], [0] * 6, [1, 1, 2, 3, 3, 3]]
    scores, is_there = last_values(jnp.array(values), jnp.array(ids, jnp.int32), 3)
    np.testing.assert_array_equal(scores, [[2, 5, 0], [10, 0, 0], [0, 0, 0], [2, 3, 6]])
    np.testing.assert_array_equal(is_there, [[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
    gradient = jax.grad(lambda v: jnp.sum(last_values(v, jnp.array(ids, jnp.int32), 3)[0] * 2))
    np.testing.assert_array_equal(
        gradient(jnp.array(values)),
        [[0, 2, 0, 0, 2, 0], [0, 0, 0, 0, 0, 2], [0] * 6, [0, 2, 2, 0, 0, 2]],
    )


def test_packed_equals_unpacked(params):
    lengths, tokens = [3, 4, 1], make_batch(1, 10)[0]
    segment_ids, positions = np.zeros((1, 10), np.int32), np.zeros((1, 10), np.int32)
    starts = np.cumsum([0, *lengths])
    for number, (start, length) in enumerate(zip(starts, lengths, strict=False), 1):
        segment_ids[0, start : start + length] = number
        positions[0, start : start + length] = np.arange(length)
    packed, is_there = last_values(APPLY(params, tokens, segment_ids, positions), segment_ids, 4)
    np.testing.assert_array_equal(is_there, [[True, True, True, False]])
    for number, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        alone = np.zeros((1, 10), np.int32)
        alone[0, -length:] = tokens[0, start : start + length]  # and on the left it is padded
        is_real = np.arange(10)[None] >= 10 - length
        positions = np.maximum(np.arange(10)[None] - (10 - length), 0)
        values = APPLY(params, alone, is_real.astype(np.int32), positions.astype(np.int32))
        score, _ = last_values(values, jnp.asarray(is_real, jnp.int32), 1)
        np.testing.assert_allclose(score[0, 0], packed[0, number], atol=2e-5)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_one_and_eight_devices(sizes):
    batch = dict(zip(("tokens", "segment_ids", "positions"), make_batch(), strict=True))

    def loss(params, batch):
        scores, _ = last_values(MODEL.apply(params, **batch), batch["segment_ids"], 1)
        return jnp.mean(jnp.square(scores))

    step = jax.jit(jax.value_and_grad(loss))
    single = jax.jit(MODEL.init)(jax.random.key(1))
    expected, expected_gradient = step(single, batch)
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    params = init_sharded(MODEL.init, jax.random.key(1), shardings(MODEL.logical_axes(), mesh))
    kernel = params["head"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(32 // sizes[1],)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, single)
    value, gradient = step(params, put_batch(batch, mesh))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradient,
        expected_gradient,
    )


def test_a_critic_starts_as_the_reward_model_and_goes_its_own_way(params):
    critic = critic_from(params)
    np.testing.assert_array_equal(APPLY(critic, *make_batch()), APPLY(params, *make_batch()))
    assert jax.tree.map(lambda x: x.sharding, critic) == jax.tree.map(lambda x: x.sharding, params)
    donated = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(critic)
    assert all(x.is_deleted() for x in jax.tree.leaves(critic))
    assert np.isfinite(APPLY(params, *make_batch())).all(), "the reward model is still there"
    del donated


def test_a_head_on_a_trunk_that_is_there(params):
    on = MODEL.on(params["decoder"], jax.random.key(5))
    assert on["decoder"] is params["decoder"]
    np.testing.assert_array_equal(
        on["head"]["kernel"], reward_head(jax.random.key(5), 32)["kernel"]
    )
