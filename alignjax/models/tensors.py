"""Names of a checkpoint's tensors <-> paths of parameters: one declarative map for each family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from alignjax.models.config import Family

Path = tuple[str, ...]
Shape = tuple[int, ...]


class Tensor(NamedTuple):
    """Where a tensor of a checkpoint lives among our parameters.

    Kernels are [out, in] there and [*inputs, *outputs] here: transposed, then reshaped.
    """

    paths: tuple[Path, ...]
    """Usually one. Several lie side by side along the tensor's outputs, as in Phi-3's qkv_proj."""
    num_inputs: int = 0
    """How many of our leading axes (after layers and experts) are inputs; 0: not a kernel."""
    is_transposed: bool = True
    """False: kernels are [in, out] there too, as in GPT-2."""

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """The tensor's shape, from those of its parameters in one layer, of one expert."""
        if not self.num_inputs:
            return ours[0] if len(ours) == 1 and not self._is_bias else (sum(map(_size, ours)),)
        inputs = _size(ours[0][: self.num_inputs])
        outputs = sum(_size(shape[self.num_inputs :]) for shape in ours)
        return (outputs, inputs) if self.is_transposed else (inputs, outputs)

    def part(self, ours: Sequence[Shape], which: int) -> tuple[slice, ...]:
        """The index of the tensor under which parameter `which` lies."""
        if len(ours) == 1:
            return ()
        sizes = [_size(shape[self.num_inputs :]) for shape in ours]
        start = sum(sizes[:which])
        outputs = slice(start, start + sizes[which])
        is_last = bool(self.num_inputs) and not self.is_transposed
        return (slice(None), outputs) if is_last else (outputs,)

    def read(self, part: Array, ours: Shape) -> Array:
        """The part of a tensor -> its parameter, of one layer and expert."""
        return (part.T if self._turns else part).reshape(ours)

    @property
    def reading(self) -> Tensor:
        """What `read` goes by: equal for tensors that are read in the same way."""
        return self._replace(paths=())

    def write(self, arrays: Sequence[Array]) -> Array:
        """The parameters of one layer and expert -> the tensor."""
        if not self.num_inputs:
            return arrays[0] if len(arrays) == 1 and not self._is_bias else jnp.concatenate(
                [array.reshape(-1) for array in arrays]
            )  # fmt: skip
        inputs = _size(arrays[0].shape[: self.num_inputs])
        kernel = jnp.concatenate([array.reshape(inputs, -1) for array in arrays], axis=1)
        return kernel.T if self.is_transposed else kernel

    @property
    def _turns(self) -> bool:
        return bool(self.num_inputs) and self.is_transposed

    @property
    def _is_bias(self) -> bool:
        return self.paths[0][-1] == "bias"


def _size(shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _path(dotted: str, *leaf: str) -> Path:
    return ("layers", *dotted.split("."), *leaf)


def _projection(
    name: str, *paths: str, num_inputs: int = 1, is_transposed: bool = True
) -> dict[str, Tensor]:
    kernels = tuple(_path(path, "kernel") for path in paths)
    return {
        f"{name}.weight": Tensor(kernels, num_inputs, is_transposed),
        f"{name}.bias": Tensor(tuple(_path(path, "bias") for path in paths)),
    }


def _norm(name: str, path: str) -> dict[str, Tensor]:
    return {
        f"{name}.weight": Tensor((_path(path, "scale"),)),
        f"{name}.bias": Tensor((_path(path, "bias"),)),
    }


def _experts(prefix: str, gate: str, up: str, down: str) -> dict[str, Tensor]:
    names = {"gate": gate, "up": up, "down": down}
    return {f"{prefix}.gate.weight": Tensor((_path("mlp.router"),), 1)} | {
        f"{prefix}.experts.{{expert}}.{theirs}.weight": Tensor((_path(f"mlp.{ours}"),), 1)
        for ours, theirs in names.items()
    }


def _decoder(layers: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "model.embed_tokens.weight": Tensor((("embedding",),)),
        **{f"model.layers.{{layer}}.{name}": tensor for name, tensor in layers.items()},
        "model.norm.weight": Tensor((("norm", "scale"),)),
        "lm_head.weight": Tensor((("unembedding",),), 1),
    }


_ATTENTION = {
    **_projection("self_attn.q_proj", "attention.query"),
    **_projection("self_attn.k_proj", "attention.key"),
    **_projection("self_attn.v_proj", "attention.value"),
    **_projection("self_attn.o_proj", "attention.out", num_inputs=2),
    **_norm("self_attn.q_norm", "attention.query_norm"),
    **_norm("self_attn.k_norm", "attention.key_norm"),
}
_MLP = {
    **_projection("mlp.gate_proj", "mlp.gate"),
    **_projection("mlp.up_proj", "mlp.up"),
    **_projection("mlp.down_proj", "mlp.down"),
}
_NORMS_BEFORE = {
    **_norm("input_layernorm", "attention_norm"),
    **_norm("post_attention_layernorm", "mlp_norm"),
}
_NORMS_AFTER = {
    **_norm("post_attention_layernorm", "attention_out_norm"),
    **_norm("post_feedforward_layernorm", "mlp_out_norm"),
}
_NORMS_AROUND = {
    **_norm("input_layernorm", "attention_norm"),
    **_norm("pre_feedforward_layernorm", "mlp_norm"),
    **_NORMS_AFTER,
}
_LLAMA = _decoder(_ATTENTION | _MLP | _NORMS_BEFORE)
_GEMMA2 = _decoder(_ATTENTION | _MLP | _NORMS_AROUND)
_PHI3 = _decoder(
    {
        **_projection("self_attn.qkv_proj", "attention.query", "attention.key", "attention.value"),
        **_projection("self_attn.o_proj", "attention.out", num_inputs=2),
        **_projection("mlp.gate_up_proj", "mlp.gate", "mlp.up"),
        **_projection("mlp.down_proj", "mlp.down"),
        **_NORMS_BEFORE,
    }
)
_GPT2_QKV = ("attention.query", "attention.key", "attention.value")
_GPT2_LAYER = {
    **_norm("ln_1", "attention_norm"),
    **_projection("attn.c_attn", *_GPT2_QKV, is_transposed=False),
    **_projection("attn.c_proj", "attention.out", num_inputs=2, is_transposed=False),
    **_norm("ln_2", "mlp_norm"),
    **_projection("mlp.c_fc", "mlp.up", is_transposed=False),
    **_projection("mlp.c_proj", "mlp.down", is_transposed=False),
}
_GPT2 = {
    "transformer.wte.weight": Tensor((("embedding",),)),
    "transformer.wpe.weight": Tensor((("positions",),)),
    **{f"transformer.h.{{layer}}.{name}": tensor for name, tensor in _GPT2_LAYER.items()},
    "transformer.ln_f.weight": Tensor((("norm", "scale"),)),
    "transformer.ln_f.bias": Tensor((("norm", "bias"),)),
    "lm_head.weight": Tensor((("unembedding",),), 1),
}

TENSORS: dict[Family, dict[str, Tensor]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _decoder(
        _ATTENTION | _NORMS_BEFORE | _experts("mlp", "gate_proj", "up_proj", "down_proj")
    ),
    "mixtral": _decoder(
        _ATTENTION | _NORMS_BEFORE | _experts("block_sparse_moe", "w1", "w3", "w2")
    ),
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "smollm3": _LLAMA,
    "phi3": _PHI3,
    "olmo2": _decoder(_ATTENTION | _MLP | _NORMS_AFTER),
    "gpt2": _GPT2,
}
"""Every tensor that a family may have; which of them a model has is for its parameters to say."""

UNREAD = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of names that old files hold, of what is computed here: angles, causal masks."""


def full_name(name: str) -> str:
    """GPT-2's published files leave the prefix of the trunk out."""
    return f"transformer.{name}" if name.startswith(("wte.", "wpe.", "h.", "ln_f.")) else name
