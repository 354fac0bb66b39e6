"""Small random models of `transformers`, a published source: at least two for each family.

Each makes other things matter: odd numbers of heads, grouped heads, head_dim != hidden / heads,
biases, ties, odd bases, an epsilon large enough to see, windows and scalings that act within T.
"""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the dev extra")
transformers = pytest.importorskip("transformers", reason="needs the dev extra")

VOCAB, T = 37, 26
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
SHORT, LONG = [1.0, 1.1, 1.5, 2.0], [1.0, 3.0, 9.0, 27.0]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}

ODD = {"num_attention_heads": 3, "num_key_value_heads": 1}

CASES = {
    "llama-mha-untied": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "llama-gqa-tied": (
        "llama",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
         "rope_theta": 123.0, "rms_norm_eps": 0.1},
    ),
    "llama-biases-headdim": (
        "llama",
        {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 6, "mlp_bias": True,
         "attention_bias": True, "rope_theta": 500000.0},
    ),
    "llama-llama3": ("llama", {**ODD,
                               "head_dim": 8, "rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama-dynamic": (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 9},
    ),
    "mistral-window": ("mistral", {"sliding_window": 5, "rope_theta": 77.0}),
    "mistral-full-headdim": ("mistral", {**ODD, "sliding_window": None, "head_dim": 10}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2-window-yarn": (
        "qwen2",
        {**ODD, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
         "rope_scaling": YARN},
    ),
    "qwen3-gqa-tied": (
        "qwen3",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "tie_word_embeddings": True, "rope_theta": 1000000.0},
    ),
    "qwen3-biases-untied": (
        "qwen3",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "rms_norm_eps": 0.05,
         "attention_bias": True, "rope_theta": 17.0},
    ),
    "qwen3-yarn": (
        "qwen3",
        {"head_dim": 8, "rope_scaling": YARN | {"beta_fast": 4.0, "beta_slow": 0.5,
         "attention_factor": 1.3}},
    ),
    "qwen3moe-normalized": (
        "qwen3_moe",
        {"moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 2,
         "norm_topk_prob": True, "head_dim": 8},
    ),
    "qwen3moe-not-normalized": (
        "qwen3_moe",
        {**ODD, "moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 3,
         "norm_topk_prob": False, "head_dim": 6, "attention_bias": True, "rope_theta": 50.0},
    ),
    "mixtral-window": (
        "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    "mixtral-one-expert": (
        "mixtral",
        {**ODD,
         "num_local_experts": 3, "num_experts_per_tok": 1, "head_dim": 10, "rope_theta": 99.0},
    ),
    "gemma-mqa": ("gemma", {"head_dim": 10, "num_key_value_heads": 1}),
    "gemma-untied": (
        "gemma",
        {**ODD,
         "head_dim": 6, "tie_word_embeddings": False, "rope_theta": 55.0, "attention_bias": True},
    ),
    "gemma2-caps": (
        "gemma2",
        {"head_dim": 10, "query_pre_attn_scalar": 17, "sliding_window": 5,
         "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2-no-caps": (
        "gemma2",
        {**ODD,
         "head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 7, "attention_bias": True,
         "attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_theta": 88.0},
    ),
    "gemma3-two-bases": (
        "gemma3_text",
        {"head_dim": 10, "query_pre_attn_scalar": 11, "sliding_window": 5,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
         "rope_theta": 1e6, "rope_local_base_freq": 31.0},
    ),
    "gemma3-scaled": (
        "gemma3_text",
        {**ODD,
         "head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 4, "num_hidden_layers": 7,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "final_logit_softcapping": 4.0},
    ),
    "smollm3-nope": (
        "smollm3", {"no_rope_layers": [1, 0, 1], "rope_theta": 64.0},
    ),
    "smollm3-window": (
        "smollm3",
        {**ODD, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 4,
         "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "phi3-window": ("phi3", {"sliding_window": 6}),
    "phi3-partial": ("phi3", {**ODD,
                              "partial_rotary_factor": 0.5, "head_dim": 12, "rope_theta": 70.0}),
    "phi3-longrope": (
        "phi3",
        {"rope_scaling": LONGROPE, "original_max_position_embeddings": 8, "hidden_size": 32},
    ),
    "phi3-longrope-short": (
        "phi3",
        {"rope_scaling": LONGROPE, "original_max_position_embeddings": 32, "hidden_size": 32},
    ),
    "olmo2-gqa": ("olmo2", {"rope_theta": 500.0}),
    "olmo2-biases": (
        "olmo2", {**ODD, "attention_bias": True, "head_dim": 10, "tie_word_embeddings": True},
    ),
    "gpt2": ("gpt2", {}),
    "gpt2-relu": (
        "gpt2",
        {"activation_function": "relu", "n_inner": 20, "tie_word_embeddings": False, "n_head": 3,
         "layer_norm_epsilon": 0.1},
    ),
}  # fmt: skip
LENGTH_DEPENDENT = ("llama-dynamic", "phi3-longrope")
"""What their angles are depends on the longest text of a call: while a text grows, too."""
FAMILIES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe", "mixtral": "Mixtral", "gemma": "Gemma", "gemma2": "Gemma2",
    "gemma3_text": "Gemma3", "smollm3": "SmolLM3", "phi3": "Phi3", "olmo2": "Olmo2",
    "gpt2": "GPT2",
}  # fmt: skip
FIELDS = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2_FIELDS = {
    "vocab_size": VOCAB, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def make_reference(family, **overrides):
    """A small model in which every parameter is random, norms and biases too."""
    name = FAMILIES[family]
    fields = (GPT2_FIELDS if family == "gpt2" else FIELDS) | overrides
    fields = copy.deepcopy(fields)  # transformers writes into the dictionaries that it is given
    if family == "llama" and fields["num_attention_heads"] == 4:
        fields.setdefault("head_dim", 6)
    config_class = "Gemma3TextConfig" if family == "gemma3_text" else f"{name}Config"
    config = getattr(transformers, config_class)(**fields)
    torch.manual_seed(0)
    head = "GPT2LMHeadModel" if family == "gpt2" else f"{name}ForCausalLM"
    model = getattr(transformers, head)._from_config(config, attn_implementation="eager").eval()
    offset = 0.0 if family.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = ("norm" in name or "ln_" in name) and not name.endswith("bias")
            parameter.normal_(offset if is_scale else 0.0, 0.25)
    return model


def reference_logits(reference, tokens, attention_mask=None, positions=None):
    """[B, T, V]; the padded columns mean nothing."""
    with torch.no_grad():
        return reference(
            input_ids=torch.tensor(np.asarray(tokens), dtype=torch.long),
            attention_mask=None if attention_mask is None else torch.tensor(attention_mask),
            position_ids=None if positions is None else torch.tensor(positions),
            use_cache=False,
        ).logits.numpy()


def random_tokens(batch=3, time=T, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, time)).astype(np.int32)
