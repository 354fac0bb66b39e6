"""Arrays -> arrays: norms, projections, embedding and the MLP, as Flax NNX modules.

Parameters are born in float32 and carry the names of their axes (`logical_axes`), which
`sharding.rules` maps to mesh axes. Matmuls run in the compute dtype; norms are float32 inside.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from alignjax.core.precision import matmul_precision
from alignjax.models.config import ModelConfig
from alignjax.sharding import constrained

if TYPE_CHECKING:
    from alignjax.models.lora import Adapter
    from alignjax.models.quantize import Int8Kernel, Nf4Kernel


def normal_param(rngs: nnx.Rngs, sizes: Mapping[str, int], std: float) -> nnx.Param:
    value = std * jax.random.normal(rngs.params(), tuple(sizes.values()), jnp.float32)
    return nnx.Param(value, logical_axes=tuple(sizes))


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + scale) over the last axis (arXiv:1910.07467 eq. 4).

    The offset is 0, or 1 in the Gemma family, where scale starts at 0.
    """

    def __init__(self, size: int, eps: float, *, offset: float = 0.0):
        self.scale = nnx.Param(jnp.full(size, 1 - offset, jnp.float32), logical_axes=("norm",))
        self.eps, self.offset = eps, offset

    def __call__(self, x: Array) -> Array:
        """[..., size] any float dtype -> the same; float32 inside."""
        y = x.astype(jnp.float32)
        y = y * _inverse_root(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        return (y * (scale + self.offset if self.offset else scale)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis (arXiv:1607.06450 eq. 4)."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size, jnp.float32), logical_axes=("norm",))
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32), logical_axes=("norm",))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """[..., size] any float dtype -> the same; float32 inside."""
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, -1, keepdims=True)
        y = y * _inverse_root(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


def _inverse_root(x: Array) -> Array:
    """Not rsqrt, which CPUs approximate in one way for few rows and in another for many: the
    sampler and the trainer would differ. The barrier keeps the compiler from making it one."""
    return 1 / jax.lax.optimization_barrier(jnp.sqrt(x))


Norm = RMSNorm | LayerNorm


def make_norm(config: ModelConfig, size: int) -> Norm:
    """The norm of a config, over `size` dimensions."""
    if config.norm == "layer":
        return LayerNorm(size, config.norm_eps)
    return RMSNorm(size, config.norm_eps, offset=1.0 if config.norm == "rms_plus_one" else 0.0)


class Linear(nnx.Module):
    """Contracts the named input axes with the kernel: [..., *inputs] -> [..., *outputs]."""

    def __init__(
        self,
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
        *,
        bias: bool,
        std: float,
        rngs: nnx.Rngs,
    ):
        self.axes = tuple(inputs), tuple(outputs)
        kernel = normal_param(rngs, {**inputs, **outputs}, std)
        self.kernel: nnx.Param | Int8Kernel | Nf4Kernel = kernel
        self.lora: Adapter | None = nnx.data(None)
        zeros = jnp.zeros(tuple(outputs.values()), jnp.float32)
        self.bias = nnx.Param(zeros, logical_axes=tuple(outputs)) if bias else None

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].astype(x.dtype)
        num_inputs = len(self.axes[0])
        rows, outputs = x.shape[: x.ndim - num_inputs], kernel.shape[num_inputs:]
        # As one product of matrices: the gradients of a wider contraction cost a transpose each.
        x, kernel = x.reshape(math.prod(rows), -1), kernel.reshape(-1, math.prod(outputs))
        y = jnp.dot(x, kernel, precision=matmul_precision(x.dtype))
        if self.lora is not None:
            y = self.lora(x, kernel, y)
        y = y.reshape(*rows, *outputs)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)), as SwiGLU (arXiv:2002.05202 eq. 6); without gate
    down(act(up(x)))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width, inner = {"embed": config.hidden_size}, {"mlp": config.intermediate_size}
        kwargs = {"bias": config.mlp_bias, "std": config.initializer_range, "rngs": rngs}
        self.activation = ACTIVATIONS[config.activation]
        self.gate = Linear(width, inner, **kwargs) if config.gated_mlp else None
        self.up = Linear(width, inner, **kwargs)
        self.down = Linear(inner, width, **kwargs)

    def __call__(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""
        up = self.up(x)
        inner = self.activation(up) if self.gate is None else self.activation(self.gate(x)) * up
        return self.down(inner)


class Ends(nnx.Module):
    """Both ends of the decoder: tokens -> embeddings, and the norm and matrix before the logits."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width, words = {"embed": config.hidden_size}, {"vocab": config.vocab_size}
        self.embedding = normal_param(rngs, words | width, config.initializer_range)
        self.norm = make_norm(config, config.hidden_size)
        self.unembedding = (
            None
            if config.tie_embeddings
            else normal_param(rngs, width | words, config.initializer_range)
        )
        places = {"positions": config.max_position_embeddings}
        self.positions = (
            normal_param(rngs, places | width, config.initializer_range)
            if config.positions == "learned"
            else None
        )
        self.factor = math.sqrt(config.hidden_size) if config.scale_embeddings else None

    def embed(
        self, tokens: Array, positions: Array, dtype: jnp.dtype, mesh: Mesh | None = None
    ) -> Array:
        """[B, T] int32 -> [B, T, D]; an id that there is not, as padding may hold, is the nearest.

        By default it would be nan, which the attention weight 0 does not make 0.
        """
        # Its width is gathered, for each device looks up the tokens of its own rows.
        table = constrained(self.embedding[...], mesh, "tensor", None)
        x = jnp.take(table, tokens, axis=0, mode="clip")
        if self.positions is not None:
            x = x + jnp.take(self.positions[...], positions, axis=0, mode="clip")
        x = x.astype(dtype)
        # The factor is rounded first, as transformers has it.
        return x if self.factor is None else x * jnp.asarray(self.factor, dtype)

    def matrix(self) -> Array:
        """[D, V] float32."""
        return self.embedding[...].T if self.unembedding is None else self.unembedding[...]
