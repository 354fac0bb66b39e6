"""Mesh sizes."""

import jax
import pytest
from jax.sharding import AxisType
from pydantic import ValidationError

from alignjax.core.errors import UserError
from alignjax.sharding import MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=-1, tensor=2), (1, 4, 2)),
        (MeshConfig(data=2, fsdp=4, tensor=1), (2, 4, 1)),
    ],
)
def test_sizes(config, expected):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.items()) == tuple(
        zip(("data", "fsdp", "tensor"), expected, strict=True)
    )
    assert mesh.axis_types == (AxisType.Auto,) * 3


def test_given_devices():
    assert make_mesh(MeshConfig(), jax.devices()[:3]).devices.tolist() == [
        [[device]] for device in jax.devices()[:3]
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=2), "data=2, fsdp=1, tensor=1 does not fit 8 device"),
        (MeshConfig(fsdp=3), "data=-1, fsdp=3, tensor=1 does not fit 8 device"),
        (MeshConfig(tensor=16), "tensor=16 does not fit 8 device"),
        (MeshConfig(fsdp=-1), "at most one axis can be -1"),
    ],
)
def test_sizes_that_do_not_fit(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config)


def test_not_a_size():
    with pytest.raises(ValidationError, match="0 is not a number of devices"):
        MeshConfig(data=0)
