"""The TPU's kernel on a mesh, interpreted; and compiled ahead of time where libtpu is installed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.models.kernels import attend
from alignjax.models.kernels.splash import _order
from alignjax.sharding import MeshConfig, make_mesh
from tests.models.kernels.oracle import attention, draw
from tests.models.kernels.tpu import run_for_tpu

PACKED = np.array([[1] * 5 + [2] * 7 + [0] * 3, [0] * 4 + [1] * 11])


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads"),
    [(4, 4, 2), (4, 6, 3), (4, 3, 1), (2, 4, 4)],
    ids=["all split", "keys repeated", "heads on all", "rows on all"],
)
def test_a_mesh_against_float64(rows, heads, kv_heads):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    inputs = draw(np.tile(PACKED, (rows // 2, 1)), heads=heads, kv_heads=kv_heads)
    options = {"scale": 0.3, "soft_cap": 0.7}
    cotangent = np.random.default_rng(1).normal(size=inputs.q.shape).astype(np.float32)
    cast = inputs.cast(jnp.float32)

    def total(q, k, v):
        out = attend(
            q, k, v, *cast[3:], **options, windows=(6,), implementation="splash", mesh=mesh
        )
        return jnp.sum(out * cotangent), out

    gradients, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*cast[:3])
    expected = attention(inputs, cotangent, **options, window=6)
    for a, b in zip((out, *gradients), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("window", [None, 300])
def test_a_row_split_over_devices(window):
    """Four devices along sequence, each with two parts of 128 slots: the mask is of the slots of
    the row, not of those that a device has. Attention in blocks, on one device, says what is
    right."""
    first, second = [1] * 300, [2] * 650
    inputs = draw([first + second + [0] * 40], heads=2, kv_heads=1, seed=3).cast(jnp.float32)
    mesh = make_mesh(MeshConfig(sequence=4, fsdp=1, tensor=2))
    weight = jnp.where(inputs.query_segments > 0, 1.0, 0.0)[..., None, None]
    cotangent = weight * np.random.default_rng(1).normal(size=inputs.q.shape)

    def total(qkv, **options):
        out = attend(*qkv, *inputs[3:], scale=0.3, windows=(window,), **options)
        return jnp.sum(out * cotangent), out * weight

    def of(**options):
        run = functools.partial(total, **options)
        return jax.jit(jax.grad(run, has_aux=True))(tuple(inputs[:3]))

    found, expected = of(implementation="splash", mesh=mesh), of(implementation="chunked")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_devices_along_a_row_have_as_much_to_do():
    """Of 8 parts of a row each device has two, which see as many keys as those of any other."""
    parts = np.reshape(_order(4), (4, 2))
    assert sorted(parts.ravel()) == [*range(8)]
    assert {*parts.sum(axis=1)} == {7}


@pytest.mark.parametrize("time", [128, 129, 700])
def test_every_length_that_the_kernel_is_given_is_one_of_its_blocks(time):
    """Abstractly: lengths are 128, 256 and 768."""
    inputs = draw(np.ones((1, time), int), heads=2, kv_heads=1).cast(jnp.float32)
    run = functools.partial(attend, scale=0.3, implementation="splash")
    assert jax.eval_shape(run, *inputs).shape == inputs.q.shape


COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from alignjax.models.kernels import attend
from alignjax.sharding import MeshConfig, make_mesh

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
meshes = [
    make_mesh(MeshConfig(data=1, **sizes), topology.devices)
    for sizes in ({"fsdp": 2, "tensor": 2}, {"fsdp": 2, "sequence": 2})
]
rows = ("data", "fsdp")

def kernels(mesh, time, heads, kv_heads, head_dim, **options):
    def array(spec, *shape, dtype=jnp.bfloat16):
        sharding = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def total(q, k, v, segments, layer):
        scale = head_dim**-0.5
        out = attend(q, k, v, segments, segments, scale=scale, layer=layer, mesh=mesh, **options)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    lowered = jax.jit(jax.value_and_grad(total, (0, 1, 2))).lower(
        array((rows,), 4, time, heads, head_dim),
        array((rows,), 4, kv_heads, head_dim, time),
        array((rows,), 4, kv_heads, head_dim, time),
        array((rows,), 4, time, dtype=jnp.int32),
        array((), dtype=jnp.int32),
    )
    return lowered.compile().as_text().count('custom_call_target="tpu_custom_call"')

print(
    kernels(meshes[0], 1024, 8, 4, 128),
    kernels(meshes[0], 1000, 9, 3, 64, soft_cap=50.0, windows=(300,)),
    kernels(meshes[0], 512, 4, 2, 256, windows=(128, None, 128)),
    kernels(meshes[1], 2048, 4, 2, 128, windows=(700,)),
)
"""


def test_it_compiles_for_a_tpu():
    """Three kernels each: forward, by queries, by keys; twice that for two windows."""
    done = run_for_tpu(COMPILE)
    assert done.stdout.split() == ["3", "3", "6", "3"], done.stderr
