"""Three numbers -> a mesh of devices with the axes data, fsdp and tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh
from pydantic import field_validator

from alignjax.core.config import Config
from alignjax.core.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
"""The mesh axes that rows of a batch are split over."""


class MeshConfig(Config):
    """How many devices along each axis; one of them may be -1: all that are left.

    Attributes:
      data: rows are split, parameters repeated.
      fsdp: rows are split, and parameters and optimizer state too.
      tensor: heads, MLP width and vocabulary are split.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    @field_validator("data", "fsdp", "tensor")
    @classmethod
    def _check(cls, size: int) -> int:
        if size < 1 and size != -1:
            raise ValueError(
                f"{size} is not a number of devices; use 1 or more, or -1 for the rest"
            )
        return size


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices (of all processes), or of those given.

    All axes are Auto: sharded arrays go in, and the compiler propagates.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1:
        raise UserError(f"mesh {_spell(sizes)}: at most one axis can be -1 (all that are left)")
    if -1 in sizes:
        others = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = len(devices) // others
    if math.prod(sizes) != len(devices):
        asked = [config.data, config.fsdp, config.tensor]
        raise UserError(
            f"mesh {_spell(asked)} does not fit {len(devices)} device(s): the sizes must multiply "
            "to the number of devices; change them, or set one to -1"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Parts that the rows of a batch are split into: the devices along data and fsdp."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _spell(sizes: Sequence[int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
