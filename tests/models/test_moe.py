"""Experts against a loop over tokens in float64, the balance against transformers, 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from alignjax.models import Model, ModelConfig
from alignjax.models.moe import Experts, RouterSums, load_balancing_loss

SHAPE = {"vocab_size": 11, "hidden_size": 6, "intermediate_size": 5, "num_heads": 3,
         "num_kv_heads": 3, "family": "qwen3_moe", "initializer_range": 1.0}  # fmt: skip


def dense(params, x, per_token, is_normalized):
    """Each token alone, in float64: softmax over experts, the best ones, weighted."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    out, times = np.zeros(x.shape), np.zeros((*x.shape[:-1], params["gate"].shape[0]))
    probabilities = np.zeros_like(times)
    for at in np.ndindex(x.shape[:-1]):
        token = x[at].astype(np.float64)
        logits = token @ params["router"]
        probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        best = sorted(range(len(probs)), key=lambda e: -probs[e])[:per_token]
        share = sum(probs[e] for e in best) if is_normalized else 1.0
        for e in best:
            gate = token @ params["gate"][e]
            inner = gate / (1 + np.exp(-gate)) * (token @ params["up"][e])
            out[at] += probs[e] / share * (inner @ params["down"][e])
            times[at][e] = 1
        probabilities[at] = probs
    return out, times, probabilities


@pytest.mark.parametrize("num_experts", [1, 3, 8])
@pytest.mark.parametrize("is_normalized", [True, False])
def test_no_token_is_dropped(num_experts, is_normalized):
    per_token = min(2, num_experts)
    config = ModelConfig(
        num_experts=num_experts, experts_per_token=per_token, normalize_experts=is_normalized,
        **SHAPE,
    )  # fmt: skip
    experts = Experts(config, nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.split(experts)[1])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 7, 6)).astype(np.float32)
    x[0] = x[0, 0]  # a whole row to the same experts: any capacity would be exceeded
    is_real = rng.random((3, 7)) < 0.7
    out, sums = experts(jnp.asarray(x), jnp.asarray(is_real))
    expected, times, probabilities = dense(params, x, per_token, is_normalized)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(sums.chosen, times[is_real].sum(0), rtol=1e-6)
    np.testing.assert_allclose(sums.probability, probabilities[is_real].sum(0), rtol=1e-5)
    assert sums.count == is_real.sum()


def test_balance_by_hand():
    even = RouterSums(jnp.array([3.0, 3.0]), jnp.array([3.0, 3.0]), jnp.array(6.0))
    assert load_balancing_loss(even) == 1.0
    one = RouterSums(jnp.array([6.0, 0.0]), jnp.array([4.5, 1.5]), jnp.array(6.0))
    assert load_balancing_loss(one) == 1.5
    assert load_balancing_loss(jax.tree.map(jnp.zeros_like, even)) == 0


def test_balance_is_that_of_transformers(saved):
    from alignjax.models import load
    from tests.models.references import random_tokens, torch

    reference, directory = saved("qwen3moe-normalized")
    model, params = load(directory)
    tokens = random_tokens()
    mask = np.ones_like(tokens)
    mask[1, 9:] = 0
    with torch.no_grad():
        ids, on = torch.tensor(tokens).long(), torch.tensor(mask)
        theirs = reference(input_ids=ids, attention_mask=on, output_router_logits=True).aux_loss
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    _, sums = jax.jit(model.apply_with_routing)(params, tokens, mask, positions)
    np.testing.assert_allclose(load_balancing_loss(sums), float(theirs), rtol=1e-5)


def test_a_model_without_experts_has_no_router():
    model = Model(ModelConfig.tiny(5))
    ones = np.ones((1, 2), np.int32)
    with pytest.raises(ValueError, match="num_experts=0"):
        model.apply_with_routing(model.init(jax.random.key(0)), ones, ones, ones)
