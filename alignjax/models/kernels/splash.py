"""Queries, keys and values of whole rows -> outputs through the Pallas splash kernel: on TPUs."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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

    Rows are filled up to a multiple of 128, or of 256 for each device along sequence. The scale
    goes into q, and is rounded to its dtype.

    Args:
      segments: [B, T] int32.
      window: static, for the kernel is made for it.
      mesh: rows are split over data and fsdp, heads over tensor, as far as they divide evenly, and
        queries over sequence, each device along which gathers all keys and values (context
        parallelism as in arXiv:2407.21783 sec. 3.3.2); None: one device.
      interpret: run it without a TPU, slowly.
    """
    time, shards = q.shape[1], 1 if mesh is None else mesh.shape["sequence"]
    filling = -time % (LANES * (1 if shards == 1 else 2 * shards))
    q = jnp.transpose((q * scale).astype(q.dtype), (0, 2, 1, 3))
    k, v = (jnp.swapaxes(array, 2, 3) for array in (k, v))
    q, k, v = (jnp.pad(array, ((0, 0), (0, 0), (0, filling), (0, 0))) for array in (q, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, filling)))
    make = functools.partial(
        _kernel, q.shape[2], shards, window=window, soft_cap=soft_cap, interpret=interpret
    )
    if mesh is None:
        out = jax.vmap(make(q.shape[1]))(q, k, v, splash.SegmentIds(segments, segments))
        return jnp.transpose(out[:, :, :time], (0, 2, 1, 3))
    rows = BATCH_AXES if _divides(mesh, BATCH_AXES, q.shape[0]) else None
    heads = "tensor" if _divides(mesh, ("tensor",), q.shape[1]) else None
    if heads and not _divides(mesh, ("tensor",), k.shape[1]):
        k, v = (jnp.repeat(array, q.shape[1] // k.shape[1], axis=1) for array in (k, v))
    kernel = make(q.shape[1] // (mesh.shape["tensor"] if heads else 1))
    split, whole = PartitionSpec(rows, heads, "sequence"), PartitionSpec(rows, heads)
    run = jax.shard_map(
        functools.partial(_one_device, shards),
        mesh=mesh,
        in_specs=(
            kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, "sequence"))),
            *(split, whole, whole),
            *(PartitionSpec(rows, "sequence"), PartitionSpec(rows)),
        ),
        out_specs=split,
        check_vma=False,  # a Pallas call does not say over which axes it varies
    )
    out = run(kernel, q, k, v, segments, segments)
    return jnp.transpose(out[:, :, :time], (0, 2, 1, 3))


def _divides(mesh: Mesh, axes: tuple[str, ...], size: int) -> bool:
    return size % math.prod(mesh.shape[axis] for axis in axes) == 0


def _kernel(
    time: int,
    shards: int,
    heads: int,
    *,
    window: int | None,
    soft_cap: float | None,
    interpret: bool,
) -> splash.SplashAttentionKernel:
    """Of one row: [heads, T / shards, head_dim], twice [K, T, head_dim] -> like the first."""
    order = _order(shards)
    block = next(size for size in BLOCKS if time // len(order) % size == 0)
    mask = (
        splash.CausalMask((time, time))
        if window is None
        else splash.LocalMask((time, time), (window - 1, 0), offset=0)
    )
    mask.q_sequence = np.arange(time, dtype=np.int32).reshape(len(order), -1)[order].ravel()
    return splash.make_splash_mha(
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
        q_seq_shards=shards,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )


def _one_device(
    shards: int,
    kernel: splash.SplashAttentionKernel,
    q: Array,
    k: Array,
    v: Array,
    query_segments: Array,
    key_segments: Array,
) -> Array:
    """[B, H, T / shards, head_dim], twice [B, K, T, head_dim], [B, T / shards], [B, T] -> as q."""
    if shards == 1:
        return jax.vmap(kernel)(q, k, v, splash.SegmentIds(query_segments, key_segments))
    segments = splash.SegmentIds(_dealt(query_segments, 1, shards), key_segments)
    out = jax.vmap(kernel)(_dealt(q, 2, shards), k, v, segments)
    return _dealt(out, 2, shards, back=True)


def _order(shards: int) -> list[int]:
    """Which parts of a row's queries the devices have, one device after the other.

    A query sees as many keys as lie before it. Of 2 n parts a device has one of the first and its
    mirror image of the last, so that all devices have as much to do; even parts come first.
    """
    if shards == 1:
        return [0]
    own = [(device, 2 * shards - 1 - device) for device in range(shards)]
    return [part for both in own for part in sorted(both, key=lambda part: part % 2)]


def _dealt(x: Array, axis: int, shards: int, *, back: bool = False) -> Array:
    """From the device's two parts of the row that lie side by side to those of `_order`, or back.

    Of both, each device has one even and one odd part.
    """
    moved = []
    for parity, half in enumerate(jnp.split(x, 2, axis)):
        parts = [2 * device + parity for device in range(shards)]
        pairs = [(part // 2, min(part, 2 * shards - 1 - part)) for part in parts]
        pairs = [(there, here) for here, there in pairs] if back else pairs
        moved.append(jax.lax.ppermute(half, "sequence", pairs))
    return jnp.concatenate(moved, axis)
