"""The shape of a model -> the floating-point operations that its mathematics takes.

What a program does beyond them, such as computing layers twice (remat), is no work of the model:
utilisation is these over what the devices could do in the time (arXiv:2204.02311 app. B).
"""

from __future__ import annotations

from alignjax.models import ModelConfig

BACKWARD, BACKWARD_OF_ADAPTERS = 2.0, 1.0
"""Forward passes that a backward pass takes: one for the gradients of inputs and one for those of
weights, which under LoRA are few."""


def forward_flops(config: ModelConfig, row_len: int, *, unembed: bool = True) -> float:
    """Of one token of a row that one text of `row_len` tokens fills; two for each multiplication
    and addition.

    Products with kernels, and attention to half of the row, or to the window, on average.
    """
    heads, width = config.num_heads * config.head_dim, config.hidden_size
    kv = config.num_kv_heads * config.head_dim
    matrices = 3 if config.gated_mlp else 2
    experts = config.experts_per_token if config.num_experts else 1
    mlp = matrices * width * config.intermediate_size * experts + width * config.num_experts
    kernels = 2 * config.num_layers * (width * (2 * heads + 2 * kv) + mlp)
    seen = sum(min(row_len / 2, window or row_len) for window in config.windows)
    head = 2 * width * config.vocab_size if unembed else 0
    return float(kernels + 4 * heads * seen + head)


def train_flops(
    config: ModelConfig,
    row_len: int,
    num_tokens: float,
    *,
    unembed: bool = True,
    lora: bool = False,
) -> float:
    """Forward and backward, of so many tokens."""
    passes = 1 + (BACKWARD_OF_ADAPTERS if lora else BACKWARD)
    return passes * num_tokens * forward_flops(config, row_len, unembed=unembed)
