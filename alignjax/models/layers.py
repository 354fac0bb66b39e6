"""Arrays -> arrays: RMSNorm, projections, embedding, the gated MLP, as Flax NNX modules.

Parameters are float32 and carry the names of their axes (`logical_axes`), which `sharding.rules`
maps to mesh axes. Matmuls run in the compute dtype; norms are float32 inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from alignjax.core.precision import matmul_precision
from alignjax.models.config import ModelConfig


def _normal(rngs: nnx.Rngs, sizes: Mapping[str, int], std: float) -> nnx.Param:
    value = std * jax.random.normal(rngs.params(), tuple(sizes.values()), jnp.float32)
    return nnx.Param(value, logical_axes=tuple(sizes))


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (arXiv:1910.07467 eq. 4)."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size, jnp.float32), logical_axes=("norm",))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """[..., size] any float dtype -> the same; float32 inside."""
        y = x.astype(jnp.float32)
        root = jnp.sqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        # Not rsqrt, which CPUs approximate in one way for few rows and in another for many: the
        # sampler and the trainer would differ. The barrier keeps the compiler from making it one.
        y = y * (1 / jax.lax.optimization_barrier(root))
        return (y * self.scale[...]).astype(x.dtype)


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
        self.kernel = _normal(rngs, {**inputs, **outputs}, std)
        self.num_inputs = len(inputs)
        zeros = jnp.zeros(tuple(outputs.values()), jnp.float32)
        self.bias = nnx.Param(zeros, logical_axes=tuple(outputs)) if bias else None

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].astype(x.dtype)
        rows, outputs = x.shape[: x.ndim - self.num_inputs], kernel.shape[self.num_inputs :]
        # As one product of matrices: the gradients of a wider contraction cost a transpose each.
        y = jnp.dot(
            x.reshape(math.prod(rows), -1),
            kernel.reshape(-1, math.prod(outputs)),
            precision=matmul_precision(x.dtype),
        ).reshape(*rows, *outputs)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)): SwiGLU (arXiv:2002.05202 eq. 6)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width, inner = {"embed": config.hidden_size}, {"mlp": config.intermediate_size}
        kwargs = {"bias": config.mlp_bias, "std": config.initializer_range, "rngs": rngs}
        self.gate = Linear(width, inner, **kwargs)
        self.up = Linear(width, inner, **kwargs)
        self.down = Linear(inner, width, **kwargs)

    def __call__(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Ends(nnx.Module):
    """Both ends of the decoder: tokens -> embeddings, and the norm and matrix before the logits."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width, words = {"embed": config.hidden_size}, {"vocab": config.vocab_size}
        self.embedding = _normal(rngs, words | width, config.initializer_range)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.unembedding = (
            None
            if config.tie_embeddings
            else _normal(rngs, width | words, config.initializer_range)
        )

    def embed(self, tokens: Array, dtype: jnp.dtype) -> Array:
        """[B, T] int32 -> [B, T, D]; an id that there is not, as padding may hold, is the nearest.

        By default it would be nan, which the attention weight 0 does not make 0.
        """
        return jnp.take(self.embedding[...], tokens, axis=0, mode="clip").astype(dtype)

    def matrix(self) -> Array:
        """[D, V] float32."""
        return self.embedding[...].T if self.unembedding is None else self.unembedding[...]


def rope_angles(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines of position * theta^(-2i / head_dim) (arXiv:2104.09864 eq. 15).

    Args:
      positions: [B, T] int32.
    Returns:
      Two arrays [B, T, head_dim / 2], float32.
    """
    frequencies = [math.pow(theta, -2 * i / head_dim) for i in range(head_dim // 2)]
    angles = positions[..., None].astype(jnp.float32) * jnp.array(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns the pairs (x[i], x[i + head_dim / 2]), as Hugging Face checkpoints pair them.

    Args:
      x: [B, T, H, head_dim]; cos, sin: [B, T, head_dim / 2] float32.
    Returns:
      The same shape and dtype as x; float32 inside.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
