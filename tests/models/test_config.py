"""ModelConfig: what is derived, what is refused."""

import jax
import pytest
from pydantic import ValidationError

from alignjax.models import Model, ModelConfig


def test_derived_fields():
    config = ModelConfig(vocab_size=10, hidden_size=96, num_heads=6)
    assert (config.num_kv_heads, config.head_dim, config.intermediate_size) == (6, 16, 256)
    assert config.qk_norm is None
    assert ModelConfig(vocab_size=10, family="qwen3").qk_norm == "head"


def test_tiny():
    config = ModelConfig.tiny(23)
    assert (config.hidden_size, config.num_layers, config.num_heads) == (128, 2, 4)
    assert config.rope_theta == 100.0
    shapes = jax.eval_shape(Model(config).init, jax.random.key(0))
    # embedding + per layer (4 of attention, 3 of the MLP, 2 norms) + the last norm
    by_hand = 23 * 128 + 2 * (4 * 128 * 128 + 3 * 128 * 384 + 2 * 128) + 128
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == by_hand == 429_568
    assert ModelConfig.tiny(23, num_layers=3).num_layers == 3


def test_hashable_and_frozen():
    assert hash(Model(ModelConfig.tiny(23))) == hash(Model(ModelConfig.tiny(23)))
    assert Model(ModelConfig.tiny(23)) != Model(ModelConfig.tiny(23, rope_theta=10.0))
    with pytest.raises(ValidationError, match="frozen"):
        ModelConfig.tiny(23).num_layers = 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"qk_norm": "head"}, "qk_norm='head' cannot be written as family 'llama'"),
        ({"family": "qwen3", "qk_norm": "whole"}, "qk_norm='whole' cannot be written"),
        ({"family": "qwen3", "mlp_bias": True}, "mlp_bias=True cannot be written"),
        ({"hidden_size": 100, "num_heads": 3, "head_dim": 8}, "num_heads=3 does not divide"),
        ({"hidden_size": 100, "num_heads": 3, "family": "qwen3"}, "head_dim"),
        ({"num_layers": "2"}, "num_layers"),
        ({"num_layer": 2}, "num_layer"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"family": "gemma", "activation": "gelu"}, "stands for 'gelu_tanh'"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(vocab_size=10, **fields)


def test_unknown_compute_dtype():
    with pytest.raises(ValueError, match="compute_dtype='float16' is unknown"):
        Model(ModelConfig.tiny(23), compute_dtype="float16")
