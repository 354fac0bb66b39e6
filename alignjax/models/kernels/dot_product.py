"""Queries, keys and values -> outputs through `jax.nn.dot_product_attention`: cuDNN on a GPU."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array


def dot_product_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    *,
    scale: float,
    is_causal: bool = False,
    implementation: Literal["cudnn", "xla"],
) -> Array:
    """softmax(scale q k) v by a kernel that is not ours.

    Args:
      q, k, v: as in `einsum_attention`.
      mask: [B, T, S] bool; at least one True for each query.
      is_causal: says that the mask lets no query t see a key after t: cuDNN skips those.
      implementation: "cudnn" wants what `cudnn_can` says; "xla" takes anything, and keeps all
        scores, [B, H, T, S].
    """
    keys, values = (jnp.transpose(array, (0, 3, 1, 2)) for array in (k, v))
    return jax.nn.dot_product_attention(
        q,
        keys,
        values,
        mask=mask[:, None],
        scale=scale,
        is_causal=is_causal,
        implementation=implementation,
    )


def cudnn_can(q: Array, k: Array, soft_cap: float | None, device: jax.Device) -> bool:
    """Whether cuDNN has a kernel, with its gradient, for these shapes, this dtype and this GPU."""
    time, head_dim, slots = q.shape[1], q.shape[3], k.shape[3]
    is_hopper = float(device.compute_capability) >= 9.0
    return (
        q.dtype in (jnp.bfloat16, jnp.float16)
        and soft_cap is None
        and head_dim % 8 == 0
        and head_dim <= (256 if is_hopper else 128)
        and time % 2 == 0
        and slots % 2 == 0
    )
