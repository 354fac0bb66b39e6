"""Hidden states -> hidden states: one layer of the decoder."""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx
from jax import Array
from jax.sharding import Mesh

from alignjax.models.attention import Attention, LayerCache, Sight
from alignjax.models.config import ModelConfig
from alignjax.models.layers import MLP, Norm, make_norm
from alignjax.models.moe import Experts, RouterSums


class Layer(nnx.Module):
    """x + attention(x), then x + mlp(x); norms before, after or around each of the two."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        has_before, has_after = config.norm_position != "after", config.norm_position != "before"
        self.attention_norm = make_norm(config, width) if has_before else None
        self.attention = Attention(config, rngs)
        self.attention_out_norm = make_norm(config, width) if has_after else None
        self.mlp_norm = make_norm(config, width) if has_before else None
        self.mlp = Experts(config, rngs) if config.num_experts else MLP(config, rngs)
        self.mlp_out_norm = make_norm(config, width) if has_after else None

    def __call__(
        self,
        x: Array,
        angles: tuple[Array, Array] | None,
        sight: Sight,
        attend: Callable[..., Array],
        cache: LayerCache | None,
        mesh: Mesh | None = None,
    ) -> tuple[Array, LayerCache | None, RouterSums | None]:
        y = _through(self.attention_norm, x)
        y, cache = self.attention(y, angles, sight, attend, cache)
        x = x + _through(self.attention_out_norm, y)
        y, sums = _through(self.mlp_norm, x), None
        if isinstance(self.mlp, Experts):
            y, sums = self.mlp(y, sight.query_segments > 0, mesh)
        else:
            y = self.mlp(y)
        return x + _through(self.mlp_out_norm, y), cache, sums


def _through(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)
