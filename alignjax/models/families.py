"""config.json <-> ModelConfig, and names of tensors <-> paths of parameters.

A family is a row: the names under which transformers knows it. The tables below are all that
differs between Hugging Face's view of a decoder and ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from alignjax.core.errors import UserError
from alignjax.models.config import Family, ModelConfig


class Tensor(NamedTuple):
    """Where a tensor of a checkpoint lives among our parameters.

    Kernels are [out, in] there and [*inputs, *outputs] here: transposed, then reshaped.
    """

    path: tuple[str, ...]
    num_inputs: int = 0
    """How many of our leading axes (after that of the layers) are inputs; 0: not transposed."""

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The checkpoint's shape of the parameter of one layer that has shape `ours`."""
        inputs, outputs = ours[: self.num_inputs], ours[self.num_inputs :]
        if not self.num_inputs:
            return ours if self.path[-1] != "bias" else (int(np.prod(ours)),)
        return int(np.prod(outputs)), int(np.prod(inputs))

    def read(self, tensor: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
        return (tensor.T if self.num_inputs else tensor).reshape(ours)

    def write(self, array: np.ndarray) -> np.ndarray:
        theirs = self.shape(array.shape)
        return array.reshape(theirs[::-1]).T if self.num_inputs else array.reshape(theirs)


def _projection(name: str, path: str, num_inputs: int = 1) -> dict[str, Tensor]:
    parts = ("layers", *path.split("."))
    return {
        f"model.layers.{{layer}}.{name}.weight": Tensor((*parts, "kernel"), num_inputs),
        f"model.layers.{{layer}}.{name}.bias": Tensor((*parts, "bias")),
    }


def _norm(name: str, path: str) -> dict[str, Tensor]:
    return {f"model.layers.{{layer}}.{name}.weight": Tensor(("layers", *path.split("."), "scale"))}


TENSORS: dict[str, Tensor] = {
    "model.embed_tokens.weight": Tensor(("embedding",)),
    "model.norm.weight": Tensor(("norm", "scale")),
    "lm_head.weight": Tensor(("unembedding",), 1),
    **_norm("input_layernorm", "attention_norm"),
    **_projection("self_attn.q_proj", "attention.query"),
    **_projection("self_attn.k_proj", "attention.key"),
    **_projection("self_attn.v_proj", "attention.value"),
    **_projection("self_attn.o_proj", "attention.out", num_inputs=2),
    **_norm("self_attn.q_norm", "attention.query_norm"),
    **_norm("self_attn.k_norm", "attention.key_norm"),
    **_norm("post_attention_layernorm", "mlp_norm"),
    **_projection("mlp.gate_proj", "mlp.gate"),
    **_projection("mlp.up_proj", "mlp.up"),
    **_projection("mlp.down_proj", "mlp.down"),
}
"""Every tensor of every family; which of them a model has is for its parameters to say."""


@dataclass(frozen=True)
class Row:
    """What transformers calls a family, and what its config.json may say."""

    architecture: str
    optional: Mapping[str, Any]
    """Fields of ours that config.json may leave out, with what their absence means there; None:
    derived by `ModelConfig`."""
    fixed: Mapping[str, Any]
    """Fields of theirs that change the mathematics, each with the one value that is supported."""


_FIXED = {
    "hidden_act": "silu",
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "quantization_config": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "is_decoder": False,
}
_OPTIONAL = {"num_kv_heads": None, "attention_bias": False, "tie_embeddings": False}

FAMILIES: dict[Family, Row] = {
    "llama": Row(
        "LlamaForCausalLM",
        optional=_OPTIONAL | {"head_dim": None, "mlp_bias": False},
        fixed=_FIXED | {"pretraining_tp": 1},
    ),
    "qwen3": Row(
        "Qwen3ForCausalLM",
        optional=_OPTIONAL,
        fixed=_FIXED | {"use_sliding_window": False, "mlp_bias": False},
    ),
}

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "tie_embeddings": "tie_word_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "initializer_range",
}
"""Ours -> theirs. The rope base has two spellings and is read apart."""

# Its kind has two names; any other kind, or any other field, changes the angles.
_DEFAULT_ROPE = (("rope_type", "default"), ("type", "default"), ("partial_rotary_factor", 1))

INERT = {
    "_name_or_path", "architectures", "model_type", "transformers_version", "tokenizer_class",
    "dtype", "torch_dtype", "torchscript", "use_bfloat16", "use_cache", "auto_map", "prefix",
    "_attn_implementation_autoset", "chunk_size_feed_forward", "return_dict", "problem_type",
    "output_attentions", "output_hidden_states", "finetuning_task", "task_specific_params",
    "id2label", "label2id", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id",
    # Of no effect without use_sliding_window, which Llama does not have.
    "sliding_window", "max_window_layers",
}  # fmt: skip
"""Bookkeeping, and switches of transformers that leave the logits alone."""


def from_hf(source: str, data: Mapping[str, Any]) -> ModelConfig:
    """The contents of a config.json -> ModelConfig.

    Args:
      source: the file, for messages.
    Raises:
      UserError: on anything missing, and on anything that would change the mathematics in a way
        that is not implemented here.
    """
    family, row = _family(source, data)
    values: dict[str, Any] = {"family": family, "rope_theta": _rope_theta(source, data)}
    known = {*INERT, *row.fixed, "rope_theta", "rope_parameters", "rope_scaling", "layer_types"}
    for ours, theirs in FIELDS.items():
        if ours == "mlp_bias" and "mlp_bias" in row.fixed:
            continue
        known.add(theirs)
        if data.get(theirs) is not None:
            values[ours] = data[theirs]
        elif ours not in row.optional:
            raise UserError(f"{source}: field {theirs!r} is missing; a {family} model needs it")
        elif row.optional[ours] is not None:
            values[ours] = row.optional[ours]
    for name, value in data.items():
        if name in row.fixed and value is not None and value != row.fixed[name]:
            raise UserError(
                f"{source}: {name}={value!r} is not supported; only {row.fixed[name]!r} is"
            )
        if name not in known:
            raise UserError(
                f"{source}: field {name!r}={value!r} is unknown for {row.architecture} and might "
                "change the mathematics; remove it if it does not"
            )
    try:
        config = ModelConfig(**values)
    except ValidationError as error:
        problems = "; ".join(
            f"{FIELDS.get(str(e['loc'][0]), e['loc'][0]) if e['loc'] else 'model'}: {e['msg']}"
            for e in error.errors()
        )
        raise UserError(f"{source}: {problems}") from error
    layer_types = data.get("layer_types")
    if layer_types not in (None, ["full_attention"] * config.num_layers):
        raise UserError(
            f"{source}: layer_types={layer_types!r} is not supported; only 'full_attention', once "
            f"for each of num_hidden_layers={config.num_layers}"
        )
    return config


def _family(source: str, data: Mapping[str, Any]) -> tuple[Family, Row]:
    architectures, model_type = data.get("architectures") or [], data.get("model_type")
    for family, row in FAMILIES.items():
        if architectures == [row.architecture]:
            if model_type not in (None, family):
                raise UserError(
                    f"{source}: model_type={model_type!r} contradicts architectures="
                    f"{architectures!r}, which is {family!r}"
                )
            return family, row
    raise UserError(
        f"{source}: architectures={architectures!r} is not supported; expected one of "
        + ", ".join(row.architecture for row in FAMILIES.values())
    )


def _rope_theta(source: str, data: Mapping[str, Any]) -> float:
    """Reads `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    bases = {"rope_theta": data.get("rope_theta")}
    for field in ("rope_scaling", "rope_parameters"):
        section = {} if data.get(field) is None else data[field]
        if not isinstance(section, dict):
            raise UserError(f"{source}: {field}={section!r}: expected an object")
        for name, value in section.items():
            if (field, name) == ("rope_parameters", "rope_theta"):
                bases["rope_parameters.rope_theta"] = value
            elif (name, value) not in _DEFAULT_ROPE:
                raise UserError(
                    f"{source}: {field}.{name}={value!r} is not supported; only rope_type "
                    "'default' with a rope_theta is"
                )
    bases = {name: value for name, value in bases.items() if value is not None}
    for name, value in bases.items():
        if type(value) not in (int, float) or not 1 < value < math.inf:
            raise UserError(f"{source}: {name}={value!r}: expected a number above 1")
    if len(set(bases.values())) != 1:
        raise UserError(
            f"{source}: expected one base of the rotary embedding in rope_theta or "
            f"rope_parameters.rope_theta, found {sorted(bases.values()) or 'none'}"
            + ("" if bases else "; transformers would assume 10000: add it if that is right")
        )
    return float(next(iter(bases.values())))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> the contents of config.json, without token ids."""
    row = FAMILIES[config.family]
    values = {
        theirs: getattr(config, ours) for ours, theirs in FIELDS.items() if theirs not in row.fixed
    }
    return {
        "architectures": [row.architecture],
        "model_type": config.family,
        "hidden_act": "silu",
        **values,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "torch_dtype": "float32",
    }
