"""Families of transformers as rows: under which fields config.json has what `ModelConfig` has.

What a family computes stands in `config`, the names of its tensors in `tensors`; `hf_config` reads
and writes by these rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignjax.models.config import Family
from alignjax.models.hf_rules import (
    ALIKE,
    ALL_OR_NONE,
    LONGROPE,
    NO_ANGLES,
    ONE_BASE,
    SMOLLM3,
    TWO_BASES,
    UPPER,
    Rule,
    every,
    one_base,
)

REQUIRED = object()
"""In the place of a default: the field must be there."""
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "activation": "hidden_act",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "initializer_range",
}
"""Ours -> theirs, of nearly all families."""
_OPTIONAL = {"num_kv_heads": None, "head_dim": None, "tie_embeddings": False}
_FIXED = {
    "attention_dropout": 0,
    "quantization_config": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "is_decoder": False,
    "use_bidirectional_attention": False,
}
_GEMMA2_FIELDS = {
    "activation": "hidden_activation", "query_scalar": "query_pre_attn_scalar",
    "sliding_window": "sliding_window", "attention_soft_cap": "attn_logit_softcapping",
    "logit_soft_cap": "final_logit_softcapping",
}  # fmt: skip
_MOE_FIELDS = {
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "router_aux_coef": "router_aux_loss_coef",
}


@dataclass(frozen=True)
class Row:
    """What transformers calls a family, and what its config.json may say."""

    architecture: str
    extra: Mapping[str, str | None] = field(default_factory=dict)
    """Fields beyond `_FIELDS`, under other names, or (None) not there: ours -> theirs."""
    optional: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ours that config.json may leave out, with what their absence means there; None:
    derived by `ModelConfig`."""
    nullable: frozenset[str] = frozenset()
    """Fields of ours for which null is a value; absent they are an error, unless optional."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of theirs that change the mathematics, each with the one value that is supported."""
    also_known: Mapping[str, str] = field(default_factory=dict)
    """Second names of their fields; where both are given they must agree."""
    inert: frozenset[str] = frozenset()
    """Fields of theirs that leave the logits alone."""
    gelu_tanh: str = "gelu_pytorch_tanh"
    """Which of its names this activation has in the family."""
    gelu: str = "gelu"
    """What that name stands for in the family."""
    angles: Rule = ONE_BASE
    layers: Rule = ALIKE

    @property
    def fields(self) -> dict[str, str]:
        """Ours -> theirs, of all that has a field of its own; None: derived here."""
        merged = _FIELDS | dict(self.extra)
        return {ours: theirs for ours, theirs in merged.items() if theirs is not None}

    @property
    def defaults(self) -> dict[str, Any]:
        """What the absence of our fields means; REQUIRED where it is not here."""
        return _OPTIONAL | dict(self.optional)

    @property
    def supported(self) -> dict[str, Any]:
        """Their fields that have one value here."""
        return _FIXED | dict(self.fixed)


_BIAS = {"attention_bias": "attention_bias"}
_NO_BIAS = {"attention_bias": False}
_SLICED = frozenset({"pretraining_tp"})
"""In how many parts a product was computed in pretraining: the same but for rounding."""
ROWS: dict[Family, Row] = {
    "llama": Row(
        "LlamaForCausalLM",
        extra=_BIAS | {"mlp_bias": "mlp_bias"},
        optional=_NO_BIAS | {"mlp_bias": False},
        fixed={"is_llama_config": True, "rope_interleaved": False},
        inert=_SLICED | {"sliding_window", "max_window_layers"},
        angles=one_base(absent=10_000.0),  # Llama 2's files are older than the field
    ),
    "mistral": Row(
        "MistralForCausalLM",
        extra={"sliding_window": "sliding_window"},
        nullable=frozenset({"sliding_window"}),
    ),
    "qwen2": Row("Qwen2ForCausalLM", fixed={"use_mrope": False}, layers=UPPER),
    "qwen3": Row(
        "Qwen3ForCausalLM",
        extra=_BIAS,
        optional=_NO_BIAS | {"head_dim": REQUIRED},
        fixed={"mlp_bias": False},
        layers=UPPER,
    ),
    "qwen3_moe": Row(
        "Qwen3MoeForCausalLM",
        extra=_BIAS
        | _MOE_FIELDS
        | {"intermediate_size": "moe_intermediate_size", "normalize_experts": "norm_topk_prob",
           "num_experts": "num_experts"},
        optional=_NO_BIAS | {"normalize_experts": False, "router_aux_coef": 0.001},
        fixed={"decoder_sparse_step": 1, "mlp_only_layers": []},
        also_known={"num_experts": "num_local_experts"},  # transformers 5; 4 knows but the first
        inert=frozenset({"intermediate_size", "output_router_logits"}),
        layers=ALL_OR_NONE,
    ),
    "mixtral": Row(
        "MixtralForCausalLM",
        extra=_MOE_FIELDS | {"sliding_window": "sliding_window"},
        optional={"sliding_window": None, "router_aux_coef": 0.001},
        fixed={"router_jitter_noise": 0},
        inert=frozenset({"output_router_logits"}),
    ),
    "gemma": Row(
        "GemmaForCausalLM",
        extra=_BIAS,
        optional=_NO_BIAS | {"head_dim": REQUIRED, "tie_embeddings": True},
        fixed={"hidden_activation": "gelu_pytorch_tanh"},
        gelu="gelu_tanh",  # the first releases say it and were trained with the other
    ),
    "gemma2": Row(
        "Gemma2ForCausalLM",
        extra=_BIAS | _GEMMA2_FIELDS,
        optional=_NO_BIAS | {"head_dim": REQUIRED, "tie_embeddings": True},
        nullable=frozenset({"attention_soft_cap", "logit_soft_cap"}),
        also_known={"sliding_window": "sliding_window_size"},
        inert=frozenset({"hidden_act", "cache_implementation"}),
        layers=every(2),
    ),
    "gemma3_text": Row(
        "Gemma3ForCausalLM",
        extra=_BIAS | _GEMMA2_FIELDS,
        optional=_NO_BIAS
        | {"head_dim": REQUIRED, "tie_embeddings": True, "attention_soft_cap": None,
           "logit_soft_cap": None},
        inert=frozenset({"hidden_act", "cache_implementation"}),
        angles=TWO_BASES,
        layers=every(6),
    ),
    "smollm3": Row(
        "SmolLM3ForCausalLM",
        extra=_BIAS | {"mlp_bias": "mlp_bias"},
        optional=_NO_BIAS | {"mlp_bias": False, "tie_embeddings": True},
        inert=_SLICED,
        layers=SMOLLM3,
    ),
    "phi3": Row(
        "Phi3ForCausalLM",
        extra={"sliding_window": "sliding_window"},
        optional={"sliding_window": None},
        fixed={
            "attention_bias": False, "mlp_bias": False, "lm_head_bias": False,
            "full_attn_mod": 1, "interpolate_factor": 1,
        },
        inert=frozenset({"embd_pdrop", "resid_pdrop", "original_max_position_embeddings"}),
        angles=LONGROPE,
    ),
    "olmo2": Row("Olmo2ForCausalLM", extra=_BIAS, optional=_NO_BIAS),
    "gpt2": Row(
        "GPT2LMHeadModel",
        extra={
            "hidden_size": "n_embd", "num_layers": "n_layer", "num_heads": "n_head",
            "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
            "activation": "activation_function", "norm_eps": "layer_norm_epsilon",
            "num_kv_heads": None, "head_dim": None,
        },
        optional={"tie_embeddings": True, "intermediate_size": None},
        fixed={
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
        },
        inert=frozenset({
            "attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "summary_activation",
            "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
            "num_key_value_heads", "head_dim", "intermediate_size", "n_special",
            "predict_special_tokens",
        }),
        gelu_tanh="gelu_new",
        angles=NO_ANGLES,
    ),
}  # fmt: skip

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh", "relu": "relu",
}  # fmt: skip
"""Theirs -> ours."""

INERT = {
    "_name_or_path", "architectures", "model_type", "transformers_version", "tokenizer_class",
    "dtype", "torch_dtype", "torchscript", "use_bfloat16", "use_cache", "auto_map", "prefix",
    "_attn_implementation_autoset", "chunk_size_feed_forward", "return_dict", "problem_type",
    "output_attentions", "output_hidden_states", "finetuning_task", "task_specific_params",
    "id2label", "label2id", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "num_labels", "transformers.js_config",
    "_num_labels", "unsloth_fixed", "unsloth_version",
}  # fmt: skip
"""Bookkeeping, and switches of transformers that leave the logits alone."""
