"""Queries, keys and values of whole rows -> outputs through the Pallas splash kernel: on TPUs."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh, PartitionSpec

from alignjax.models.kernels.chunked import RESIDUALS
from alignjax.sharding.mesh import BATCH_AXES

LANES = 128
"""The kernel's blocks of time are multiples of this."""
BLOCKS = (512, 256, LANES)
"""Sizes of them, best first."""


def splash_attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    window: int | None,
    scale: float,
    soft_cap: float | None = None,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Array:
    """What `attend` says, where queries and keys are the same T tokens.

    Rows are filled up to a multiple of 128. The scale goes into q, and is rounded to its dtype.

    Args:
      segments: [B, T] int32.
      window: static, for the kernel is made for it.
      mesh: rows are split over data and fsdp and heads over tensor, as far as they divide evenly;
        None: one device.
      interpret: run it without a TPU, slowly.
    """
    time = q.shape[1]
    filling = -time % LANES
    q = jnp.transpose((q * scale).astype(q.dtype), (0, 2, 1, 3))
    k, v = (jnp.swapaxes(array, 2, 3) for array in (k, v))
    q, k, v = (jnp.pad(array, ((0, 0), (0, 0), (0, filling), (0, 0))) for array in (q, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, filling)))
    run = functools.partial(_one_device, window=window, soft_cap=soft_cap, interpret=interpret)
    if mesh is not None:
        rows = BATCH_AXES if _divides(mesh, BATCH_AXES, q.shape[0]) else None
        heads = "tensor" if _divides(mesh, ("tensor",), q.shape[1]) else None
        if heads and not _divides(mesh, ("tensor",), k.shape[1]):
            k, v = (jnp.repeat(array, q.shape[1] // k.shape[1], axis=1) for array in (k, v))
        spec = PartitionSpec(rows, heads)
        run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(spec, spec, spec, PartitionSpec(rows)),
            out_specs=spec,
            check_vma=False,  # a Pallas call does not say over which axes it varies
        )
    return jnp.transpose(run(q, k, v, segments)[:, :, :time], (0, 2, 1, 3))


def _divides(mesh: Mesh, axes: tuple[str, ...], size: int) -> bool:
    return size % math.prod(mesh.shape[axis] for axis in axes) == 0


def _one_device(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    window: int | None,
    soft_cap: float | None,
    interpret: bool,
) -> Array:
    """[B, H, T, head_dim], twice [B, K, T, head_dim], [B, T] -> [B, H, T, head_dim]."""
    heads, time = q.shape[1:3]
    block = next(size for size in BLOCKS if time % size == 0)
    mask = (
        splash.CausalMask((time, time))
        if window is None
        else splash.LocalMask((time, time), (window - 1, 0), offset=0)
    )
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    return jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))
