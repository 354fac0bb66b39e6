"""Rows in groups, each through the matrix of its group."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.megablox import gmm

from alignjax.core.precision import matmul_precision

Implementation = Literal["ragged", "megablox"]
LANES = 128
"""The kernel takes a multiple of this many rows."""
BLOCKS = (1024, 512, 256, LANES)
"""Rows of one of its products, best first."""
SIDE = 1024
"""The other two dimensions of one, at most: blocks of 1,024 x 1,024 keep the matrix unit busy and
leave room for the next ones in 16 MiB."""


def grouped_dot(
    rows: Array,
    matrices: Array,
    sizes: Array,
    *,
    implementation: Implementation = "ragged",
    interpret: bool = False,
) -> Array:
    """[N, D] and [G, D, F] -> [N, F] in the dtype of the rows (arXiv:2211.15841).

    What the rows of no group give is finite and means nothing; they have no gradient.

    Args:
      rows: first those of group 0, then those of group 1, and so on; the last may be of none.
      sizes: [G] int32, the number of rows of each.
      implementation: "ragged" is `jax.lax.ragged_dot`; "megablox" is JAX's kernel for TPUs, which
        computes the gradient of the matrices by groups too, where the compiler multiplies all rows
        by all matrices. In float32 it would round products to bfloat16.
      interpret: run the kernel without a TPU, slowly.
    """
    matrices = matrices.astype(rows.dtype)
    if implementation == "ragged":
        precision = matmul_precision(rows.dtype)
        return jax.lax.ragged_dot(rows, matrices, sizes, precision=precision)
    num_rows = len(rows)
    # The kernel leaves what is of no group as it finds it, in outputs and gradients.
    is_grouped = (jnp.arange(num_rows) < jnp.sum(sizes))[:, None]
    rows = jnp.pad(jnp.where(is_grouped, rows, 0), ((0, -num_rows % LANES), (0, 0)))
    out = gmm(
        rows, matrices, sizes, preferred_element_type=rows.dtype, tiling=_tiling,
        interpret=interpret,
    )  # fmt: skip
    return jnp.where(is_grouped, out[:num_rows], 0)


def choose_grouped(dtype: jnp.dtype, device: jax.Device, *, is_manual: bool) -> Implementation:
    """What suits the platform.

    Args:
      is_manual: each device has arrays of its own: no compiler splits a kernel.
    """
    if device.platform == "tpu" and dtype != jnp.float32 and is_manual:
        return "megablox"
    return "ragged"


def _tiling(num_rows: int, depth: int, width: int) -> tuple[int, int, int]:
    block = next(size for size in BLOCKS if num_rows % size == 0)
    return block, min(depth, SIDE), min(width, SIDE)
