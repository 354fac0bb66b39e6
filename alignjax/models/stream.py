"""Tensors of files <-> parameters in their shards, one tensor at a time.

Layers (and experts) lie in a tensor each in a file, and stacked in one array here. That array is
made once, in its sharding, and each tensor is written into it on the devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from alignjax.core.errors import UserError
from alignjax.models.config import ModelConfig
from alignjax.models.stored import Planned, Stored
from alignjax.models.tensors import UNREAD, Tensor
from alignjax.sharding.place import fetched_here

if TYPE_CHECKING:
    from alignjax.core.types import Params

Shape = tuple[int, ...]
ParamPath = tuple[str, ...]


class Entry(NamedTuple):
    """One parameter, and where in the files it is."""

    tensor: Tensor
    which: int
    """Its place among the parameters of the tensor."""
    ours: tuple[Shape, ...]
    """Shapes of all parameters of the tensor, in one layer and of one expert."""
    shape: Shape
    """Of the parameter, with the leading axes of layers and experts if it has them."""
    names: np.ndarray
    """[layers, experts], or fewer axes: the name of the tensor of each."""

    @property
    def one(self) -> Shape:
        """Of the parameter, in one layer and of one expert."""
        return self.ours[self.which]


def entries(
    config: ModelConfig, names: Mapping[str, Tensor], params: Any
) -> dict[ParamPath, Entry]:
    """Path of each parameter -> its tensors.

    Args:
      names: those that a checkpoint may hold, with {layer} and {expert} for numbers.
      params: arrays, or shapes alone. All must be in some tensor.
    """
    shapes = {
        tuple(key.key for key in key_path): tuple(array.shape)
        for key_path, array in jax.tree.leaves_with_path(params)
    }
    sizes = {"layer": config.num_layers, "expert": config.num_experts}
    found = {}
    for name, tensor in names.items():
        if tensor.paths[0] not in shapes:
            continue
        stacked = {axis: size for axis, size in sizes.items() if f"{{{axis}}}" in name}
        spelled = np.empty(tuple(stacked.values()), object)
        for index in np.ndindex(spelled.shape):
            spelled[index] = name.format(**dict(zip(stacked, index, strict=True)))
        ours = tuple(shapes[path][spelled.ndim :] for path in tensor.paths)
        for which, path in enumerate(tensor.paths):
            found[path] = Entry(tensor, which, ours, shapes[path], spelled)
    assert found.keys() == shapes.keys(), found.keys() ^ shapes.keys()
    return found


def check(found: Mapping[ParamPath, Entry], tensors: Mapping[str, Stored], directory: Path) -> None:
    """Raises a UserError naming a tensor that is missing, misshapen or no part of the model."""
    for entry in found.values():
        for name in entry.names.flat:
            if name not in tensors:
                raise UserError(f"{directory}: tensor {name!r} is missing; config.json implies it")
            tensors[name].check(entry.tensor.shape(entry.ours))
    known = {name for entry in found.values() for name in entry.names.flat}
    for name in sorted(set(tensors) - known):
        if name.endswith(UNREAD):
            continue
        if name == "lm_head.weight" and ("embedding",) in found:  # tied, and written all the same
            entry = found[("embedding",)]
            tensors[name].check(entry.shape)
            if tensors[name].equals(tensors[entry.names[()]]):
                continue
            raise UserError(
                f"{tensors[name].file}: tensor {name!r} differs from the embedding, although "
                "config.json says tie_word_embeddings=true"
            )
        raise UserError(
            f"{tensors[name].file}: tensor {name!r} is not part of the model of config.json"
        )


def read(
    entry: Entry,
    tensors: Mapping[str, Stored],
    sharding: Sharding,
    change: Callable[[Array], Any],
    targets: Any,
) -> Any:
    """Reads one parameter, and what it is to be changed to, into its shards.

    The host holds one tensor at a time, in the type of the file, and of it only the shards of this
    process; transposing and changing are left to the devices.

    Args:
      sharding: of the parameter.
      change: the parameter of one layer and expert -> what is kept of it: an array or a tree.
        Hashable, so that equal ones are compiled once.
      targets: shardings of that, with the leading axes of layers and experts.
    """
    tensor, which = entry.tensor, entry.which
    shape = tensor.shape((entry.one,))
    offsets = [part.start or 0 for part in tensor.part(entry.ours, which)]
    offsets += [0] * (len(shape) - len(offsets))
    target = _part_sharding(entry, sharding)

    def part_of(stored: Stored) -> Array:
        done: dict[str, np.ndarray] = {}

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            if (key := str(index)) not in done:  # replicas ask for the same shard again
                window = []
                for offset, within, size in zip(offsets, index, shape, strict=True):
                    start, stop, _ = within.indices(size)
                    window.append(slice(offset + start, offset + stop))
                done[key] = stored.read(tuple(window))
            return done[key]

        return jax.make_array_from_callback(shape, target, shard, dtype=stored.dtype)

    names = entry.names
    leaves, structure = jax.tree.flatten(targets)
    compiled = _compiled(tensor.reading, entry.one, change, tuple(leaves), structure, names.ndim)
    if not names.ndim:
        return jax.block_until_ready(compiled(part_of(tensors[names.item()])))
    stacked = jax.tree.map(
        lambda one, target: jnp.zeros((*names.shape, *one.shape), one.dtype, device=target),
        jax.eval_shape(change, jax.ShapeDtypeStruct(entry.one, jnp.float32)),
        targets,
    )
    for index in np.ndindex(names.shape):
        stacked = compiled(stacked, part_of(tensors[names[index]]), np.array(index, np.int32))
        jax.block_until_ready(stacked)  # or parts would wait on the host for the devices
    return stacked


@functools.cache
def _compiled(
    tensor: Tensor,
    ours: Shape,
    change: Callable[[Array], Any],
    leaves: tuple[Sharding, ...],
    structure: Any,
    num_stacked: int,
) -> Any:
    """Part of a tensor -> what is kept of it, or what is stacked with that in its place.

    Once for all parameters of one shape: the number of the layer is an argument.
    """
    targets = jax.tree.unflatten(structure, leaves)

    def changed(part: Array) -> Any:
        return change(tensor.read(part, ours))

    def write(stacked: Any, part: Array, index: Array) -> Any:
        def put(stacked: Array, one: Array) -> Array:
            starts = (*index, *[0] * one.ndim)
            return jax.lax.dynamic_update_slice(
                stacked, one.reshape(*[1] * num_stacked, *one.shape), starts
            )

        return jax.tree.map(put, stacked, changed(part))

    if not num_stacked:
        return jax.jit(changed, out_shardings=targets)
    return jax.jit(write, donate_argnums=0, out_shardings=targets)


def _part_sharding(entry: Entry, sharding: Sharding) -> Sharding:
    """Where a parameter's part of a tensor goes, so that each device gets what it keeps of it.

    Axes that are one in the file are split as the first of them is here, which is the same pieces,
    unless others are split, too: then the devices sort it out.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = (*sharding.spec, *[None] * (len(entry.shape) - len(sharding.spec)))
    spec = spec[entry.names.ndim :]

    def joined(axes: Sequence[Any]) -> Any:
        return axes[0] if axes and not any(axes[1:]) else None

    tensor = entry.tensor
    if tensor.num_inputs:
        theirs = joined(spec[tensor.num_inputs :]), joined(spec[: tensor.num_inputs])
        theirs = theirs if tensor.is_transposed else theirs[::-1]
    else:
        is_flat = len(tensor.shape((entry.one,))) < len(spec)
        theirs = (joined(spec),) if is_flat else spec
    return NamedSharding(sharding.mesh, PartitionSpec(*theirs))


def plan(found: Mapping[ParamPath, Entry], params: Params, dtype: np.dtype) -> list[Planned]:
    """The tensors of the parameters, layer by layer."""

    def make(arrays: Sequence[Any], index: tuple[int, ...], tensor: Tensor) -> np.ndarray:
        numbers = np.array(index, np.int32)
        return to_host(_tensor([*map(jnp.asarray, arrays)], numbers, tensor, dtype))

    planned = []
    for entry in found.values():
        if entry.which:
            continue  # with the first of its tensor
        arrays = [_get(params, path) for path in entry.tensor.paths]
        for index in np.ndindex(entry.names.shape):
            produce = functools.partial(make, arrays, index, entry.tensor)
            shape = entry.tensor.shape(entry.ours)
            planned.append((index[:1], Planned(entry.names[index], shape, produce)))
    return [tensor for _, tensor in sorted(planned, key=lambda pair: pair[0])]


@functools.partial(jax.jit, static_argnames=("tensor", "dtype"))
def _tensor(arrays: list[Array], index: Array, tensor: Tensor, dtype: np.dtype) -> Array:
    """The tensor of one layer and expert, laid out and typed as in the file."""
    for number in index:
        arrays = [jax.lax.dynamic_index_in_dim(x, number, keepdims=False) for x in arrays]
    return tensor.write(arrays).astype(dtype)


def _get(tree: Any, path: ParamPath) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def to_host(array: Array) -> np.ndarray:
    """The whole array, in each process that has parts of it, all of which must call; zeros in the
    others."""
    if isinstance(array, Array) and not array.is_fully_addressable and not array.addressable_shards:
        return np.broadcast_to(np.zeros((), array.dtype), array.shape)
    return fetched_here(array)
