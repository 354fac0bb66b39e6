"""Hidden states -> hidden states, each through the few experts that a router chose for it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from alignjax.core.precision import matmul_precision
from alignjax.models.config import ModelConfig
from alignjax.models.layers import ACTIVATIONS, normal_param


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

    def __call__(self, x: Array, is_real: Array) -> tuple[Array, RouterSums]:
        """[B, T, D] -> [B, T, D]; is_real [B, T] bool says what is counted."""
        tokens = x.reshape(-1, x.shape[-1])
        precision = matmul_precision(x.dtype)
        logits = jnp.dot(tokens, self.router[...].astype(x.dtype), precision=precision)
        probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        num_experts = probs.shape[-1]
        weights, chosen = jax.lax.top_k(probs, self.per_token)
        if self.is_normalized:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)

        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=num_experts).astype(jnp.int32)
        rows = tokens[order // self.per_token]

        def project(rows: Array, kernel: nnx.Param) -> Array:
            return jax.lax.ragged_dot(
                rows, kernel[...].astype(rows.dtype), sizes, precision=precision
            )

        inner = self.activation(project(rows, self.gate)) * project(rows, self.up)
        out = project(inner, self.down)[jnp.argsort(order)].reshape(*weights.shape, -1)
        out = jnp.sum(out * weights[..., None].astype(out.dtype), axis=1)

        real = is_real.reshape(-1, 1).astype(jnp.float32)
        times = jnp.sum(jax.nn.one_hot(chosen, num_experts), axis=1)
        sums = RouterSums(jnp.sum(times * real, 0), jnp.sum(probs * real, 0), jnp.sum(real))
        return out.reshape(x.shape).astype(x.dtype), sums
