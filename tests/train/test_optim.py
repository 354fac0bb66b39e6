"""Learning rates by hand, and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.models import Model, ModelConfig
from alignjax.models.lora import LoraConfig
from alignjax.train.optim import OptimizerConfig, make_optimizer


def rates(num_updates=None, **config):
    schedule = make_optimizer(OptimizerConfig(**config), num_updates or 10).schedule
    return [float(schedule(i)) for i in range(num_updates or 10)]


def test_constant():
    assert rates(learning_rate=0.5) == [0.5] * 10


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_begins_above_0_and_ends_at_the_peak(schedule):
    seen = rates(learning_rate=1.0, warmup_steps=4, schedule=schedule)
    assert seen[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_linear_decay():
    seen = rates(learning_rate=1.0, schedule="linear", warmup_steps=2, final_frac=0.2)
    assert seen == pytest.approx([0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])


def test_cosine_decay():
    seen = rates(learning_rate=2.0, schedule="cosine", final_frac=0.1)
    expected = [2 * (0.9 * (1 + np.cos(np.pi * i / 10)) / 2 + 0.1) for i in range(10)]
    assert seen == pytest.approx(expected)
    assert float(make_optimizer(
        OptimizerConfig(learning_rate=2.0, schedule="cosine"), 10).schedule(99)
    ) == pytest.approx(0.2)  # fmt: skip


@pytest.mark.parametrize("warmup", [1, 10, 20])
def test_warm_up_of_one_update_and_of_the_whole_run(warmup):
    seen = rates(learning_rate=1.0, schedule="linear", warmup_steps=warmup)
    assert seen[0] == pytest.approx(1 / warmup)
    assert seen[9] == pytest.approx({1: 1 - 0.9 * 8 / 9, 10: 1.0, 20: 0.5}[warmup])


def test_only_matrices_decay_even_where_layers_are_stacked():
    config = ModelConfig(
        family="qwen3", vocab_size=11, hidden_size=16, num_layers=2, num_heads=2, head_dim=8,
        attention_bias=True, tie_embeddings=False,
    )  # fmt: skip
    model = Model(config, lora=LoraConfig(dora=True, targets=("mlp.up",)))
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0))
    params = jax.tree.map(lambda x: np.full(x.shape, 2.0, np.float32), shapes)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), 1)

    @jax.jit
    def update(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optimizer.transform.update(zeros, optimizer.transform.init(params), params)[0]

    decayed, kept = [], []
    for path, value in jax.tree_util.tree_leaves_with_path(update(params)):
        is_decayed = np.allclose(value, -0.1 * 0.5 * 2.0, rtol=1e-6)
        assert is_decayed or not np.any(np.array(value))
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        (decayed if is_decayed else kept).append(name)
    assert decayed == [
        "embedding", "layers.attention.key.kernel", "layers.attention.out.kernel",
        "layers.attention.query.kernel", "layers.attention.value.kernel",
        "layers.mlp.down.kernel", "layers.mlp.gate.kernel", "layers.mlp.up.kernel",
        "layers.mlp.up.lora.a", "layers.mlp.up.lora.b", "unembedding",
    ]  # fmt: skip
    assert kept == [
        "layers.attention.key.bias", "layers.attention.key_norm.scale",
        "layers.attention.out.bias", "layers.attention.query.bias",
        "layers.attention.query_norm.scale", "layers.attention.value.bias",
        "layers.attention_norm.scale", "layers.mlp.up.lora.magnitude", "layers.mlp_norm.scale",
        "norm.scale",
    ]  # fmt: skip


def test_a_part_learns_at_another_rate():
    """The others do not feel it, nor do the moments."""
    config = OptimizerConfig(weight_decay=0.1)
    optimizer = make_optimizer(config, 10)
    scaled = make_optimizer(config, 10, scales={"critic": 3.0})
    params = {"policy": {"w": jnp.ones((2, 2))}, "critic": {"w": jnp.full((2, 2), 2.0)}}
    grads = jax.tree.map(lambda x: x * jnp.array([1.0, -2.0]), params)
    plain, state = optimizer.transform.update(grads, optimizer.transform.init(params), params)
    other, state_ = scaled.transform.update(grads, scaled.transform.init(params), params)
    np.testing.assert_array_equal(other["policy"]["w"], plain["policy"]["w"])
    np.testing.assert_allclose(other["critic"]["w"], 3.0 * plain["critic"]["w"], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state, state_)
    assert float(scaled.schedule(3)) == float(optimizer.schedule(3))
