"""Axis names -> mesh axes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from alignjax.sharding import MeshConfig, fit, make_mesh, shardings

AXES = {"embedding": ("vocab", "embed"), "inner": {"out": ("layers", "heads", "head_dim", "embed")}}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def test_specs(mesh):
    found = shardings(AXES, mesh)
    assert found["embedding"].spec == PartitionSpec("tensor", "fsdp")
    assert found["inner"]["out"].spec == PartitionSpec(None, "tensor", None, "fsdp")


def test_uneven_axes_are_replicated(mesh):
    shapes = {
        "embedding": jax.ShapeDtypeStruct((23, 4), jnp.float32),
        "inner": {"out": jax.ShapeDtypeStruct((1, 2, 5, 7), jnp.float32)},
    }
    found = shardings(AXES, mesh, shapes)
    assert found["embedding"].spec == PartitionSpec(None, "fsdp")
    assert found["inner"]["out"].spec == PartitionSpec(None, "tensor", None, None)
    assert fit(shardings(AXES, mesh), shapes) == found


@pytest.mark.parametrize("shape", [(4,), (4, 4, 4)])
def test_every_axis_has_a_name(mesh, shape):
    shapes = {"a": jax.ShapeDtypeStruct(shape, jnp.float32)}
    with pytest.raises(ValueError, match="zip"):
        shardings({"a": ("vocab", "embed")}, mesh, shapes)


def test_unknown_axis(mesh):
    with pytest.raises(ValueError, match="axis 'word' has no rule"):
        shardings({"a": ("word", "embed")}, mesh)
