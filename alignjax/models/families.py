"""config.json <-> ModelConfig. A family is a row: the fields under which transformers knows it.

What a family computes stands in `config`, the names of its tensors in `tensors`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from alignjax.core.errors import UserError
from alignjax.models.config import FAMILIES, Family, ModelConfig

_REQUIRED = object()
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
_SLIDING_SWITCH = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
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
    extra: Mapping[str, str] = field(default_factory=dict)
    """Fields beyond `_FIELDS`, or under other names: ours -> theirs."""
    optional: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ours that config.json may leave out, with what their absence means there; None:
    derived by `ModelConfig`."""
    nullable: frozenset[str] = frozenset()
    """Fields of ours for which null is a value; absent they are an error, unless optional."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of theirs that change the mathematics, each with the one value that is supported."""
    inert: frozenset[str] = frozenset()
    """Fields of theirs that leave the logits alone."""
    rope_theta: float | None = None
    """What the absence of a base means; None: an error."""

    @property
    def fields(self) -> dict[str, str]:
        return _FIELDS | dict(self.extra)


_BIAS = {"attention_bias": "attention_bias"}
_NO_BIAS = {"attention_bias": False}
ROWS: dict[Family, Row] = {
    "llama": Row(
        "LlamaForCausalLM",
        extra=_BIAS | {"mlp_bias": "mlp_bias"},
        optional=_NO_BIAS | {"mlp_bias": False},
        fixed={"pretraining_tp": 1, "is_llama_config": True, "rope_interleaved": False},
        inert=frozenset({"sliding_window", "max_window_layers"}),
        rope_theta=10_000.0,
    ),
    "mistral": Row(
        "MistralForCausalLM",
        extra={"sliding_window": "sliding_window"},
        nullable=frozenset({"sliding_window"}),
    ),
    "qwen2": Row("Qwen2ForCausalLM", fixed={"use_mrope": False}),
    "qwen3": Row(
        "Qwen3ForCausalLM",
        extra=_BIAS,
        optional=_NO_BIAS | {"head_dim": _REQUIRED},
        fixed={"mlp_bias": False},
    ),
    "qwen3_moe": Row(
        "Qwen3MoeForCausalLM",
        extra=_BIAS
        | _MOE_FIELDS
        | {"intermediate_size": "moe_intermediate_size", "normalize_experts": "norm_topk_prob"},
        optional=_NO_BIAS | {"normalize_experts": False, "router_aux_coef": 0.001},
        fixed={"decoder_sparse_step": 1, "mlp_only_layers": []},
        inert=frozenset({"intermediate_size", "output_router_logits", "num_experts"}),
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
        optional=_NO_BIAS | {"head_dim": _REQUIRED, "tie_embeddings": True},
    ),
    "gemma2": Row(
        "Gemma2ForCausalLM",
        extra=_BIAS | _GEMMA2_FIELDS,
        optional=_NO_BIAS | {"head_dim": _REQUIRED, "tie_embeddings": True},
        nullable=frozenset({"attention_soft_cap", "logit_soft_cap"}),
        inert=frozenset({"hidden_act", "cache_implementation"}),
    ),
    "gemma3_text": Row(
        "Gemma3ForCausalLM",
        extra=_BIAS | _GEMMA2_FIELDS,
        optional=_NO_BIAS
        | {"head_dim": _REQUIRED, "tie_embeddings": True, "attention_soft_cap": None,
           "logit_soft_cap": None},
        inert=frozenset({"hidden_act", "cache_implementation"}),
    ),
    "smollm3": Row(
        "SmolLM3ForCausalLM",
        extra=_BIAS | {"mlp_bias": "mlp_bias"},
        optional=_NO_BIAS | {"mlp_bias": False, "tie_embeddings": True},
    ),
    "phi3": Row(
        "Phi3ForCausalLM",
        extra={"sliding_window": "sliding_window"},
        optional={"sliding_window": None},
        fixed={"attention_bias": False},
        inert=frozenset({"embd_pdrop", "resid_pdrop", "original_max_position_embeddings"}),
    ),
    "olmo2": Row("Olmo2ForCausalLM", extra=_BIAS, optional=_NO_BIAS),
    "gpt2": Row(
        "GPT2LMHeadModel",
        extra={
            "hidden_size": "n_embd", "num_layers": "n_layer", "num_heads": "n_head",
            "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
            "activation": "activation_function", "norm_eps": "layer_norm_epsilon",
        },
        optional={"tie_embeddings": True, "intermediate_size": None},
        fixed={
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
        },
        inert=frozenset({
            "attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "summary_activation",
            "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
            "num_key_value_heads", "head_dim", "intermediate_size",
        }),
    ),
}  # fmt: skip

_ACTIVATIONS = {
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
}  # fmt: skip
"""Bookkeeping, and switches of transformers that leave the logits alone."""
_ROPE = {"rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor"}


def from_hf(source: str, data: Mapping[str, Any]) -> ModelConfig:
    """The contents of a config.json -> ModelConfig.

    Args:
      source: the file, for messages.
    Raises:
      UserError: on anything missing, and on anything that would change the mathematics in a way
        that is not implemented here.
    """
    family, row = _family(source, data)
    if family == "qwen3_moe" and "num_local_experts" not in data and "num_experts" in data:
        data = {**data, "num_local_experts": data["num_experts"]}  # as it is published
    reader = _Reader(source, data, family, row)
    values = reader.fields() | reader.rope() | reader.layers()
    reader.check_the_rest()
    try:
        return ModelConfig(**values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(row.fields.get(str(key), str(key)) for key in e['loc']) or 'model'}: "
            f"{e['msg']}"
            for e in error.errors()
        )
        raise UserError(f"{source}: {problems}") from error


def _family(source: str, data: Mapping[str, Any]) -> tuple[Family, Row]:
    architectures, model_type = data.get("architectures") or [], data.get("model_type")
    for family, row in ROWS.items():
        if architectures == [row.architecture]:
            if model_type not in (None, family):
                raise UserError(
                    f"{source}: model_type={model_type!r} contradicts architectures="
                    f"{architectures!r}, which is {family!r}"
                )
            return family, row
    raise UserError(
        f"{source}: architectures={architectures!r} is not supported; expected one of "
        + ", ".join(row.architecture for row in ROWS.values())
    )


class _Reader:
    """One config.json, and which of its fields were read."""

    def __init__(self, source: str, data: Mapping[str, Any], family: Family, row: Row):
        self.source, self.data, self.family, self.row = source, data, family, row
        self.read: set[str] = set()

    def get(self, name: str) -> Any:
        self.read.add(name)
        return self.data.get(name)

    def fields(self) -> dict[str, Any]:
        """What stands in a field of its own."""
        row, values = self.row, {"family": self.family}
        optional = _OPTIONAL | dict(row.optional)
        for ours, theirs in row.fields.items():
            value = self.get(theirs)
            if value is None:
                default = optional.get(ours, _REQUIRED)
                if default is _REQUIRED and not (ours in row.nullable and theirs in self.data):
                    raise UserError(
                        f"{self.source}: field {theirs!r} is missing; a {self.family} model needs "
                        "it"
                    )
                value = None if default is _REQUIRED else default
            elif ours == "activation":
                if not isinstance(value, str) or value not in _ACTIVATIONS:
                    raise UserError(
                        f"{self.source}: {theirs}={value!r} is not supported; only "
                        f"{', '.join(_ACTIVATIONS)} are"
                    )
                value = _ACTIVATIONS[value]
            values[ours] = value
        if self.family == "gpt2":
            values["num_kv_heads"] = values["head_dim"] = None
            width = values["hidden_size"]
            if values["intermediate_size"] is None and type(width) is int:
                values["intermediate_size"] = 4 * width
        return values

    def rope(self) -> dict[str, Any]:
        """Reads `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
        if FAMILIES[self.family].fixed.get("positions") == "learned":
            return {}
        theta, fraction = self.get("rope_theta"), self.get("partial_rotary_factor")
        old, new = self.section("rope_scaling"), self.section("rope_parameters")
        if self.family == "gemma3_text":
            local = {"rope_theta": self.get("rope_local_base_freq"), "rope_type": "default"}
            if "full_attention" in new or "sliding_attention" in new:
                local = local | (new.get("sliding_attention") or {})
                new = new.get("full_attention") or {}
            elif new:
                raise UserError(
                    f"{self.source}: rope_parameters={new!r}: expected 'full_attention' and "
                    "'sliding_attention' in it"
                )
            if local.pop("rope_type", local.pop("type", None)) not in (None, "default"):
                raise UserError(
                    f"{self.source}: rope_parameters.sliding_attention is scaled; only "
                    "full_attention may be"
                )
            values = {"local_rope_theta": self.base({"sliding_attention": local["rope_theta"]})}
        else:
            values = {}
        found = {
            "rope_theta": theta,
            "rope_scaling.rope_theta": old.pop("rope_theta", None),
            "rope_parameters.rope_theta": new.pop("rope_theta", None),
        }
        values["rope_theta"] = self.base(found)
        fractions = {
            value
            for value in (fraction, *(s.pop("partial_rotary_factor", None) for s in (old, new)))
            if value is not None
        }
        if len(fractions) > 1:
            raise UserError(f"{self.source}: several values of partial_rotary_factor: {fractions}")
        if fractions:
            values["rope_fraction"] = float(fractions.pop())
        scalings = [scaling for scaling in map(self.scaling, (old, new)) if scaling is not None]
        if len(scalings) > 1 and scalings[0] != scalings[1]:
            raise UserError(
                f"{self.source}: rope_scaling and rope_parameters differ: {scalings[0]} and "
                f"{scalings[1]}"
            )
        if scalings:
            values["rope_scaling"] = scalings[0]
        return values

    def section(self, name: str) -> dict[str, Any]:
        section = self.get(name)
        if not isinstance(section, dict | None):
            raise UserError(f"{self.source}: {name}={section!r}: expected an object")
        return dict(section or {})

    def base(self, found: Mapping[str, Any]) -> float:
        """The one base of a rotary embedding that is given, perhaps under several names."""
        bases = {name: value for name, value in found.items() if value is not None}
        for name, value in bases.items():
            if type(value) not in (int, float) or not 1 < value < math.inf:
                raise UserError(f"{self.source}: {name}={value!r}: expected a number above 1")
        if not bases and self.row.rope_theta is not None:
            return self.row.rope_theta
        if len(set(bases.values())) != 1:
            raise UserError(
                f"{self.source}: expected one base of the rotary embedding in "
                f"{' or '.join(found)}, found {sorted(bases.values()) or 'none'}"
                + ("" if bases else "; transformers would assume one: add it if that is right")
            )
        return float(next(iter(bases.values())))

    def scaling(self, section: dict[str, Any]) -> dict[str, Any] | None:
        """A section without its base -> the fields of `rope.Scaling`; None: no scaling."""
        kinds = [section.pop(name, None) for name in ("rope_type", "type")]
        kinds = [kind for kind in kinds if kind is not None] or ["default"]
        kind = kinds[0]
        if not all(isinstance(other, str) and other == kind for other in kinds):
            raise UserError(
                f"{self.source}: rope_type and type of the rotary embedding are {kinds}: expected "
                "one name"
            )
        if self.family == "phi3" and kind in ("su", "yarn"):
            kind = "longrope"  # what it was called first
        if kind == "default":
            # The context of pretraining says nothing where nothing is scaled.
            section.pop("original_max_position_embeddings", None)
            if section:
                raise UserError(
                    f"{self.source}: rope_type 'default' with {section}: expected no more fields"
                )
            return None
        original = "original_max_position_embeddings"
        if kind in ("llama3", "yarn", "longrope"):
            above = self.get(original)
            section[original] = (
                section.get(original, self.data.get("max_position_embeddings"))
                if above is None
                else above
            )
        else:
            section.pop(original, None)
        if "attention_factor" in section:
            section["attention_scale"] = section.pop("attention_factor")
        lists = {name: tuple(v) if isinstance(v, list) else v for name, v in section.items()}
        return {"type": kind} | {name: v for name, v in lists.items() if v is not None}

    def layers(self) -> dict[str, Any]:
        """Which layers have a window, and which a rotary embedding."""
        num_layers = self.data.get(self.row.fields["num_layers"])
        family, free = self.family, FAMILIES[self.family].free
        if type(num_layers) is not int:
            return {}
        values: dict[str, Any] = {}
        if family == "smollm3":
            rope, interval = self.get("no_rope_layers"), self.get("no_rope_layer_interval") or 4
            if rope is None:
                rope = [(i + 1) % interval != 0 for i in range(num_layers)]
            values["rope_layers"] = tuple(bool(turns) for turns in rope[:num_layers])
        if "sliding_layers" not in free and family != "qwen3_moe":
            self.expect_full_attention(num_layers)
            return values
        if family in ("gemma2", "gemma3_text"):
            every = self.get("sliding_window_pattern") or self.get("_sliding_window_pattern")
            every = 2 if family == "gemma2" else every or 6
            self.read |= {"sliding_window_pattern", "_sliding_window_pattern"}
            slides = [(i + 1) % every != 0 for i in range(num_layers)]
        else:
            self.read |= _SLIDING_SWITCH
            is_on = self.get("use_sliding_window") and self.data.get("sliding_window") is not None
            if not is_on:
                self.expect_full_attention(num_layers)
                return values
            values["sliding_window"] = self.data["sliding_window"]
            if family == "qwen3_moe":
                return values
            if family == "smollm3":
                slides = [not turns for turns in values["rope_layers"]]
            else:
                first = self.data.get("max_window_layers")
                first = 28 if first is None else first
                slides = [i >= first for i in range(num_layers)]
        types = self.get("layer_types")
        if types is not None:
            unknown = set(types) - {"full_attention", "sliding_attention"}
            if unknown or len(types) != num_layers:
                raise UserError(
                    f"{self.source}: layer_types={types!r}: expected 'full_attention' or "
                    f"'sliding_attention' for each of {num_layers} layers"
                )
            slides = [kind == "sliding_attention" for kind in types]
        values["sliding_layers"] = tuple(slides)
        return values

    def expect_full_attention(self, num_layers: int) -> None:
        kind = "full_attention"
        if self.get("layer_types") not in (None, [kind] * num_layers):
            raise UserError(
                f"{self.source}: layer_types={self.data['layer_types']!r} is not supported here; "
                f"only {kind!r}, once for each of num_hidden_layers={num_layers}"
            )

    def check_the_rest(self) -> None:
        """Nothing unread may change the mathematics."""
        fixed = _FIXED | dict(self.row.fixed)
        for name, value in self.data.items():
            if name in fixed and value is not None and value != fixed[name]:
                raise UserError(
                    f"{self.source}: {name}={value!r} is not supported; only {fixed[name]!r} is"
                )
            if name not in self.read | set(fixed) | self.row.inert | INERT:
                raise UserError(
                    f"{self.source}: field {name!r}={value!r} is unknown for "
                    f"{self.row.architecture} and might change the mathematics; remove it if it "
                    "does not"
                )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> the contents of config.json, without token ids."""
    family, row = config.family, ROWS[config.family]
    data: dict[str, Any] = {"architectures": [row.architecture], "model_type": family}
    data |= {theirs: getattr(config, ours) for ours, theirs in row.fields.items()}
    if family in ("gemma2", "gemma3_text"):  # transformers derives neither of them
        if config.query_scalar is None:
            data["query_pre_attn_scalar"] = config.head_dim
        if config.sliding_window is None:  # of no layer, by layer_types below
            data["sliding_window"] = config.max_position_embeddings
    is_gpt2 = family == "gpt2"
    spelled = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    spelled |= {"gelu_tanh": "gelu_new" if is_gpt2 else "gelu_pytorch_tanh"}
    data[row.fields["activation"]] = spelled[config.activation]
    if is_gpt2:
        for name in ("num_key_value_heads", "head_dim"):
            del data[name]
    else:
        data |= _rope_to_hf(config)
    if family == "qwen3_moe":
        data["num_experts"] = config.num_experts
    kinds = ["full_attention" if w is None else "sliding_attention" for w in config.windows]
    if "sliding_layers" in FAMILIES[family].free:
        data["layer_types"] = kinds
        if family not in ("gemma2", "gemma3_text"):
            data["use_sliding_window"] = config.sliding_window is not None
            data["sliding_window"] = config.sliding_window
            if family != "smollm3":
                data["max_window_layers"] = (
                    kinds.index("sliding_attention") if "sliding_attention" in kinds else len(kinds)
                )
    elif family == "qwen3_moe":
        data["use_sliding_window"] = config.sliding_window is not None
        data["sliding_window"] = config.sliding_window
    if family == "smollm3":
        turns = config.rope_layers or (True,) * config.num_layers
        data["no_rope_layers"] = [int(turn) for turn in turns]
    return data | {"torch_dtype": "float32"}


def _rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    section: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        section = config.rope_scaling.model_dump(mode="json", exclude_none=True)
        section["rope_type"] = section.pop("type")
        if "attention_scale" in section:
            section["attention_factor"] = section.pop("attention_scale")
    data: dict[str, Any] = {"rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        data["rope_scaling"] = dict(section)
    if config.rope_fraction != 1:
        data["partial_rotary_factor"] = section["partial_rotary_factor"] = config.rope_fraction
    original = section.get("original_max_position_embeddings")
    if config.family == "phi3" and original is not None:
        data["original_max_position_embeddings"] = original
    section["rope_theta"] = config.rope_theta
    if config.local_rope_theta is None:
        if config.family == "gemma3_text":  # it has one for each kind of layer, alike or not
            section = {"full_attention": section, "sliding_attention": dict(section)}
        return data | {"rope_parameters": section}
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
    return data | {
        "rope_local_base_freq": config.local_rope_theta,
        "rope_parameters": {"full_attention": section, "sliding_attention": local},
    }
