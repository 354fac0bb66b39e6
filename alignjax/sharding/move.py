"""Arrays in one layout -> the same arrays in another, on the same devices or on others."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
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
        has a multiple of the other's number of devices.
    """
    return jax.tree.map(_moved, arrays, targets)


def _moved(x: jax.Array, target: NamedSharding) -> jax.Array:
    source = x.sharding
    assert isinstance(source, NamedSharding)
    if source.is_equivalent_to(target, x.ndim):
        return jax.device_put(x, target)
    ours, theirs = [*source.mesh.devices.flat], [*target.mesh.devices.flat]
    if ours == theirs:
        return _into(target)(x)
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
    # `device_put` takes parts as they are; what it has to cut anew it would do on the host.
    if len(theirs) <= len(ours):
        return jax.device_put(_into(_repeated(target, ours))(x), target)
    return _into(target)(jax.device_put(x, _repeated(source, theirs)))


def _repeated(sharding: NamedSharding, devices: Iterable[jax.Device]) -> NamedSharding:
    """The sharding on a multiple of its devices: each part as many times."""
    shape = sharding.mesh.devices.shape
    mesh = Mesh(
        np.reshape([*devices], (-1, *shape)),
        ("copies", *sharding.mesh.axis_names),
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
