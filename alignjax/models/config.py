"""A handful of numbers -> the shape and mathematics of one decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from alignjax.core.config import Config
from alignjax.models.rope import Scaling

Family = Literal[
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma", "gemma2", "gemma3_text",
    "smollm3", "phi3", "olmo2", "gpt2",
]  # fmt: skip

_LLAMA: dict[str, Any] = {
    "norm": "rms", "norm_position": "before", "qk_norm": None, "attention_bias": False,
    "attention_out_bias": False, "mlp_bias": False, "gated_mlp": True, "positions": "rope",
    "rope_fraction": 1.0, "rope_scaling": None, "rope_layers": None, "local_rope_theta": None,
    "sliding_window": None, "sliding_layers": None, "query_scalar": None,
    "attention_soft_cap": None, "logit_soft_cap": None, "scale_embeddings": False,
    "num_experts": 0,
}  # fmt: skip
"""What every family does as Llama does, unless its line says otherwise."""


class Differences(NamedTuple):
    """What a family computes otherwise than Llama, and what it leaves to each model."""

    fixed: Mapping[str, Any] = {}
    free: tuple[str, ...] = ()


_GEMMA = {"norm": "rms_plus_one", "scale_embeddings": True}
_SLIDING = ("sliding_window", "sliding_layers")
_SOFT_CAPS = ("attention_soft_cap", "logit_soft_cap", "query_scalar")
_BIASES = ("attention_bias", "attention_out_bias")

FAMILIES: dict[Family, Differences] = {
    "llama": Differences(free=(*_BIASES, "mlp_bias", "rope_scaling")),
    "mistral": Differences(free=("rope_scaling", "sliding_window")),
    "qwen2": Differences({"attention_bias": True}, free=("rope_scaling", *_SLIDING)),
    "qwen3": Differences({"qk_norm": "head"}, free=(*_BIASES, "rope_scaling", *_SLIDING)),
    "qwen3_moe": Differences(
        {"qk_norm": "head"}, free=(*_BIASES, "rope_scaling", "sliding_window", "num_experts")
    ),
    "mixtral": Differences(free=("rope_scaling", "sliding_window", "num_experts")),
    "gemma": Differences(_GEMMA, free=(*_BIASES, "rope_scaling")),
    "gemma2": Differences(
        _GEMMA | {"norm_position": "around"},
        free=(*_BIASES, "rope_scaling", *_SLIDING, *_SOFT_CAPS),
    ),
    "gemma3_text": Differences(
        _GEMMA | {"norm_position": "around", "qk_norm": "head"},
        free=(*_BIASES, "rope_scaling", "local_rope_theta", *_SLIDING, *_SOFT_CAPS),
    ),
    "smollm3": Differences(free=(*_BIASES, "mlp_bias", "rope_scaling", "rope_layers", *_SLIDING)),
    "phi3": Differences(free=("rope_scaling", "rope_fraction", "sliding_window")),
    "olmo2": Differences(
        {"norm_position": "after", "qk_norm": "whole"}, free=(*_BIASES, "rope_scaling")
    ),
    "gpt2": Differences(
        {"norm": "layer", "positions": "learned", "gated_mlp": False, "mlp_bias": True,
         "attention_bias": True, "attention_out_bias": True},
    ),
}  # fmt: skip
"""The mathematics of each family; `families` has the names under which transformers knows it."""

_MUST_DIVIDE = ("llama", "gemma2", "gemma3_text", "gpt2")
_MIXED = ("qwen3_moe", "mixtral")


class ModelConfig(Config):
    """A decoder-only transformer.

    Only `vocab_size` must be given: what is not follows from the family, and is Llama's where that
    does not say. Hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
      family: the Hugging Face architecture that this model is written as.
      intermediate_size: width of the MLP, or of each expert; default 8/3 of `hidden_size`, up to a
        multiple of 64, or 4 times it without a gate.
      num_kv_heads: heads of keys and values; divides `num_heads`; default `num_heads`.
      head_dim: even; default `hidden_size` / `num_heads`.
      norm: RMSNorm (arXiv:1910.07467), the same with 1 + scale as factor (Gemma), or LayerNorm.
      norm_position: normalise what goes into attention and MLP, what comes out, or both.
      qk_norm: RMSNorm of queries and keys before RoPE, of each head or of all heads as one vector.
      attention_bias: biases on the query, key and value projections; `attention_out_bias` on the
        output's.
      gated_mlp: down(act(gate(x)) * up(x)) (arXiv:2002.05202); else down(act(up(x))).
      positions: rotated into queries and keys (arXiv:2104.09864), or learned and added to the
        embedding.
      rope_theta: base of the rotary embedding, > 1; `local_rope_theta`: that of the layers with a
        sliding window, which are not scaled.
      rope_fraction: share of the dimensions of a head that is rotated, the first ones.
      rope_scaling: how a longer context was reached; see `rope`.
      rope_layers: which layers have a rotary embedding; None: all.
      sliding_window: tokens that a query sees, itself included; None: all before it.
      sliding_layers: which layers have that window; None: all.
      query_scalar: scores are divided by its root; default `head_dim`.
      attention_soft_cap, logit_soft_cap: cap * tanh(x / cap) on scores and logits (Gemma 2).
      scale_embeddings: embeddings are multiplied by the root of `hidden_size`.
      num_experts: of each MLP, of which each token meets `experts_per_token`; 0: no experts.
      normalize_experts: the weights of the experts chosen for a token add up to 1.
      router_aux_coef: weight of the loss that balances the experts, in supervised fine-tuning.
      tie_embeddings: the unembedding is the transposed embedding.
      max_position_embeddings: the longest context promised; with learned positions, their number.
      initializer_range: standard deviation of the initial embedding and kernels.
    """

    family: Family = "llama"
    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(default=128, ge=1)
    intermediate_size: int = Field(ge=1)
    num_layers: int = Field(default=2, ge=1)
    num_heads: int = Field(default=4, ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    norm: Literal["rms", "rms_plus_one", "layer"]
    norm_position: Literal["before", "after", "around"]
    norm_eps: float = Field(default=1e-6, gt=0)
    qk_norm: Literal["head", "whole"] | None
    attention_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    gated_mlp: bool
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    positions: Literal["rope", "learned"]
    rope_theta: float = Field(default=10_000.0, gt=1)
    local_rope_theta: float | None = Field(gt=1)
    rope_fraction: float = Field(gt=0, le=1)
    rope_scaling: Scaling | None
    rope_layers: tuple[bool, ...] | None
    sliding_window: int | None = Field(ge=1)
    sliding_layers: tuple[bool, ...] | None
    query_scalar: int | float | None = Field(gt=0)
    attention_soft_cap: float | None = Field(gt=0)
    logit_soft_cap: float | None = Field(gt=0)
    scale_embeddings: bool
    num_experts: int = Field(ge=0)
    experts_per_token: int = Field(default=2, ge=1)
    normalize_experts: bool = True
    router_aux_coef: float = Field(default=0.001, ge=0)
    tie_embeddings: bool = True
    max_position_embeddings: int = Field(default=2048, ge=1)
    initializer_range: float = Field(default=0.02, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, values: Any) -> Any:
        """Fills in what follows from the other fields."""
        if not isinstance(values, dict):
            return values
        values = {key: value for key, value in values.items() if value is not None}
        family = values.get("family", "llama")
        if family not in FAMILIES:
            return values
        width, heads = values.get("hidden_size", 128), values.get("num_heads", 4)
        defaults = _LLAMA | dict(FAMILIES[family].fixed) | {"num_kv_heads": heads}
        if isinstance(width, int) and isinstance(heads, int) and heads > 0:
            is_gated = defaults["gated_mlp"]  # three matrices, where there are two without
            defaults["intermediate_size"] = -(-width * 8 // 192) * 64 if is_gated else 4 * width
            if width % heads == 0:
                defaults["head_dim"] = width // heads
        if family in _MIXED:
            defaults["num_experts"] = 8
        if "attention_out_bias" in FAMILIES[family].free:
            defaults["attention_out_bias"] = values.get("attention_bias", False)
        return defaults | values

    @model_validator(mode="after")
    def _check(self) -> Self:
        family = FAMILIES[self.family]
        for name, value in (_LLAMA | dict(family.fixed)).items():
            if name not in family.free and getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} cannot be written as family "
                    f"{self.family!r}, where it is {value!r}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; RoPE turns pairs of dimensions")
        if self.family in _MUST_DIVIDE and self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}, "
                f"as family {self.family!r} demands; 'qwen3' does not"
            )
        if "attention_out_bias" in family.free and self.attention_out_bias != self.attention_bias:
            raise ValueError(
                f"attention_out_bias={self.attention_out_bias} differs from attention_bias="
                f"{self.attention_bias}; family {self.family!r} has one switch for both"
            )
        if self.family == "gpt2" and (self.num_kv_heads, self.head_dim * self.num_heads) != (
            self.num_heads, self.hidden_size,
        ):  # fmt: skip
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}: family 'gpt2' has as "
                "many heads of keys as of queries, and together they are as wide as hidden_size"
            )
        if self.family == "gemma" and self.activation == "gelu":
            raise ValueError(
                "activation='gelu' cannot be written as family 'gemma', where that name stands for "
                "'gelu_tanh'"
            )
        if self.family in _MIXED and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} of num_experts={self.num_experts}: "
                "expected from 1 to all of them"
            )
        for name in ("sliding_layers", "rope_layers"):
            layers = getattr(self, name)
            if layers is not None and len(layers) != self.num_layers:
                raise ValueError(
                    f"{name} has {len(layers)} entries; expected one for each of num_layers="
                    f"{self.num_layers}"
                )
        if self.sliding_layers is not None and self.sliding_window is None:
            raise ValueError("sliding_layers says where sliding_window acts; give both")
        return self

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer."""
        slides = self.sliding_layers or (True,) * self.num_layers
        return tuple(self.sliding_window if slide else None for slide in slides)

    @property
    def rope_kinds(self) -> tuple[Literal["global", "local", "none"], ...]:
        """The rotary embedding of each layer."""
        has_local = self.local_rope_theta is not None
        turns = self.rope_layers or (True,) * self.num_layers
        return tuple(
            "none" if not turn else "local" if has_local and window is not None else "global"
            for turn, window in zip(turns, self.windows, strict=True)
        )

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_dim * self.rope_fraction)

    @classmethod
    def tiny(cls, vocab_size: int, **overrides: Any) -> Self:
        """Width 128, 2 layers, 4 heads, RoPE base 100: 0.4M parameters for short toy sequences."""
        preset: dict[str, Any] = {
            "vocab_size": vocab_size,
            "rope_theta": 100.0,
            "max_position_embeddings": 512,
        }
        return cls(**(preset | overrides))
