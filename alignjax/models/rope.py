"""Positions -> the angles by which queries and keys are turned (RoPE, arXiv:2104.09864).

A context longer than that of pretraining is reached by lowering frequencies. Each way of doing so
is a class with two methods: the frequencies, and a factor on cosines and sines.
"""

from __future__ import annotations

import abc
import math
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from pydantic import Field

from alignjax.core.config import Config


def plain_frequencies(theta: float | Array, dim: int) -> Array:
    """theta^(-2i / dim) for i < dim / 2 (arXiv:2104.09864 eq. 15), [dim / 2] float32."""
    return theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def _exact_frequencies(theta: float, dim: int) -> np.ndarray:
    """The same in float64, on the host."""
    return theta ** (-np.arange(0, dim, 2) / dim)


class _Scaling(Config, abc.ABC):
    """Lower frequencies for a longer context."""

    @abc.abstractmethod
    def frequencies(self, theta: float, dim: int, context: int, length: Array) -> Array:
        """[dim / 2] float32, radians per position.

        Args:
          theta: the base.
          dim: rotated dimensions of a head.
          context: the model's `max_position_embeddings`.
          length: [] int32; the longest sequence of the call.
        """

    def attention_factor(self, context: int) -> float:
        """Factor on cosines and sines."""
        return 1.0


class LinearScaling(_Scaling):
    """Position interpolation (arXiv:2306.15595): all frequencies divided by `factor`."""

    type: Literal["linear"]
    factor: float = Field(ge=1)

    def frequencies(self, theta: float, dim: int, context: int, length: Array) -> Array:
        return jnp.asarray(_exact_frequencies(theta, dim) / self.factor, jnp.float32)


class DynamicScaling(_Scaling):
    """NTK-aware scaling of the base, from the length of the longest sequence at hand
    (arXiv:2309.00071 sec. 3.3): nothing changes up to the context of pretraining.

    So the result depends on what else is in the batch, and while a text grows its earlier keys keep
    older angles: that is how transformers computes it.
    """

    type: Literal["dynamic"]
    factor: float = Field(ge=1)

    def frequencies(self, theta: float, dim: int, context: int, length: Array) -> Array:
        ratio = jnp.maximum(length, context).astype(jnp.float32) / context
        stretch = self.factor * ratio - (self.factor - 1)
        return plain_frequencies(theta * stretch ** (dim / (dim - 2)), dim)


class Llama3Scaling(_Scaling):
    """Llama 3.1's: low frequencies divided by `factor`, high ones kept, those between blended."""

    type: Literal["llama3"]
    factor: float = Field(ge=1)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(ge=1)

    def frequencies(self, theta: float, dim: int, context: int, length: Array) -> Array:
        plain = _exact_frequencies(theta, dim)
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return jnp.asarray(plain * (kept + (1 - kept) / self.factor), jnp.float32)


class YarnScaling(_Scaling):
    """YaRN (arXiv:2309.00071 eq. 14-18, 22): blended by how often a pair turns in the context of
    pretraining, between `beta_slow` and `beta_fast` turns."""

    type: Literal["yarn"]
    factor: float = Field(ge=1)
    original_max_position_embeddings: int = Field(ge=1)
    beta_fast: float = Field(default=32, gt=0)
    beta_slow: float = Field(default=1, gt=0)
    attention_scale: float | None = Field(default=None, gt=0)
    """Factor on cosines and sines; default 0.1 log(factor) + 1."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """Round the bounds of the blend to whole pairs, outwards."""

    def frequencies(self, theta: float, dim: int, context: int, length: Array) -> Array:
        plain = _exact_frequencies(theta, dim)

        def pair_with(turns: float) -> float:
            longest = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return dim * math.log(longest) / (2 * math.log(theta))

        low, high = pair_with(self.beta_fast), pair_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high = high + 0.001 if low == high else high
        slow = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
        return jnp.asarray(plain * ((1 - slow) + slow / self.factor), jnp.float32)

    def attention_factor(self, context: int) -> float:
        def growth(scale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1

        if self.attention_scale is not None:
            return self.attention_scale
        if self.mscale and self.mscale_all_dim:
            return growth(self.mscale) / growth(self.mscale_all_dim)
        return growth(1)


class LongScaling(_Scaling):
    """LongRoPE (arXiv:2402.13753), as Phi-3 has it: each frequency is divided by a factor of its
    own, from one list up to the context of pretraining, and from another beyond."""

    type: Literal["longrope"]
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int = Field(ge=1)
    factor: float | None = Field(default=None, gt=0)
    attention_scale: float | None = Field(default=None, gt=0)

    def frequencies(self, theta: float, dim: int, context: int, length: Array) -> Array:
        plain = _exact_frequencies(theta, dim)
        short, long = (
            jnp.asarray(plain / np.array(factors), jnp.float32)
            for factors in (self.short_factor, self.long_factor)
        )
        return jnp.where(length > self.original_max_position_embeddings, long, short)

    def attention_factor(self, context: int) -> float:
        if self.attention_scale is not None:
            return self.attention_scale
        original = self.original_max_position_embeddings
        factor = context / original if self.factor is None else self.factor
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


Scaling = Annotated[
    LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongScaling,
    Field(discriminator="type"),
]


def rope_angles(
    positions: Array,
    dim: int,
    theta: float,
    scaling: Scaling | None = None,
    *,
    context: int = 0,
    length: Array | int = 0,
) -> tuple[Array, Array]:
    """Cosines and sines of position times frequency.

    Args:
      positions: [B, T] int32.
      dim: rotated dimensions of a head.
      theta: base of the frequencies.
      scaling: of the frequencies; `context` and `length` as it takes them.
    Returns:
      Two arrays [B, T, dim / 2], float32.
    """
    if scaling is None:
        frequencies, factor = jnp.asarray(_exact_frequencies(theta, dim), jnp.float32), 1.0
    else:
        frequencies = scaling.frequencies(theta, dim, context, jnp.asarray(length, jnp.int32))
        factor = scaling.attention_factor(context)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns the pairs (x[i], x[i + dim / 2]) of the first dim = 2 * cos.shape[-1] dimensions, as
    Hugging Face checkpoints pair them; the others stay.

    Args:
      x: [B, T, H, head_dim]; cos, sin: [B, T, dim / 2] float32.
    Returns:
      The same shape and dtype as x; float32 inside.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    half = cos.shape[-1]
    y = x.astype(jnp.float32)
    a, b, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
    turned = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1).astype(x.dtype)
