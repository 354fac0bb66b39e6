"""A model's source and a mesh -> its parameters as they would lie there: shapes, types, shardings.

No array is made. What a phase would read or draw is described as `phases.common.Policy` places it,
which a test compares leaf by leaf.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey

from alignjax.core.precision import compute_dtype
from alignjax.core.types import Params
from alignjax.models import Model, ModelConfig, ScalarModel, lora
from alignjax.phases.common import ModelSource
from alignjax.rewards.combine import RewardModelConfig
from alignjax.sharding import batch_shardings, fit, shardings
from alignjax.train.optim import Optimizer
from alignjax.train.state import TrainState

_KEY = jax.eval_shape(lambda: jax.random.PRNGKey(0))


@dataclass(frozen=True)
class Weights:
    """A model, and its parameters in the abstract. What phases ask of a `Policy`, it has too.

    Attributes:
      params: what trains.
      frozen: under LoRA the base; else None.
    """

    model: Model
    params: Params
    frozen: Params | None = None

    def whole(self, params: Params) -> Params:
        """The parameters that the model computes with."""
        return params if self.frozen is None else lora.combine(self.frozen, params)

    @property
    def reference_model(self) -> Model:
        """What computes with `frozen`, if that is there."""
        return lora.base(self.model)


def placed(shapes: Any, targets: Any) -> Any:
    """Shapes, each with its sharding."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, targets
    )


def replicated(shapes: Any, mesh: Mesh) -> Any:
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes
    )


def policy(source: ModelSource, shape: ModelConfig, mesh: Mesh) -> Weights:
    """What `Policy(...)` loads or draws, for a model of this shape."""
    dtype = compute_dtype(source.compute_dtype, _platform(mesh))
    plain = Model(shape, dtype, source.remat, mesh=mesh)
    params = _parameters(plain, source.param_dtype, mesh)
    if source.lora is None:
        return Weights(plain, params)
    model = dataclasses.replace(plain, lora=source.lora, quantize=source.quantize)
    frozen = params if source.quantize is None else _coded(model, params, mesh)
    axes, _ = lora.split(model.logical_axes())
    adapters = jax.eval_shape(functools.partial(lora.init, model), frozen, _KEY)
    return Weights(model, placed(adapters, shardings(axes, mesh, adapters)), frozen)


def loaded(
    shape: ModelConfig, mesh: Mesh, *, compute: Any = "auto", param_dtype: str = "float32"
) -> Weights:
    """A model that does not train, as `models.load` reads it."""
    model = Model(shape, compute_dtype(compute, _platform(mesh)), mesh=mesh)
    return Weights(model, _parameters(model, param_dtype, mesh))


def scalar(weights: Weights, mesh: Mesh) -> tuple[ScalarModel, Weights]:
    """A reward model or critic on a trunk, without the unembedding, which it has no use for.

    Returns:
      The model; and its parameters: {"decoder": ..., "head": {"kernel": [D]}}.
    """

    def without(params: Params) -> Params:
        return {name: value for name, value in params.items() if name != "unembedding"}

    tied = weights.model.config.model_copy(update={"tie_embeddings": True})
    model = ScalarModel(dataclasses.replace(weights.model, config=tied))
    head = jax.eval_shape(lambda: model.new_head(jax.random.PRNGKey(0), tied.hidden_size))
    head = placed(head, shardings(model.logical_axes()["head"], mesh, head))
    frozen = None if weights.frozen is None else {"decoder": without(weights.frozen)}
    params = {"decoder": without(weights.params), "head": head}
    return model, Weights(model.decoder, params, frozen)


def reward_model(
    config: RewardModelConfig, shape: ModelConfig, mesh: Mesh
) -> tuple[ScalarModel, Params]:
    """A reward model that scores, as `phases.scoring.RewardModel` reads it."""
    model, weights = scalar(loaded(shape, mesh, compute=config.compute_dtype), mesh)
    return model, weights.params


def train_state(
    params: Params, optimizer: Optimizer, mesh: Mesh, *, reference: Any = None, extra: Any = None
) -> TrainState:
    """As `train.state.create_state` makes it of such parameters.

    Moments lie as the parameter whose path theirs ends with; everything else is on all devices.
    """
    targets = {_names(path): x.sharding for path, x in jax.tree_util.tree_leaves_with_path(params)}
    everywhere = NamedSharding(mesh, PartitionSpec())

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = _names(path)
        for start in range(len(names)):
            found = targets.get(names[start:])
            if found is not None and len(found.spec) == leaf.ndim > 0:
                return fit(found, leaf)
        return everywhere

    moments = jax.eval_shape(optimizer.transform.init, params)
    opt_state = placed(moments, jax.tree_util.tree_map_with_path(sharding, moments))
    step = jax.ShapeDtypeStruct((), jnp.int32)
    step, key, extra = replicated((step, _KEY, extra), mesh)
    return TrainState(step, params, opt_state, key, reference, extra)


def batch(arrays: dict[str, Any], mesh: Mesh, batch_axis: int = 1) -> dict[str, Any]:
    """What `put_batch` makes of host arrays, or of anything with a shape and a type."""
    shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in arrays.items()}
    return placed(shapes, batch_shardings(shapes, mesh, batch_axis))


def _parameters(model: Model, param_dtype: str, mesh: Mesh) -> Params:
    shapes = jax.eval_shape(model.init, _KEY)
    cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(param_dtype)), shapes)
    return placed(cast, shardings(model.logical_axes(), mesh, cast))


def _coded(model: Model, params: Params, mesh: Mesh) -> Params:
    """The base, whose kernels are codes: made of float32, whatever type the others are kept in."""
    float32 = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
    coded = jax.eval_shape(functools.partial(lora.quantize, model), float32)
    kept = {_names(path): x.dtype for path, x in jax.tree_util.tree_leaves_with_path(params)}
    cast = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, kept.get(_names(path), x.dtype)), coded
    )
    return placed(cast, shardings(lora.base(model).logical_axes(), mesh, cast))


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of dicts in a path; fields of states and of codes do not count."""
    return tuple(part.key for part in path if isinstance(part, DictKey))


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform
