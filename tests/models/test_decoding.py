"""Prompts read once and tokens read one by one, against the model that reads whole texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.models import Model, ModelConfig
from alignjax.models.decoding import empty_own, read_prompts, read_tokens
from alignjax.models.kernels.decode import Seats
from alignjax.models.kv import loaded, quantized
from alignjax.sharding import MeshConfig, make_mesh

VOCAB, P, C, STEPS = 13, 6, 4, 9
SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "num_layers": 3, "num_heads": 4, "head_dim": 4,
         "initializer_range": 0.4}  # fmt: skip
CASES = {
    "one head of keys": {"num_kv_heads": 1},
    "a head of keys for each": {"family": "qwen3"},
    "windows in some layers": {
        "family": "gemma2", "num_kv_heads": 2, "sliding_window": 3, "attention_soft_cap": 2.0,
        "sliding_layers": (True, False, True), "query_scalar": 7, "logit_soft_cap": 5.0,
    },
    "windows and two embeddings": {
        "family": "gemma3_text", "num_kv_heads": 2, "sliding_window": 2, "local_rope_theta": 50.0,
        "sliding_layers": (True, True, False),
    },
    "no embedding in some layers": {
        "family": "smollm3", "num_kv_heads": 2, "rope_layers": (True, False, True),
    },
    "experts": {"family": "qwen3_moe", "num_kv_heads": 2, "num_experts": 4},
    "learned positions": {"family": "gpt2", "max_position_embeddings": 32},
    "norms after": {"family": "olmo2", "num_kv_heads": 2},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_are_those_of_whole_texts(case):
    """Two prompts with three rows each, in any seat; a row begins anew while others go on, and the
    ring of 8 slots goes round."""
    model = Model(ModelConfig(**(SMALL | CASES[case])))
    params = model.init(jax.random.PRNGKey(0))
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, VOCAB, (2, P)), np.array([6, 3])
    of_row = np.array([4, 0, 3, 2, 1])  # prompts 1, 0, 1, 0, 0; seat 5 is empty
    rows = np.array([1, 4, 3, 2, 0, 0])
    seats = Seats(jnp.array(of_row), jnp.array(rows))
    prompts = jax.jit(read_prompts, static_argnums=0)(model, params, tokens, lengths)
    step = jax.jit(read_tokens, static_argnums=0)
    own, starts = empty_own(model, 5, 8), np.array([0, 0, 5, 2, 0])
    new, found = rng.integers(0, VOCAB, (5, STEPS)), np.zeros((5, STEPS, 16))
    # Row 2 is replaced after 5 steps, row 3 after 2: what they wrote before means nothing.
    for t in range(STEPS):
        ages = np.where(t >= starts, t - starts, t)
        ages = np.minimum(ages, 8)
        hidden, own = step(model, params, new[:, t], jnp.array(ages), prompts, own, seats)
        found[:, t] = hidden
    for row in range(5):
        which = of_row[row] // 3
        added = new[row, starts[row] : starts[row] + 8]
        text = np.r_[tokens[which, : lengths[which]], added][None]
        text = np.pad(text, [(0, 0), (0, P + 8 - text.shape[1])])
        expected, _ = _apply(model, params, text)
        last = lengths[which] + len(added) - 1
        got = found[row, starts[row] : starts[row] + 8]
        np.testing.assert_allclose(got, expected[0, lengths[which] : last + 1], atol=3e-5)
        np.testing.assert_allclose(
            prompts.hidden[which], expected[0, lengths[which] - 1], atol=3e-5
        )


def _apply(model, params, text):
    positions = jnp.broadcast_to(jnp.arange(text.shape[1]), text.shape)
    return _jitted(model, params, jnp.asarray(text), jnp.ones_like(positions), positions)


_jitted = jax.jit(Model.apply, static_argnums=0)


@pytest.mark.parametrize("axis", [3, 4])
def test_codes_are_within_half_a_step_of_each_head(axis):
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 8, 8)).astype(np.float32)
    x *= np.exp(np.random.default_rng(1).normal(size=(2, 3, 2, 1, 1)) * 3)
    x[0, 0, 0] = 0
    stored = quantized(jnp.array(x), axis)
    assert stored.codes.dtype == jnp.int8 and stored.scale.shape == (2, 3, 2, 8)
    error = np.abs(loaded(stored, axis) - x)
    most = np.abs(x).max(axis, keepdims=True) / 254
    assert (error <= most * (1 + 1e-5)).all()
    assert error.max() > 0


@pytest.mark.parametrize("is_int8", [False, True])
def test_the_store_is_born_where_it_stays(is_int8):
    """Rows over fsdp, heads over tensor, as far as they divide."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    model = Model(ModelConfig(**SMALL, num_kv_heads=2), mesh=mesh)
    own = empty_own(model, 8, 4, is_int8=is_int8)
    k = own.k.codes if is_int8 else own.k
    assert k.shape == (3, 8, 2, 4, 4)
    assert {shard.data.shape for shard in k.addressable_shards} == {(3, 2, 1, 4, 4)}
    odd = empty_own(model, 6, 4, is_int8=is_int8)
    k = odd.k.codes if is_int8 else odd.k
    assert {shard.data.shape for shard in k.addressable_shards} == {(3, 6, 1, 4, 4)}
