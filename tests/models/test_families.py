"""What a config.json may say."""

import pytest

from alignjax.core.errors import UserError
from alignjax.models.config import ModelConfig
from alignjax.models.hf_config import from_hf, to_hf

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


MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304, "initializer_range": 0.02, "intermediate_size": 9216,
    "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
    "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "sliding_window": 4096, "torch_dtype": "float32", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
    "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
QWEN3_MOE = {k: v for k, v in QWEN3.items() if k != "architectures"} | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1,
    "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_experts": 128, "num_experts_per_tok": 8, "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}  # fmt: skip
GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
    "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
GEMMA = {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu",
    "hidden_activation": None, "hidden_size": 3072, "initializer_range": 0.02,
    "intermediate_size": 24576, "max_position_embeddings": 8192, "model_type": "gemma",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 16,
    "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0,
    "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0", "use_cache": True,
    "vocab_size": 256000,
}  # fmt: skip
PHI4_MINI = {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 199999,
    "embd_pdrop": 0.0, "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu",
    "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192,
    "interpolate_factor": 1, "lm_head_bias": False, "max_position_embeddings": 131072,
    "mlp_bias": False, "model_type": "phi3", "num_attention_heads": 24, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "original_max_position_embeddings": 4096, "pad_token_id": 199999,
    "partial_rotary_factor": 0.75, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [3.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.45.0", "use_cache": True,
    "vocab_size": 200064,
}  # fmt: skip


def test_published_gemmas():
    """Which layers slide, and with which base: by the defaults that these files leave unsaid."""
    two, three = from_hf("config.json", GEMMA2), from_hf("config.json", GEMMA3)
    assert two.windows == (4096, None) * 13
    assert two.tie_embeddings and three.tie_embeddings
    assert (two.query_scalar, two.attention_soft_cap, two.logit_soft_cap) == (256, 50.0, 30.0)
    assert three.windows == ((512,) * 5 + (None,)) * 4 + (512, 512)
    assert three.rope_kinds == (("local",) * 5 + ("global",)) * 4 + ("local",) * 2
    assert (three.rope_theta, three.local_rope_theta) == (1e6, 1e4)


def test_the_first_gemma_says_gelu_and_means_its_approximation():
    """So do transformers 4, for null in hidden_activation, and 5, for this name in hidden_act."""
    config = from_hf("config.json", GEMMA)
    assert config.activation == "gelu_tanh"
    assert to_hf(config)["hidden_act"] == "gelu_pytorch_tanh"
    both = {name: "gelu_pytorch_tanh" for name in ("hidden_act", "hidden_activation")}
    assert from_hf("config.json", GEMMA | both) == config


def test_the_larger_gemma_2_says_its_window_twice():
    assert from_hf("config.json", GEMMA2 | {"sliding_window_size": 4096}).sliding_window == 4096


def test_published_phi_4_mini():
    """Its scaling is written as it was: transformers 4 refuses a fourth field."""
    config = from_hf("config.json", PHI4_MINI)
    assert (config.rotary_dim, config.rope_scaling.original_max_position_embeddings) == (96, 4096)
    written = to_hf(config)
    assert written["rope_scaling"] == PHI4_MINI["rope_scaling"]
    assert written["original_max_position_embeddings"] == 4096
    assert from_hf("config.json", written) == config


@pytest.mark.parametrize("name", ["factor", "attention_factor"])
def test_what_phi_3s_scaling_cannot_say_is_not_left_out(name):
    scaling = PHI4_MINI["rope_scaling"] | {name: 1.25}
    config = from_hf("config.json", PHI4_MINI | {"rope_scaling": scaling})
    assert to_hf(config)["rope_scaling"][name] == 1.25
    assert from_hf("config.json", to_hf(config)) == config


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (LLAMA, {"pretraining_tp": 2}),  # Llama 2 13B's: products in parts, with the same sum
        (GPT2, {"n_special": 0, "predict_special_tokens": True, "_num_labels": 1}),
        (QWEN3, {"unsloth_fixed": True, "unsloth_version": "2025.5"}),
    ],
)
def test_fields_of_published_files_that_change_nothing(data, changes):
    assert from_hf("config.json", data | changes) == from_hf("config.json", data)


def test_published_gpt2():
    config = from_hf("config.json", GPT2)
    assert (config.intermediate_size, config.head_dim, config.num_kv_heads) == (3072, 64, 12)
    assert (config.activation, config.tie_embeddings) == ("gelu_tanh", True)


def test_published_mixture():
    config = from_hf("config.json", QWEN3_MOE)
    assert (config.num_experts, config.experts_per_token) == (128, 8)
    assert (config.intermediate_size, config.normalize_experts) == (768, True)
    other = {k: v for k, v in QWEN3_MOE.items() if k != "num_experts"} | {"num_local_experts": 128}
    assert from_hf("config.json", other) == config, "as transformers 5 writes it"
    assert to_hf(config)["num_experts"] == 128, "as transformers 4 reads it"


def test_llama_2_names_no_base():
    """Its files are older than the field, and 10,000 was the only base then."""
    data = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "rope_scaling")}
    assert from_hf("config.json", data).rope_theta == 10_000.0


def test_published_qwen3():
    """The config.json of Qwen3-0.6B, field by field."""
    assert from_hf("config.json", QWEN3) == ModelConfig(
        family="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072,
        num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128, rope_theta=1e6, norm_eps=1e-6,
        qk_norm="head", attention_bias=False, mlp_bias=False, tie_embeddings=True,
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
    for data in (LLAMA, QWEN3, MISTRAL, GEMMA, GEMMA2, GEMMA3, QWEN3_MOE, PHI4_MINI, GPT2):
        config = from_hf("config.json", data)
        assert from_hf("config.json", to_hf(config)) == config


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (LLAMA, {"architectures": ["LamaForCausalLM"]}, "LamaForCausalLM.*expected one of"),
        (LLAMA, {"architectures": None}, r"architectures=\[\]"),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling.llama3.low_freq_factor: Field required",
        ),
        (
            LLAMA,
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            "rope_scaling.linear.factor: Inp",
        ),
        (LLAMA, {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_scaling: .*'ntk'"),
        (
            LLAMA,
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}},
            "rope_scaling.linear.mrope_section: Extra inputs",
        ),
        (LLAMA, {"rope_scaling": {"type": "yarn"}}, "rope_scaling.yarn.factor: Field required"),
        (LLAMA, {"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "expected one name"),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}},
            "yarn.factor: Field",
        ),
        (
            LLAMA,
            {"rope_parameters": {"rope_theta": 5e5, "factor": 2.0}},
            "'factor': 2.0}: expected no more",
        ),
        (LLAMA, {"rope_parameters": {"rope_theta": 1e4}}, r"10000.0, 500000.0"),
        (LLAMA, {"rope_scaling": "llama3"}, "rope_scaling='llama3': expected an object"),
        (LLAMA, {"rope_scaling": {"type": ["linear"]}}, r"\[\['linear'\]\]: expected one name"),
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
        (QWEN3, {"rope_theta": None}, "rope_theta.*found none.*transformers would assume"),
        (LLAMA, {"hidden_act": "mish"}, "hidden_act='mish' is not supported; only silu"),
        (LLAMA, {"hidden_act": ["silu"]}, r"hidden_act=\['silu'\] is not supported"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved=True is not supported"),
        (LLAMA, {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"use_sliding_window": False}, "'use_sliding_window'=False is unknown"),
        (LLAMA, {"logit_softcap": 30.0}, "'logit_softcap'=30.0 is unknown"),
        (LLAMA, {"num_hidden_layers": None}, "'num_hidden_layers' is missing"),
        (LLAMA, {"hidden_size": "2048"}, "hidden_size: Input should be a valid integer"),
        (LLAMA, {"num_key_value_heads": 5}, "num_kv_heads=5 does not divide num_heads=32"),
        (
            QWEN3,
            {"use_sliding_window": True, "sliding_window": 0},
            "sliding_window: Input should be",
        ),
        (
            QWEN3,
            {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["x"] * 28},
            "expected 'full_attention' or 'sliding_attention' for each of 28 layers",
        ),
        (MISTRAL, {"layer_types": ["sliding_attention"] * 2}, "layer_types.*is not supported here"),
        (QWEN3, {"layer_types": ["sliding_attention"] * 28}, "layer_types"),
        (QWEN3, {"head_dim": None}, "'head_dim' is missing"),
        (QWEN3, {"mlp_bias": True}, "mlp_bias=True"),
        (GEMMA, {"hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported"),
        (GEMMA2, {"sliding_window_size": 5}, "=4096 contradicts sliding_window_size=5"),
        (PHI4_MINI, {"full_attn_mod": 2}, "full_attn_mod=2 is not supported; only 1"),
        (PHI4_MINI, {"lm_head_bias": True}, "lm_head_bias=True is not supported"),
    ],
)
def test_what_is_not_supported_is_named(data, changes, message):
    with pytest.raises(UserError, match=message) as error:
        from_hf("models/x/config.json", data | changes)
    assert str(error.value).startswith("models/x/config.json: ")
