"""Parameters and batches -> arrays on the devices that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignjax.core.processes import sent_by
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
    return {name: placed(array, targets[name]) for name, array in arrays.items()}


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
    """Arrays on devices -> the same, whole, as NumPy arrays in every process, all of which ask.

    A process that has none of the devices of a mesh is told by one that has.
    """
    if jax.process_count() == 1:
        return jax.device_get(arrays)
    here, leaves, structure = jax.process_index(), *jax.tree.flatten(arrays)
    held = [_holders(leaf) for leaf in leaves]
    found = [
        fetched_here(leaf) if here in some else None
        for leaf, some in zip(leaves, held, strict=True)
    ]
    partial = [some for some in held if len(some) < jax.process_count()]
    for some in sorted({tuple(sorted(some)) for some in partial}):
        chosen = [n for n, other in enumerate(held) if other == {*some}]
        own = b"".join(found[n].tobytes() for n in chosen) if here == some[0] else b""
        told, start = sent_by(some[0], own, is_heard=here not in some), 0
        for n in chosen:
            x = leaves[n]
            if found[n] is None:
                found[n] = np.frombuffer(told, x.dtype, x.size, start).reshape(x.shape)
            start += x.nbytes
    return jax.tree.unflatten(structure, found)


def fetched_here(array: Any) -> np.ndarray:
    """An array on devices -> the same, whole, in the processes that have parts of it, all of which
    ask."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def holders(arrays: Any) -> set[int]:
    """The processes that have parts of some of these arrays."""
    return set().union(*map(_holders, jax.tree.leaves(arrays)))


def _holders(array: Any) -> set[int]:
    """The processes that have parts of an array of a mesh; of any other each has its own."""
    if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding):
        return {device.process_index for device in array.sharding.device_set}
    return {*range(jax.process_count())}


def placed(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array, the same one in every process -> a global array."""
    # `device_put` would compare the arrays of all processes first.
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    return jax.make_array_from_callback(
        array.shape, sharding, lambda part: array[part].astype(dtype), dtype=dtype
    )
