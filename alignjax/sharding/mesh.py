"""A few numbers -> a mesh of devices with the axes data, fsdp, sequence, expert and tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from pydantic import field_validator, model_validator

from alignjax.core.config import Config
from alignjax.core.errors import UserError

AXES = ("data", "fsdp", "sequence", "expert", "tensor")
"""From the slowest links to the fastest: devices next to each other differ in the last ones."""
BATCH_AXES = ("data", "fsdp", "expert")
"""The mesh axes that rows of a batch are split over."""


class MeshConfig(Config):
    """How many devices along each axis; one of them may be -1: all that are left.

    That is `data`, unless another one is -1: then `data` is 1 where it is not given.

    Attributes:
      data: rows are split, parameters repeated. The slices of a multi-slice pod lie along it.
      fsdp: rows are split, and parameters and optimizer state too.
      sequence: the tokens of a row are split; keys and values of a layer are gathered.
      expert: rows are split, and the experts of a mixture; its layers send tokens to and fro.
      tensor: heads, MLP width and vocabulary are split.
    """

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    expert: int = 1
    tensor: int = 1

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "data" not in values and -1 in values.values():
            return {"data": 1, **values}
        return values

    @field_validator(*AXES)
    @classmethod
    def _check(cls, size: int) -> int:
        if size < 1 and size != -1:
            raise ValueError(
                f"{size} is not a number of devices; use 1 or more, or -1 for the rest"
            )
        return size


def make_mesh(
    config: MeshConfig, devices: Sequence[jax.Device] | None = None, *, name: str = "mesh"
) -> Mesh:
    """The mesh of all devices (of all processes), or of those given.

    All axes are Auto: sharded arrays go in, and the compiler propagates. Devices of several slices
    lie along `data`, slice by slice: only sums of gradients cross the network between slices.

    Args:
      name: of the config, in messages.
    Raises:
      UserError: if the sizes do not multiply to the number of devices, slices do not fit in
        `data`, or chips of a slice do not fill a box.
    """
    devices = jax.devices() if devices is None else devices
    asked = {axis: getattr(config, axis) for axis in AXES}
    open_axes = [axis for axis, size in asked.items() if size == -1]
    if len(open_axes) > 1:
        raise UserError(f"{name} {_spell(asked)}: at most one axis can be -1 (all that are left)")
    others = math.prod(size for size in asked.values() if size != -1)
    sizes = {axis: len(devices) // others if size == -1 else size for axis, size in asked.items()}
    if math.prod(sizes.values()) != len(devices):
        near = [n for n in _divisors(len(devices)) if n <= others]
        remedy = (
            f"{others} does not divide {len(devices)}; the others could multiply to {near[-1]}"
            if open_axes
            else f"they multiply to {others}; change them, or set one to -1"
        )
        raise UserError(
            f"{name} {_spell(asked)} does not fit {len(devices)} device(s): the sizes must "
            f"multiply to the number of devices: {remedy}"
        )
    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    num_slices = len(slices)
    if len({*slices.values()}) > 1:
        parts = ", ".join(map(str, slices.values()))
        raise UserError(
            f"{name}: {parts} devices of {num_slices} slices, which would lie along data: expected "
            "as many of each; part them (rollout.devices) at the border of slices"
        )
    if _has_holes(devices):
        raise UserError(
            f"{name}: {len(devices)} chips with others between them, which TPUs cannot compute on "
            "together: expected a whole box of each slice. rollout.devices leaves one where the "
            "hosts of a slice stand in a row, rollout.processes where they fill rows; elsewhere "
            "use rollout.mesh, on all chips"
        )
    if sizes["data"] % num_slices:
        raise UserError(
            f"{name} {_spell(asked)}: data={sizes['data']} does not divide over {num_slices} "
            f"slices, which lie along it; use a multiple of {num_slices}"
        )
    types = (AxisType.Auto,) * len(AXES)
    inner = {**sizes, "data": sizes["data"] // num_slices}
    outer = dict.fromkeys(AXES, 1) | {"data": num_slices}
    # Without splitting, 4 devices along an axis have no place on a slice of 8 x 8.
    options = {"devices": devices, "allow_split_physical_axes": True}
    if num_slices == 1:
        placed = mesh_utils.create_device_mesh([*inner.values()], **options)
    else:
        placed = mesh_utils.create_hybrid_device_mesh(
            [*inner.values()], [*outer.values()], **options
        )
    return Mesh(placed, AXES, axis_types=types)


def _has_holes(devices: Sequence[jax.Device]) -> bool:
    """Whether they are chips that do not fill the box around them, slice by slice."""
    slices: dict[int, list[Any]] = {}
    for device in devices:
        where = *getattr(device, "coords", ()), getattr(device, "core_on_chip", 0)
        slices.setdefault(getattr(device, "slice_index", 0), []).append(where)
    return any(
        len(where[0]) > 1 and len(where) != np.prod(np.ptp(where, axis=0) + 1)
        for where in slices.values()
    )


def batch_shards(mesh: Mesh) -> int:
    """Parts that the rows of a batch are split into: the devices along BATCH_AXES."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _spell(sizes: Mapping[str, int]) -> str:
    return ", ".join(
        f"{axis}={size}" for axis, size in sizes.items() if size != 1 or axis == "data"
    )
