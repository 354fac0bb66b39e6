"""Parameters and batches -> arrays on the devices that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignjax.sharding.mesh import BATCH_AXES, batch_shards
from alignjax.sharding.rules import fit


def init_sharded(init: Callable[[jax.Array], Any], key: jax.Array, shardings: Any) -> Any:
    """Runs `init(key)` so that each array is born in its sharding, never whole on one device.

    Args:
      init: key -> pytree of arrays, such as `Model.init`.
      shardings: pytree like it; axes that do not divide evenly are replicated.
    """
    fitted = fit(shardings, jax.eval_shape(init, key))
    return jax.jit(init, out_shardings=fitted)(key)


def copied(arrays: Any) -> Any:
    """Other buffers with the same content in the same shardings; compiles nothing."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), arrays)


def constrained(x: jax.Array, mesh: Mesh | None, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """`x`, with each of its axes split over the mesh axes named for it, as far as those divide it;
    what the compiler would choose by itself may gather the batch of all devices on each."""
    if mesh is None or mesh.size == 1:
        return x
    wanted = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.lax.with_sharding_constraint(x, fit(wanted, x))


def put_batch(batch: Mapping[str, Any], mesh: Mesh, batch_axis: int = 0) -> dict[str, jax.Array]:
    """Host arrays -> global arrays: rows split over `mesh.BATCH_AXES`, and their tokens over
    sequence where they divide evenly.

    Every process gives the whole batch, the same one; its devices get their part of it.

    Args:
      batch: NumPy arrays, with the rows on `batch_axis` and tokens, if any, on the next. Arrays
        with fewer axes are replicated.
    Raises:
      ValueError: if the rows do not divide evenly over the devices.
    """
    arrays = {name: np.asarray(value) for name, value in batch.items()}
    targets = batch_shardings(arrays, mesh, batch_axis)
    return {name: _placed(array, targets[name]) for name, array in arrays.items()}


def batch_shardings(
    batch: Mapping[str, Any], mesh: Mesh, batch_axis: int = 0
) -> dict[str, NamedSharding]:
    """Where `put_batch` puts each of these: anything with a shape."""
    num_shards = batch_shards(mesh)

    def sharding(name: str, shape: tuple[int, ...]) -> NamedSharding:
        if len(shape) <= batch_axis:
            return NamedSharding(mesh, PartitionSpec())
        rows = shape[batch_axis]
        if rows % num_shards:
            raise ValueError(
                f"{name}: {rows} rows do not divide over {num_shards} devices (mesh data x fsdp x "
                f"expert); use a multiple of {num_shards}"
            )
        spec = PartitionSpec(*(None,) * batch_axis, BATCH_AXES)
        num_tokens = shape[batch_axis + 1] if len(shape) > batch_axis + 1 else 1
        if mesh.shape["sequence"] > 1 and num_tokens % mesh.shape["sequence"] == 0:
            spec = PartitionSpec(*spec, "sequence")
        return NamedSharding(mesh, spec)

    return {name: sharding(name, array.shape) for name, array in batch.items()}


def fetch(arrays: Any) -> Any:
    """Arrays on devices -> the same, whole, as NumPy arrays in every process, all of which ask."""

    if jax.process_count() == 1:
        return jax.device_get(arrays)

    def fetched(array: jax.Array) -> np.ndarray:
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(fetched, arrays)


def _placed(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    # `device_put` would compare the arrays of all processes first.
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])
