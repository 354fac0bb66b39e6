"""Mesh sizes."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from pydantic import ValidationError

from alignjax.core.config import build, loads, to_dict
from alignjax.core.errors import UserError
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.sharding.mesh import AXES


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MeshConfig(), (8, 1, 1, 1, 1)),
        (MeshConfig(fsdp=2, tensor=2), (2, 2, 1, 1, 2)),
        (MeshConfig(data=1, fsdp=-1, tensor=2), (1, 4, 1, 1, 2)),
        (MeshConfig(data=2, fsdp=4, tensor=1), (2, 4, 1, 1, 1)),
        (MeshConfig(fsdp=-1), (1, 8, 1, 1, 1)),
        (MeshConfig(sequence=4), (2, 1, 4, 1, 1)),
        (MeshConfig(data=1, expert=4, fsdp=2), (1, 2, 1, 4, 1)),
        (build(MeshConfig, loads("fsdp: -1\ntensor: 4\n")), (1, 2, 1, 1, 4)),
    ],
)
def test_sizes(config, expected):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.items()) == tuple(zip(AXES, expected, strict=True))
    assert mesh.axis_types == (AxisType.Auto,) * 5


def test_what_is_saved_is_what_was_meant():
    """A run's directory holds all defaults: read again, they mean the same."""
    config = MeshConfig(fsdp=-1)
    assert MeshConfig.model_validate(to_dict(config)) == config
    assert to_dict(config)["data"] == 1 and to_dict(MeshConfig(fsdp=2))["data"] == -1


def test_given_devices():
    assert make_mesh(MeshConfig(), jax.devices()[:3]).devices.ravel().tolist() == jax.devices()[:3]


def test_neighbours_share_the_last_axes():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    assert [d.id for d in mesh.devices[0, 0, 0, 0]] == [0, 1]


@dataclass(frozen=True)
class Chip:
    """As much of a device of a multi-slice pod as a mesh looks at."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "none"
    process_index: int = 0


def test_slices_lie_along_data():
    chips = [Chip(i, i // 4) for i in range(8)]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), chips[::-1])
    slices = [[d.slice_index for d in part.ravel()] for part in mesh.devices]
    assert slices == [[0] * 4, [1] * 4]
    with pytest.raises(UserError, match="data=1 does not divide over 2 slices"):
        make_mesh(MeshConfig(fsdp=-1), chips)
    with pytest.raises(UserError, match=r"^rollout.mesh: 4, 2 devices of 2 slices.* as many of"):
        make_mesh(MeshConfig(data=2, fsdp=3), chips[:6], name="rollout.mesh")


@dataclass(frozen=True)
class TorusChip(Chip):
    """The same of one of 8 x 8 in a torus."""

    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


@pytest.mark.parametrize("num_slices", [1, 2])
def test_an_axis_may_take_a_part_of_one_of_the_torus(num_slices):
    chips = [
        TorusChip(i, i // 64, "tpu", "TPU v6 lite", coords=(i % 8, i // 8 % 8, 0))
        for i in range(64 * num_slices)
    ]
    mesh = make_mesh(MeshConfig(data=num_slices, fsdp=-1, expert=4), chips)
    assert mesh.shape["fsdp"] == 16
    for group in np.moveaxis(mesh.devices, 3, -1).reshape(-1, 4):
        assert len({chip.slice_index for chip in group}) == 1
        places = np.array([chip.coords for chip in group])
        assert np.ptp(places, axis=0).sum() == 3  # Side by side along one axis of the torus.


@pytest.mark.parametrize("num_slices", [1, 2])
def test_chips_with_others_between_them_are_refused(num_slices):
    """The last two of the four of each host, in slices of 2 x 4 and 4 x 4: the former are a box."""

    def last_of(hosts_wide, hosts_high):
        hosts = [
            (part, across, up)
            for part in range(num_slices)
            for up in range(hosts_high)
            for across in range(hosts_wide)
        ]
        return [
            TorusChip(4 * number + i, part, "tpu", "TPU v6 lite", number,
                      coords=(2 * across + i % 2, 2 * up + i // 2, 0))
            for number, (part, across, up) in enumerate(hosts)
            for i in (2, 3)
        ]  # fmt: skip

    assert make_mesh(MeshConfig(data=num_slices, fsdp=-1), last_of(2, 1)).shape["fsdp"] == 4
    with pytest.raises(UserError, match=r"^rollout.mesh: \d+ chips with others between them"):
        make_mesh(MeshConfig(data=num_slices, fsdp=-1), last_of(2, 2), name="rollout.mesh")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=2), "data=2 does not fit 8 device.*multiply to 2; change them"),
        (MeshConfig(fsdp=3), "data=-1, fsdp=3 does not fit 8 .*3 does not divide 8.*to 2"),
        (MeshConfig(tensor=16), "tensor=16 does not fit 8 device"),
        (MeshConfig(fsdp=-1, tensor=-1), "at most one axis can be -1"),
    ],
)
def test_sizes_that_do_not_fit(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config)


def test_not_a_size():
    with pytest.raises(ValidationError, match="0 is not a number of devices"):
        MeshConfig(data=0)
