"""A frozen kernel <-> int8 or 4-bit codes and their scales: what a layer holds under QLoRA.

Own code, since a stored kernel and its inverse are all that is needed: qwix, which serves the same
end, replaces the products of a model while it is traced, and knows neither DoRA nor rsLoRA.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

if TYPE_CHECKING:
    from alignjax.models.layers import Linear

Kind = Literal["int8", "nf4"]

BLOCK = 64
"""Inputs that share a scale in nf4 (arXiv:2305.14314 sec. 3)."""

NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
"""The levels of NormalFloat (arXiv:2305.14314 eq. 4 and appendix E): quantiles of a normal
distribution, 8 of its negative and 9 of its positive half, scaled to [-1, 1]; 0 is in both."""


class Int8Kernel(nnx.Module):
    """kernel = codes * scale, one scale for each output: the largest |kernel| of it over 127."""

    def __init__(self, kernel: Array, axes: tuple[str, ...], num_inputs: int):
        inputs = tuple(range(num_inputs))
        scale = jnp.max(jnp.abs(kernel), axis=inputs) / 127
        # Of an output without weights all codes are 0, by whatever they are divided.
        codes = jnp.round(kernel / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
        self.codes = nnx.Param(codes, logical_axes=axes)
        self.scale = nnx.Param(scale, logical_axes=axes[num_inputs:])

    def __getitem__(self, _: Any) -> Array:
        """The kernel [*inputs, *outputs] in float32, whole: as `nnx.Param` gives it by `[...]`."""
        return self.codes[...].astype(jnp.float32) * self.scale[...]


class Nf4Kernel(nnx.Module):
    """kernel = NF4[codes] * scale, one scale for each output and block of 64 inputs: its absmax.

    A byte holds two codes: input i of a block in its lower half, input i + 32 in its upper one. The
    last block of inputs that 64 does not divide is filled up with zeros.
    """

    def __init__(self, kernel: Array, axes: tuple[str, ...], num_inputs: int):
        self.inputs, outputs = kernel.shape[:num_inputs], kernel.shape[num_inputs:]
        flat = kernel.reshape(-1, *outputs)
        num_blocks = -(-len(flat) // BLOCK)
        filled = jnp.pad(flat, [(0, num_blocks * BLOCK - len(flat)), *[(0, 0)] * len(outputs)])
        blocks = filled.reshape(num_blocks, BLOCK, *outputs)
        scale = jnp.max(jnp.abs(blocks), axis=1)
        unit = blocks / jnp.where(scale > 0, scale, 1)[:, None]
        # The nearest level: how many of the middles between two levels lie below.
        codes = jnp.searchsorted((NF4[1:] + NF4[:-1]) / 2, unit).astype(jnp.uint8)
        low, high = jnp.split(codes, 2, axis=1)
        block_axes = (axes[0], "block", *axes[num_inputs:])
        self.codes = nnx.Param(low | (high << 4), logical_axes=block_axes)
        self.scale = nnx.Param(scale, logical_axes=(axes[0], *axes[num_inputs:]))

    def __getitem__(self, _: Any) -> Array:
        """The kernel [*inputs, *outputs] in float32, whole: as `nnx.Param` gives it by `[...]`."""
        pairs, scale = self.codes[...], self.scale[...]
        codes = jnp.concatenate([pairs & 15, pairs >> 4], axis=1)
        blocks = jnp.asarray(NF4)[codes] * scale[:, None]
        flat = blocks.reshape(-1, *scale.shape[1:])[: math.prod(self.inputs)]
        return flat.reshape(*self.inputs, *scale.shape[1:])


KERNELS: dict[Kind, type[Int8Kernel] | type[Nf4Kernel]] = {"int8": Int8Kernel, "nf4": Nf4Kernel}


def codes(kernel: Array, num_inputs: int, kind: Kind) -> dict[str, Array]:
    """A kernel [*inputs, *outputs] float32 -> the parameters in its place."""
    made = KERNELS[kind](kernel, ("",) * kernel.ndim, num_inputs)
    return {"codes": made.codes[...], "scale": made.scale[...]}


def quantize_linear(linear: Linear, kind: Kind) -> None:
    """Puts codes in the place of a projection's kernel; `linear` computes with what they stand for.

    Raises:
      ValueError: on a kind that is not one of KERNELS.
    """
    if kind not in KERNELS:
        raise ValueError(f"quantize={kind!r} is unknown; use one of {', '.join(KERNELS)}")
    linear.kernel = KERNELS[kind](linear.kernel[...], sum(linear.axes, ()), len(linear.axes[0]))


def num_bytes(params: Any) -> int:
    """What the arrays of a tree occupy, shards and copies on several devices counted once."""
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(params))
