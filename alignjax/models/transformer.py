"""Tokens -> hidden states: the decoder, as pure functions of its parameters.

Flax NNX modules describe one layer and the two ends; here alone they are split into a description
and arrays. Layers are stacked on a leading axis and scanned, so that the program, and the time to
compile it, is the same for 2 layers and for 80.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from alignjax.core.precision import matmul_precision
from alignjax.models.attention import Cache, LayerCache, Sight
from alignjax.models.config import ModelConfig
from alignjax.models.kernels import RESIDUALS, Implementation, attend
from alignjax.models.layer import Layer
from alignjax.models.layers import Ends
from alignjax.models.lora import LoraConfig, adapt, linears, set_dropout
from alignjax.models.moe import RouterSums
from alignjax.models.quantize import Kind, quantize_linear
from alignjax.models.rope import rope_angles
from alignjax.sharding.mesh import BATCH_AXES
from alignjax.sharding.place import constrained

if TYPE_CHECKING:
    from alignjax.core.types import Params


def _by_kind(kinds: Sequence[Any], make: Callable[[Any], Any]) -> Callable[[Array], Any]:
    """Number of a layer -> `make` of its kind, made once for each kind there is."""
    distinct = [*dict.fromkeys(kinds)]
    made = [make(kind) for kind in distinct]
    if len(distinct) == 1:
        return lambda number: made[0]
    index = jnp.array([distinct.index(kind) for kind in kinds], jnp.int32)
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *made)

    def pick(number: Array) -> Any:
        take = lambda x: jax.lax.dynamic_index_in_dim(x, index[number], keepdims=False)  # noqa: E731
        return jax.tree.map(take, stacked)

    return pick


@dataclass(frozen=True)
class _Pure:
    """A module class as pure functions: the one place where NNX modules are split and merged."""

    module: Callable[[ModelConfig, nnx.Rngs], nnx.Module]
    config: ModelConfig
    lora: LoraConfig | None = None
    quantize: Kind | None = None

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        module = self.module(self.config, rngs)
        if self.quantize is not None:
            for linear in linears(module).values():
                quantize_linear(linear, self.quantize)
        if self.lora is not None:
            adapt(module, self.lora, rngs)
        return module

    def init(self, key: Array) -> dict[str, Any]:
        return _arrays(self.build(nnx.Rngs(key)))

    def bind(self, params: Params) -> Any:
        return nnx.merge(_abstract(self)[0], params)

    def logical_axes(self) -> dict[str, Any]:
        return nnx.to_pure_dict(_abstract(self)[1], lambda param: param.logical_axes)


@functools.cache
def _abstract(pure: _Pure) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: pure.build(nnx.Rngs(0))))


def _arrays(module: nnx.Module) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.split(module)[1])


@dataclass(frozen=True)
class Model:
    """A decoder: hashable, without arrays, a bundle of pure functions of `params`.

    Attributes:
      config: shape and mathematics.
      compute_dtype: of the matmuls; parameters, float32 or bfloat16, are cast at use. Norms, the
        softmax and logits are float32 always.
      remat: recompute each layer in the backward pass, keeping only its input; else the outputs of
        its projections are kept too.
      attention: how it is computed; "auto" goes by the platform (`kernels.choose`).
      mesh: of the parameters, for kernels that the compiler cannot split by itself; None: one
        device, or kernels that it can.
      lora: adapters beside the projections of the layers; see `models.lora`.
      quantize: the kernels of the projections of the layers are codes; see `models.quantize`.
    """

    config: ModelConfig
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    attention: Implementation = "auto"
    mesh: Mesh | None = None
    lora: LoraConfig | None = None
    quantize: Kind | None = None

    def __post_init__(self) -> None:
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"compute_dtype={self.compute_dtype!r} is unknown; use 'float32' or 'bfloat16'"
            )

    @functools.partial(jax.jit, static_argnums=0)
    def init(self, key: Array) -> dict[str, Any]:
        """Key -> nested dict of float32 arrays; those under "layers" have a leading axis L."""
        ends_key, layers_key = jax.random.split(key)
        layer_keys = jax.random.split(layers_key, self.config.num_layers)
        return {**self._ends.init(ends_key), "layers": jax.vmap(self._layer.init)(layer_keys)}

    def apply(
        self,
        params: Params,
        tokens: Array,
        segment_ids: Array,
        positions: Array,
        cache: Cache | None = None,
        dropout_key: Array | None = None,
        branches: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        """Final-normed hidden states of each token, and the cache with the tokens added to it.

        A query sees the keys of its own segment in its own slot or before, within the layer's
        window; with branches only those of branch 0 and of its own branch, and windows are of
        positions. So a prompt serves several completions, each of which has the hidden states that
        it would have alone after the prompt.

        Without a cache, slots are the T of the call; with one, they are those of the cache,
        where the T tokens go to `cache.index` and on. Writing past `max_len` is the caller's
        mistake and is not detected.

        Args:
          params: as `init` makes them.
          tokens: [B, T] int32; any id on padding.
          segment_ids: [B, T] int32; 0 on padding.
          positions: [B, T] int32, within the segment; any value on padding.
          dropout_key: of the adapters' dropout, in training; None: nothing is left out.
          branches: [B, T] int32; 0 on what the branches of a segment continue, any value on
            padding; None: there are none. Positions of a branch go on from those of branch 0.
        Returns:
          hidden [B, T, D] of the compute dtype, finite everywhere, of no meaning on padding;
          the cache (None if None was given).
        Raises:
          ValueError: if there are both a cache and branches.
        """
        return self._run(params, tokens, segment_ids, positions, cache, dropout_key, branches)[:2]

    def apply_with_routing(
        self,
        params: Params,
        tokens: Array,
        segment_ids: Array,
        positions: Array,
        dropout_key: Array | None = None,
        branches: Array | None = None,
    ) -> tuple[Array, RouterSums]:
        """As `apply` without a cache, with how the tokens were spread over experts.

        What branches share counts once.

        Raises:
          ValueError: if the model has no experts.
        """
        hidden, _, sums = self._run(
            params, tokens, segment_ids, positions, None, dropout_key, branches
        )
        if sums is None:
            raise ValueError("num_experts=0: this model has no router; use apply")
        return hidden, sums

    def _run(
        self,
        params: Params,
        tokens: Array,
        segment_ids: Array,
        positions: Array,
        cache: Cache | None,
        dropout_key: Array | None,
        branches: Array | None,
    ) -> tuple[Array, Cache | None, RouterSums | None]:
        config = self.config
        ends = self._ends.bind({name: params[name] for name in params if name != "layers"})
        x = ends.embed(tokens, positions, jnp.dtype(self.compute_dtype), self.mesh)
        keys_values: tuple[Array, Array] | None = None
        segments, first_slot = segment_ids, 0
        if cache is not None and branches is not None:
            raise ValueError("branches are of whole rows; with a cache there are none")
        if cache is not None:
            keys_values, first_slot = (cache.k, cache.v), cache.index
            start = (0, first_slot)
            segments = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, start)
        pick_angles = self._angles(positions, segment_ids > 0)
        run_attention = functools.partial(attend, implementation=self.attention, mesh=self.mesh)

        def run_layer(carry: Any, inputs: tuple[Any, Array]) -> tuple[Any, RouterSums | None]:
            x, keys_values = carry
            x = constrained(x, self.mesh, BATCH_AXES, "sequence", None)
            weights, number = inputs
            store = None
            if keys_values is not None:
                store = LayerCache(*keys_values, number, cache.index)
            sight = Sight(segment_ids, segments, first_slot, number)
            if branches is not None:
                sight = sight._replace(branches=branches, positions=positions)
            layer = self._layer.bind(weights)
            if dropout_key is not None:
                set_dropout(layer, jax.random.fold_in(dropout_key, number))
            x, store, sums = layer(x, pick_angles(number), sight, run_attention, store, self.mesh)
            return (x, None if store is None else (store.k, store.v)), sums

        # Kept for the backward pass: the outputs of the projections and of fused attention.
        # Recomputed: what lies between them and the [T, T] scores, which costs little time and
        # would be most of the memory.
        keep = jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(RESIDUALS),
        )
        run_layer = jax.checkpoint(
            run_layer, prevent_cse=False, policy=None if self.remat else keep
        )
        layers = (params["layers"], jnp.arange(config.num_layers))
        # Two layers to a turn of the loop: the program stays as small, and runs faster on a CPU.
        (x, keys_values), sums = jax.lax.scan(run_layer, (x, keys_values), layers, unroll=2)
        if cache is not None:
            cache = Cache(*keys_values, segments, cache.index + tokens.shape[1])
        return ends.norm(x), cache, jax.tree.map(lambda each: jnp.sum(each, axis=0), sums)

    def _angles(self, positions: Array, is_real: Array) -> Callable[[Array], Any]:
        """Number of a layer -> cosines and sines of its rotary embedding; None where none has."""
        config = self.config
        if config.positions != "rope":
            return lambda number: None
        length = jnp.max(jnp.where(is_real, positions, 0)) + 1

        def angles(kind: str) -> tuple[Array, Array]:
            if kind == "none":
                shape = (*positions.shape, config.rotary_dim // 2)
                return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
            theta, scaling = config.rope_theta, config.rope_scaling
            if kind == "local":
                assert config.local_rope_theta is not None
                theta, scaling = config.local_rope_theta, None
            context = config.max_position_embeddings
            return rope_angles(
                positions, config.rotary_dim, theta, scaling, context=context, length=length
            )

        return _by_kind(config.rope_kinds, angles)

    def unembedding(self, params: Params) -> Array:
        """[D, V] float32: the transposed embedding where they are tied."""
        return self._ends.bind({k: v for k, v in params.items() if k != "layers"}).matrix()

    def logits(self, params: Params, hidden: Array) -> Array:
        """hidden [..., D] -> [..., V] float32, soft-capped where the family does so. Training
        should prefer `losses.logprob`'s chunks."""
        logits = jnp.matmul(
            hidden,
            self.unembedding(params).astype(hidden.dtype),
            precision=matmul_precision(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def init_cache(self, batch: int, max_len: int) -> Cache:
        """An empty cache for `batch` rows of up to `max_len` tokens, padding included."""
        c = self.config
        shape = (c.num_layers, batch, c.num_kv_heads, c.head_dim, max_len)
        return Cache(
            k=jnp.zeros(shape, self.compute_dtype),
            v=jnp.zeros(shape, self.compute_dtype),
            segment_ids=jnp.zeros((batch, max_len), jnp.int32),
            index=jnp.zeros((), jnp.int32),
        )

    def logical_axes(self) -> dict[str, Any]:
        """Like params, with a tuple of axis names for each array; see `sharding.rules`."""
        layers = jax.tree.map(
            lambda axes: ("layers", *axes),
            self._layer.logical_axes(),
            is_leaf=lambda axes: isinstance(axes, tuple),
        )
        return {**self._ends.logical_axes(), "layers": layers}

    def map_layers(self, params: Params, change: Callable[[Any, Array], None]) -> dict[str, Any]:
        """Params after `change(layer, number)` of each `Layer`, an NNX module, in place."""

        def changed(layer: Params, number: Array) -> dict[str, Any]:
            module = self._layer.bind(layer)
            change(module, number)
            return _arrays(module)

        numbers = jnp.arange(self.config.num_layers)
        return {**params, "layers": jax.vmap(changed)(params["layers"], numbers)}

    @property
    def _ends(self) -> _Pure:
        return _Pure(Ends, self.config)

    @property
    def _layer(self) -> _Pure:
        return _Pure(Layer, self.config, self.lora, self.quantize)
