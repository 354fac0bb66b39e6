"""What a config.json may say."""

import pytest

from alignjax.core.errors import UserError
from alignjax.models.config import ModelConfig
from alignjax.models.families import from_hf, to_hf

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "hidden_act": "silu",
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "rope_scaling": None, "mlp_bias": False,
    "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": True,
    "max_position_embeddings": 131072, "initializer_range": 0.02, "pretraining_tp": 1,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008], "use_cache": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.45.0",
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def test_published_qwen3():
    """The config.json of Qwen3-0.6B, field by field."""
    assert from_hf("config.json", QWEN3) == ModelConfig(
        family="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072,
        num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128, rope_theta=1e6, norm_eps=1e-6,
        qk_norm=True, attention_bias=False, mlp_bias=False, tie_embeddings=True,
        max_position_embeddings=40960, initializer_range=0.02,
    )  # fmt: skip


def test_llama_fields_that_may_be_absent():
    absent = ("head_dim", "num_key_value_heads", "tie_word_embeddings", "mlp_bias")
    config = from_hf("config.json", {k: v for k, v in LLAMA.items() if k not in absent})
    assert (config.head_dim, config.num_kv_heads) == (2048 // 32, 32)
    assert not config.tie_embeddings
    assert not config.qk_norm
    assert config.rope_theta == 500000.0


def test_new_spelling_of_the_rope_base():
    data = {k: v for k, v in QWEN3.items() if k not in ("rope_theta", "rope_scaling")}
    data["rope_parameters"] = {"rope_theta": 77.0, "rope_type": "default"}
    data["layer_types"] = ["full_attention"] * 28
    assert from_hf("config.json", data).rope_theta == 77.0


@pytest.mark.parametrize("scaling", [{}, {"rope_type": "default"}, {"type": "default"}])
def test_the_default_embedding_under_all_its_names(scaling):
    assert from_hf("config.json", LLAMA | {"rope_scaling": scaling}).rope_theta == 500000.0


def test_round_trip():
    for data in (LLAMA, QWEN3):
        config = from_hf("config.json", data)
        assert from_hf("config.json", to_hf(config)) == config


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (LLAMA, {"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM.*expected one of"),
        (LLAMA, {"architectures": None}, r"architectures=\[\]"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "scaling.*='llama3'"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type='linear'"),
        (LLAMA, {"rope_scaling": {"type": "yarn"}}, "rope_scaling.type='yarn'"),
        (LLAMA, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "rope_type='yarn'"),
        (LLAMA, {"rope_parameters": {"rope_theta": 5e5, "factor": 2.0}}, "rope_parameters.factor"),
        (LLAMA, {"rope_parameters": {"rope_theta": 1e4}}, r"10000.0, 500000.0"),
        (LLAMA, {"rope_scaling": "llama3"}, "rope_scaling='llama3': expected an object"),
        (LLAMA, {"rope_scaling": {"type": ["linear"]}}, r"rope_scaling.type=\['linear'\]"),
        (LLAMA, {"rope_parameters": "yarn"}, "rope_parameters='yarn': expected an object"),
        (LLAMA, {"rope_parameters": [1]}, r"rope_parameters=\[1\]: expected an object"),
        (LLAMA, {"rope_theta": "10000"}, "rope_theta='10000': expected a number above 1"),
        (LLAMA, {"rope_theta": float("nan")}, "rope_theta=nan: expected a number above 1"),
        (LLAMA, {"rope_parameters": {"rope_theta": [1]}}, r"parameters.rope_theta=\[1\]: expected"),
        (LLAMA, {"rope_parameters": {"rope_theta": "1"}}, "parameters.rope_theta='1': expected"),
        (LLAMA, {"architectures": [["x"]]}, r"architectures=\[\['x'\]\] is not supported"),
        (LLAMA, {"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM' is not"),
        (LLAMA, {"model_type": "mistral"}, "model_type='mistral' contradicts.*LlamaForCausalLM"),
        (QWEN3, {"model_type": "llama"}, "model_type='llama' contradicts.*Qwen3ForCausalLM"),
        (QWEN3, {"layer_types": 5}, "layer_types=5 is not supported"),
        (QWEN3, {"layer_types": "full_attention"}, "layer_types='full_attention' is not"),
        (QWEN3, {"layer_types": [["x"]]}, r"layer_types=\[\['x'\]\] is not supported"),
        (QWEN3, {"layer_types": ["full_attention"] * 27}, "layer_types.*num_hidden_layers=28"),
        (LLAMA, {"rope_theta": None}, "rope_theta.*found none.*10000"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; only 'silu'"),
        (LLAMA, {"pretraining_tp": 2}, "pretraining_tp=2"),
        (LLAMA, {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"use_sliding_window": False}, "'use_sliding_window'=False is unknown"),
        (LLAMA, {"logit_softcap": 30.0}, "'logit_softcap'=30.0 is unknown"),
        (LLAMA, {"num_hidden_layers": None}, "'num_hidden_layers' is missing"),
        (LLAMA, {"hidden_size": "2048"}, "hidden_size: Input should be a valid integer"),
        (LLAMA, {"num_key_value_heads": 5}, "num_kv_heads=5 does not divide num_heads=32"),
        (QWEN3, {"use_sliding_window": True}, "use_sliding_window=True"),
        (QWEN3, {"layer_types": ["sliding_attention"] * 28}, "layer_types"),
        (QWEN3, {"head_dim": None}, "'head_dim' is missing"),
        (QWEN3, {"mlp_bias": True}, "mlp_bias=True"),
    ],
)
def test_what_is_not_supported_is_named(data, changes, message):
    with pytest.raises(UserError, match=message) as error:
        from_hf("models/x/config.json", data | changes)
    assert str(error.value).startswith("models/x/config.json: ")
