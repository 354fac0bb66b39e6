"""Arrays in one layout -> the same arrays in another, on the same devices or on others."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def moved(arrays: Any, targets: Any) -> Any:
    """The arrays in other shardings. Nothing passes through the memory of the host.

    On the same devices a compiled program exchanges the parts. Between devices each part is copied
    as it is, and exchanged where there are more devices; there or here, until it is done, each
    device holds a part of one array twice. An array that lies as it should is not copied: its
    buffers have two names, so that to donate the one is to lose the other.

    Args:
      arrays: pytree of arrays with a NamedSharding.
      targets: pytree like it of NamedShardings; see `rules.shardings`, with `shapes`.
    Raises:
      ValueError: if target and source share devices, but not all of them in one order, or neither
        has a multiple of the other's number of devices, or some parts would go to another process
        and others not: the devices of both are paired in their order, where one has more several
        in a row with one.
    """
    return jax.tree.map(_moved, arrays, targets)


def sent(arrays: Any, targets: Any) -> Any:
    """The first half of `moved`: where the devices of the targets are more, each of them has a part
    of the source. `moved` takes it from there.

    Within a process it computes nothing on the devices of the targets, so that somebody else may
    compute on them meanwhile, of several processes in an order of his own. From process to process
    all devices of both run a program.
    """
    return jax.tree.map(_sent, arrays, targets)


def _moved(x: jax.Array, target: NamedSharding) -> jax.Array:
    arrived = _sent(x, target)
    if arrived.sharding.is_equivalent_to(target, x.ndim):
        return jax.device_put(arrived, target)
    return _into(target)(arrived)


def _sent(x: jax.Array, target: NamedSharding) -> jax.Array:
    source = x.sharding
    assert isinstance(source, NamedSharding)
    ours, theirs = [*source.mesh.devices.flat], [*target.mesh.devices.flat]
    if ours == theirs:
        return x
    if not source.device_set.isdisjoint(target.device_set):
        raise ValueError(
            f"from the devices {[d.id for d in ours]} to {[d.id for d in theirs]}: expected the "
            "same ones in the same order, or others altogether"
        )
    if max(len(ours), len(theirs)) % min(len(ours), len(theirs)):
        raise ValueError(
            f"from {len(ours)} devices to {len(theirs)}: expected one number to be a multiple of "
            "the other"
        )
    if len(theirs) <= len(ours):
        return _copied(_into(_repeated(target, ours))(x), target)
    return _copied(x, _repeated(source, theirs))


def _copied(x: jax.Array, target: NamedSharding) -> jax.Array:
    """Its parts on other devices, in their order: each device's or, of fewer, of every so many's;
    on more, as many times."""
    parts = {shard.device: shard.data for shard in x.addressable_shards}
    ours, theirs = [*x.sharding.mesh.devices.flat], [*target.mesh.devices.flat]
    pairs = [(ours[n * len(ours) // len(theirs)], device) for n, device in enumerate(theirs)]
    is_near = {_is_near(*pair) for pair in pairs}
    if is_near == {True}:
        there = [jax.device_put(parts[a], b) for a, b in pairs if a in parts]
    elif is_near == {False}:
        num_each = max(1, len(theirs) // len(ours))
        shape = x.sharding.shard_shape(x.shape)
        there = []
        # A device can send to one other in a program.
        for number in range(num_each):
            there += _from_far(parts, pairs[number::num_each], shape, x.dtype)
    else:
        raise ValueError(
            f"from the devices {[d.id for d in ours]} to {[d.id for d in theirs]}: some of them in "
            "one process, some in two"
        )
    return jax.make_array_from_single_device_arrays(x.shape, target, there, dtype=x.dtype)


def _is_near(a: jax.Device, b: jax.Device) -> bool:
    """Whether they are of one process."""
    return a.process_index == b.process_index


def _from_far(
    parts: Mapping[jax.Device, jax.Array],
    pairs: Sequence[tuple[jax.Device, jax.Device]],
    shape: tuple[int, ...],
    dtype: Any,
) -> list[jax.Array]:
    """A part for the second device of each pair, in the process that has it, from the first one."""
    mesh = Mesh(np.array(pairs).T, ("end", "pair"), axis_types=(AxisType.Auto,) * 2)
    both = NamedSharding(mesh, PartitionSpec("end", "pair"))
    ends = [
        jnp.zeros((1, 1, *shape), dtype, device=device) if device not in parts
        else parts[device][None, None]
        for device in mesh.local_devices
    ]  # fmt: skip
    whole = (*mesh.devices.shape, *shape)
    x = jax.make_array_from_single_device_arrays(whole, both, ends, dtype=dtype)
    # Nothing else may be in flight: programs that wait for other processes and such that wait for
    # other devices of this one can block each other on a CPU, whose devices share their threads.
    arrived = jax.block_until_ready(_sent_across(mesh)(jax.block_until_ready(x)))
    theirs = {device for _, device in pairs}
    return [shard.data[0, 0] for shard in arrived.addressable_shards if shard.device in theirs]


@functools.lru_cache(maxsize=16)
def _sent_across(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """[end, pair, ...]: of each pair what the first end has, at the second."""
    spec = PartitionSpec("end", "pair")

    def send(x: jax.Array) -> jax.Array:
        return jax.lax.ppermute(x, "end", [(0, 1)])

    return jax.jit(jax.shard_map(send, mesh=mesh, in_specs=spec, out_specs=spec))


def _repeated(sharding: NamedSharding, devices: Iterable[jax.Device]) -> NamedSharding:
    """The sharding on a multiple of its devices: each part as many times, on devices in a row."""
    shape = sharding.mesh.devices.shape
    mesh = Mesh(
        np.reshape([*devices], (*shape, -1)),
        (*sharding.mesh.axis_names, "copies"),
        axis_types=(AxisType.Auto,) * (1 + len(shape)),
    )
    return NamedSharding(mesh, sharding.spec)


@functools.lru_cache(maxsize=256)
def _into(target: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    def exchange(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, _finest(target, x.shape))

    return jax.jit(exchange, out_shardings=target)


def _finest(target: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """On the way to a sharding that repeats its parts: first a part of a part for each device.

    The compiler exchanges parts between layouts that repeat nothing, and then gathers; at once it
    would gather the whole array on each device.
    """
    mesh, spec = target.mesh, target.spec
    split = [
        () if names is None else (names,) if isinstance(names, str) else names for names in spec
    ]
    used = {name for names in split for name in names}
    idle = tuple(name for name, size in mesh.shape.items() if size > 1 and name not in used)
    for axis, names in enumerate(split):
        if names and shape[axis] % math.prod(mesh.shape[name] for name in (*names, *idle)) == 0:
            finer = PartitionSpec(*spec[:axis], (*names, *idle), *spec[axis + 1 :])
            return NamedSharding(mesh, finer)
    return target
