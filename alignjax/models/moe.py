"""Hidden states -> hidden states, each through the few experts that a router chose for it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from alignjax.core.precision import matmul_precision
from alignjax.models.config import ModelConfig
from alignjax.models.kernels.grouped import choose_grouped, grouped_dot
from alignjax.models.layers import ACTIVATIONS, normal_param
from alignjax.sharding.mesh import BATCH_AXES, batch_shards


class RouterSums(NamedTuple):
    """How tokens were spread over E experts, summed over tokens and layers; padding is left out."""

    chosen: Array
    """[E] float32; how often each expert was chosen."""
    probability: Array
    """[E] float32; the sum of its probabilities."""
    count: Array
    """[] float32; tokens times layers."""


def load_balancing_loss(sums: RouterSums) -> Array:
    """E sum_e f_e P_e: smallest when all experts are used alike (arXiv:2101.03961 eq. 4-6).

    f_e is how often a token goes to expert e, and P_e its mean probability, over all tokens and
    layers; with k experts a token, equal use gives k.

    Returns:
      [] float32; 0 where there was no token.
    """
    count = jnp.maximum(sums.count, 1.0)
    return sums.chosen.shape[0] * jnp.sum(sums.chosen * sums.probability) / count**2


class Experts(nnx.Module):
    """A router and gated MLPs. No token is dropped, and none waits for another: each goes through
    all experts chosen for it, in groups sorted by expert (arXiv:2211.15841)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        experts, width = {"experts": config.num_experts}, {"embed": config.hidden_size}
        inner, std = {"expert_mlp": config.intermediate_size}, config.initializer_range
        self.router = normal_param(rngs, width | {"router": config.num_experts}, std)
        self.gate = normal_param(rngs, experts | width | inner, std)
        self.up = normal_param(rngs, experts | width | inner, std)
        self.down = normal_param(rngs, experts | inner | width, std)
        self.activation = ACTIVATIONS[config.activation]
        self.per_token, self.is_normalized = config.experts_per_token, config.normalize_experts

    def __call__(
        self, x: Array, is_real: Array, mesh: Mesh | None = None
    ) -> tuple[Array, RouterSums]:
        """[B, T, D] -> [B, T, D]; is_real [B, T] bool says what is counted.

        mesh: of the arrays; None: one device.
        """
        is_split = mesh is not None and _is_split(mesh, x)
        is_alone = mesh is None or mesh.size == 1
        device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        is_manual = is_alone or (is_split and mesh.shape["tensor"] == 1)
        dot = functools.partial(
            grouped_dot, implementation=choose_grouped(x.dtype, device, is_manual=is_manual)
        )
        run = functools.partial(
            _mix, activation=self.activation, k=self.per_token, is_normalized=self.is_normalized,
            dot=dot,
        )  # fmt: skip
        if is_split:
            run = _on_each_device(run, mesh)
        kernels = (kernel[...] for kernel in (self.router, self.gate, self.up, self.down))
        return run(x, is_real, *kernels)


def _mix(
    x: Array,
    is_real: Array,
    router: Array,
    *kernels: Array,
    activation: Callable[[Array], Array],
    k: int,
    is_normalized: bool,
    dot: Callable[[Array, Array, Array], Array],
    expert_axis: str | None = None,
) -> tuple[Array, RouterSums]:
    """As `Experts.__call__`, of the tokens and experts of one device.

    Args:
      dot: see `grouped_dot`.
      expert_axis: of the mesh, over which the experts and the rows are split.
    """
    logits = jnp.dot(x, router.astype(x.dtype), precision=matmul_precision(x.dtype))
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(probs, k)
    if is_normalized:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    if expert_axis is None:
        out = _routed(x, weights, chosen, *kernels, activation=activation, dot=dot)
    else:
        first = jax.lax.axis_index(expert_axis) * len(kernels[0])
        of_all = (
            jax.lax.all_gather(array, expert_axis, axis=0, tiled=True)
            for array in (x, weights, chosen)
        )
        out = _routed(*of_all, *kernels, activation=activation, dot=dot, first=first)
        out = jax.lax.psum_scatter(out, expert_axis, scatter_dimension=0, tiled=True)

    real = is_real[..., None].astype(jnp.float32)
    times = jnp.sum(jax.nn.one_hot(chosen, probs.shape[-1]), axis=-2)
    sums = RouterSums(jnp.sum(times * real, (0, 1)), jnp.sum(probs * real, (0, 1)), jnp.sum(real))
    return out.astype(x.dtype), sums


def _routed(
    x: Array,
    weights: Array,
    chosen: Array,
    *kernels: Array,
    activation: Callable[[Array], Array],
    dot: Callable[[Array, Array, Array], Array],
    first: Array | int = 0,
) -> Array:
    """[B, T, D], twice [B, T, k] -> [B, T, D]: what the experts of the kernels add to each token.

    Args:
      first: the number of the first of them; what the others would add is left out.
    """
    rows, flat = x.reshape(-1, x.shape[-1]), chosen.reshape(-1) - first
    num_experts = len(kernels[0])
    is_here = (flat >= 0) & (flat < num_experts)
    flat = jnp.where(is_here, flat, num_experts)  # The others come last, where no expert is.
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=num_experts).astype(jnp.int32)

    gate, up, down = kernels
    rows = rows[order // chosen.shape[-1]]
    out = dot(activation(dot(rows, gate, sizes)) * dot(rows, up, sizes), down, sizes)
    out = jnp.where(is_here[:, None], out[jnp.argsort(order)], 0)
    out = out.reshape(*chosen.shape, -1)
    return jnp.sum(out * weights[..., None].astype(out.dtype), axis=-2)


def _is_split(mesh: Mesh, x: Array) -> bool:
    """Whether rows, or their tokens, lie on several devices, the same number on each."""
    parts = batch_shards(mesh), mesh.shape["sequence"]
    return math.prod(parts) > 1 and all(
        size % num == 0 for size, num in zip(x.shape, parts, strict=False)
    )


def _on_each_device(run: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The same, where each device sorts its own tokens alone: left to itself the compiler gathers
    those of the whole batch on each. Devices along the expert axis have different experts, and
    share their tokens."""
    axes = *BATCH_AXES, "sequence"
    expert_axis = "expert" if mesh.shape["expert"] > 1 else None

    def of_one_device(*arrays: Array) -> tuple[Array, RouterSums]:
        out, sums = run(*arrays, expert_axis=expert_axis)
        return out, jax.tree.map(lambda each: jax.lax.psum(each, axes), sums)

    tokens, whole, experts = (
        PartitionSpec(BATCH_AXES, "sequence"),
        PartitionSpec(),
        PartitionSpec("expert"),
    )
    return jax.shard_map(
        of_one_device,
        mesh=mesh,
        in_specs=(tokens, tokens, whole, experts, experts, experts),
        out_specs=(tokens, whole),
        # A kernel wants all axes, the compiler those of tensor where it splits over them.
        axis_names={*axes} if mesh.shape["tensor"] > 1 else {*mesh.axis_names},
        check_vma=False,
    )
