"""A handful of numbers -> the shape and mathematics of one decoder."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from alignjax.core.config import Config

Family = Literal["llama", "qwen3"]


class ModelConfig(Config):
    """A decoder-only transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    Only `vocab_size` must be given. Hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
      family: the Hugging Face architecture that this model is written as.
      intermediate_size: width of the MLP; default 8/3 of `hidden_size`, up to a multiple of 64.
      num_kv_heads: heads of keys and values; divides `num_heads`; default `num_heads`.
      head_dim: even; default `hidden_size` / `num_heads`.
      rope_theta: base of the rotary embedding (arXiv:2104.09864 sec. 3.2.2), > 1.
      norm_eps: added to the mean square in every RMSNorm.
      qk_norm: RMSNorm on each head of queries and keys, before RoPE; default: as the family has it.
      attention_bias: biases on the query, key, value and output projections.
      tie_embeddings: the unembedding is the transposed embedding.
      max_position_embeddings: the longest context promised; nothing here depends on it.
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
    rope_theta: float = Field(default=10_000.0, gt=1)
    norm_eps: float = Field(default=1e-6, gt=0)
    qk_norm: bool
    attention_bias: bool = False
    mlp_bias: bool = False
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
        width, heads = values.get("hidden_size", 128), values.get("num_heads", 4)
        values.setdefault("num_kv_heads", heads)
        values.setdefault("qk_norm", values.get("family", "llama") == "qwen3")
        if isinstance(width, int) and isinstance(heads, int) and heads > 0:
            values.setdefault("intermediate_size", -(-width * 8 // (3 * 64)) * 64)
            if width % heads == 0:
                values.setdefault("head_dim", width // heads)
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; RoPE turns pairs of dimensions")
        if self.qk_norm != (self.family == "qwen3"):
            raise ValueError(
                f"qk_norm={self.qk_norm} cannot be written as family {self.family!r}; "
                "QK-norm is what family 'qwen3' adds to 'llama'"
            )
        if self.family == "qwen3" and self.mlp_bias:
            raise ValueError("mlp_bias=True cannot be written as family 'qwen3'; use 'llama'")
        if self.family == "llama" and self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}, "
                "as family 'llama' demands; 'qwen3' does not"
            )
        return self

    @classmethod
    def tiny(cls, vocab_size: int, **overrides: Any) -> Self:
        """Width 128, 2 layers, 4 heads, RoPE base 100: 0.4M parameters for short toy sequences."""
        preset: dict[str, Any] = {
            "vocab_size": vocab_size,
            "rope_theta": 100.0,
            "max_position_embeddings": 512,
        }
        return cls(**(preset | overrides))
