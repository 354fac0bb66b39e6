"""Queries, keys, values and segments -> attention, by what suits the platform and the lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from alignjax.models.kernels.chunked import chunked_attention
from alignjax.models.kernels.dot_product import cudnn_can, dot_product_attention
from alignjax.models.kernels.einsum import NO_WINDOW, einsum_attention, visible
from alignjax.models.kernels.splash import splash_attention

Implementation = Literal["auto", "einsum", "chunked", "xla", "cudnn", "splash"]

MAX_SCORES = 512 * 512
"""T times S up to which all scores are kept where no fused kernel serves.

Blocks are quicker from T = 256 on (benchmarks/attention.py), but only rows that keep their scores
have the bits of a decoded token on a CPU.
"""


def attend(
    q: Array,
    k: Array,
    v: Array,
    query_segments: Array,
    key_segments: Array,
    *,
    scale: float,
    first_slot: Array | int = 0,
    windows: Sequence[int | None] = (None,),
    layer: Array | int = 0,
    soft_cap: float | None = None,
    branches: Array | None = None,
    positions: Array | None = None,
    implementation: Implementation = "auto",
    mesh: Mesh | None = None,
) -> Array:
    """softmax(scale q k) v (arXiv:1706.03762 eq. 1) of the keys that each query sees.

    Those are the keys of its own segment, in its own slot or before, and with a window only in
    slots > own - window. Query head h reads head h // G of keys and values (arXiv:2305.13245).

    k, v and q must be finite everywhere, on padding and in slots not yet written too; what they
    are there changes neither outputs nor gradients of other tokens. Outputs of padding are finite
    and mean nothing.

    Args:
      q: [B, T, H, head_dim]; H = K * G.
      k, v: [B, K, head_dim, S] of the dtype of q; time last, as the cache keeps them.
      query_segments: [B, T] int32, 0 on padding; query t sits in slot first_slot + t.
      key_segments: [B, S] int32, 0 on padding and where nothing was written. Slot first_slot + t
        holds the segment of query t, so that each query sees itself.
      scale: of the scores; head_dim**-0.5 unless the family says otherwise.
      first_slot: may be traced; the int 0 and T = S mean that queries and keys are the same tokens.
      windows: one for each layer of the model, or one for all; None sees everything.
      layer: which of them, possibly traced. Kernels that need to know the window beforehand are
        compiled once for each different one; with one there is no switch.
      soft_cap: scores become cap tanh(score / cap), before the mask (arXiv:2408.00118 sec. 2).
      branches: [B, T] int32, where queries and keys are the same tokens: continuations of one text.
        Of its segment a query sees branch 0, which is what they continue, and its own branch alone.
      positions: [B, T] int32, given with branches: windows are then of positions, not of slots.
      implementation: "einsum" keeps all scores; "chunked" never does; "xla" and "cudnn" are
        `jax.nn.dot_product_attention`; "splash" is the TPU's. "auto": see `choose`.
      mesh: of the arrays; its devices say the platform. None: those of JAX's default backend.
    Returns:
      [B, T, H, head_dim] of the dtype of q; the softmax is float32.
    Raises:
      ValueError: on shapes, windows or a name other than the above, or if the implementation that
        was asked for cannot do it.
    """
    _check(q, k, v, query_segments, key_segments, windows, implementation)
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    is_self = isinstance(first_slot, int) and first_slot == 0 and q.shape[1] == k.shape[3]
    is_branched = branches is not None
    if is_branched:
        _check_branches(query_segments, branches, positions, implementation, is_self=is_self)
    asked = implementation
    if implementation == "auto":
        implementation = choose(
            q, k, soft_cap, is_self=is_self, device=device, is_branched=is_branched
        )
    if implementation == "splash":
        if not is_self:
            raise ValueError("splash attention wants T = S and first_slot = 0; use chunked or auto")
        run = functools.partial(
            splash_attention,
            scale=scale,
            soft_cap=soft_cap,
            mesh=mesh,
            interpret=device.platform != "tpu",
        )
        distinct, which = _distinct(windows, layer)
        kernels = [functools.partial(run, window=window) for window in distinct]
        return jax.lax.switch(which, kernels, q, k, v, query_segments)
    if (
        is_self
        and not is_branched
        and mesh is not None
        and q.shape[1] % mesh.shape["sequence"] == 0
        and mesh.shape["sequence"] > 1
    ):
        run = functools.partial(
            attend, windows=windows, scale=scale, soft_cap=soft_cap, implementation=asked
        )
        return _split_over_sequence(run, q, k, v, query_segments, key_segments, layer, mesh=mesh)
    window = layer_window(windows, layer)
    if implementation == "chunked":
        return chunked_attention(
            q,
            k,
            v,
            query_segments,
            key_segments,
            first_slot=first_slot,
            window=window,
            scale=scale,
            soft_cap=soft_cap,
            branches=branches,
            positions=positions,
        )
    mask = visible(query_segments, key_segments, first_slot, window, branches, positions)
    if implementation == "einsum":
        return einsum_attention(q, k, v, mask, scale=scale, soft_cap=soft_cap)
    if soft_cap is not None:
        raise ValueError(f"{implementation} attention has no soft_cap; use chunked, einsum or auto")
    return dot_product_attention(
        q, k, v, mask, scale=scale, is_causal=is_self, implementation=implementation
    )


def choose(
    q: Array,
    k: Array,
    soft_cap: float | None,
    *,
    is_self: bool,
    device: jax.Device,
    is_branched: bool = False,
) -> Literal["einsum", "chunked", "cudnn", "splash"]:
    """What `attend` runs when nothing is asked for.

    Whole rows in bfloat16 or float16 go to the fused kernel of the platform: splash on TPUs, cuDNN
    on GPUs, where it can (even lengths, head_dim a multiple of 8, no soft-cap). All else, decoding
    with a cache, branches and float32 among it, keeps its scores while they are few, and is chunked
    from `MAX_SCORES` on.
    """
    is_self = is_self and not is_branched  # Fused kernels know segments, but not branches.
    if is_self and device.platform == "tpu" and q.dtype != jnp.float32:
        return "splash"
    if is_self and device.platform == "gpu" and cudnn_can(q, k, soft_cap, device):
        return "cudnn"
    return "einsum" if q.shape[1] * k.shape[3] <= MAX_SCORES else "chunked"


def _split_over_sequence(
    run: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    query_segments: Array,
    key_segments: Array,
    layer: Array | int,
    *,
    mesh: Mesh,
) -> Array:
    """The same where the tokens of a row are split: each device has its own queries and gathers all
    keys and values (context parallelism as in arXiv:2407.21783 sec. 3.3.2)."""
    own = q.shape[1] // mesh.shape["sequence"]

    def of_one_device(q: Array, k: Array, v: Array, *others: Array) -> Array:
        query_segments, key_segments, layer = others
        first = jax.lax.axis_index("sequence") * own
        return run(q, k, v, query_segments, key_segments, first_slot=first, layer=layer)

    split, whole = PartitionSpec(None, "sequence"), PartitionSpec()
    return jax.shard_map(
        of_one_device,
        mesh=mesh,
        in_specs=(split, whole, whole, split, whole, whole),
        out_specs=split,
        axis_names={"sequence"},
        check_vma=False,
    )(q, k, v, query_segments, key_segments, jnp.asarray(layer))


def _check(
    q: Array,
    k: Array,
    v: Array,
    query_segments: Array,
    key_segments: Array,
    windows: Sequence[int | None],
    implementation: str,
) -> None:
    batch, time, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1], k.shape[3]
    wanted = {
        "k": (k, (batch, kv_heads, head_dim, slots)),
        "v": (v, (batch, kv_heads, head_dim, slots)),
        "query_segments": (query_segments, (batch, time)),
        "key_segments": (key_segments, (batch, slots)),
    }
    for name, (array, shape) in wanted.items():
        if array.shape != shape:
            raise ValueError(f"{name} is {array.shape}; beside q {q.shape} it should be {shape}")
    if heads % kv_heads:
        raise ValueError(f"{heads} heads of queries cannot share {kv_heads} heads of keys evenly")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they should be the same")
    if not windows or any(window is not None and window < 1 for window in windows):
        raise ValueError(f"windows={windows}: each is None or at least 1, and there is one or more")
    if implementation not in get_args(Implementation):
        raise ValueError(f"{implementation!r} is none of {', '.join(get_args(Implementation))}")


def _check_branches(
    segments: Array,
    branches: Array | None,
    positions: Array | None,
    implementation: str,
    *,
    is_self: bool,
) -> None:
    if not is_self:
        raise ValueError(
            "branches want queries and keys of the same tokens, T = S and first_slot = 0; there "
            "are none with a cache"
        )
    if implementation in ("cudnn", "splash"):
        raise ValueError(
            f"{implementation} attention has no branches; use einsum, chunked, xla or auto"
        )
    for name, array in {"branches": branches, "positions": positions}.items():
        if array is None or array.shape != segments.shape:
            found = None if array is None else array.shape
            raise ValueError(f"{name} is {found}; beside branches it should be {segments.shape}")


def _distinct(
    windows: Sequence[int | None], layer: Array | int
) -> tuple[list[int | None], Array | int]:
    """The different windows that the layer may have, and which of them it has."""
    if isinstance(layer, int) and len(windows) > 1:
        return [windows[layer]], 0
    distinct = list(dict.fromkeys(windows))
    if len(distinct) == 1:
        return distinct, 0
    return distinct, jnp.array([distinct.index(window) for window in windows])[layer]


def layer_window(windows: Sequence[int | None], layer: Array | int) -> Array | int | None:
    """The layer's window; a number in any case if it is traced."""
    distinct, which = _distinct(windows, layer)
    if len(distinct) == 1:
        return distinct[0]
    return jnp.array([NO_WINDOW if window is None else window for window in distinct])[which]
