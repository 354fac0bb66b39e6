"""Blocks: which are computed, what is kept for the backward pass, and how much memory it takes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.models.kernels import RESIDUALS
from alignjax.models.kernels.chunked import chunked_attention
from alignjax.sharding import MeshConfig, make_mesh
from tests.models.kernels.oracle import attention, draw

SCALE = 0.3
PACKED = np.array([[1] * 5 + [2] * 17 + [3] * 10 + [0] * 5, [0] * 9 + [1] * 12 + [2] * 16])


def gradients_and_value(inputs, **options):
    def total(q, k, v):
        out = chunked_attention(q, k, v, *inputs[3:], scale=SCALE, **options)
        return jnp.sum(out), out

    gradients, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*inputs[:3])
    return out, *gradients


@pytest.mark.parametrize("block", [5, 8, 36, 37, 64])
def test_any_block_gives_the_same(block):
    inputs = draw(PACKED)
    found = gradients_and_value(inputs.cast(jnp.float32), block=block, window=11)
    expected = attention(inputs, np.ones_like(inputs.q), scale=SCALE, window=11)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("block", [4, 7, 64])
def test_a_trunk_is_seen_from_far_away(block):
    """By positions it is near: blocks in between, of the first branch, are none of the window's."""
    inputs = draw(np.ones((1, 30), int))
    branches = np.array([[0] * 4 + [1] * 20 + [2] * 6], np.int32)
    positions = np.array([[*range(4), *range(4, 24), *range(4, 10)]], np.int32)
    options = {"window": 5, "branches": branches, "positions": positions}
    found = gradients_and_value(inputs.cast(jnp.float32), block=block, **options)
    expected = attention(inputs, np.ones_like(inputs.q), scale=SCALE, **options)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("window", [1, 8, 9, 16, 17])
@pytest.mark.parametrize("first_slot", [0, 1, 5, 8, 23])
def test_traced_windows_and_slots_at_the_edges_of_blocks(window, first_slot):
    inputs = draw(np.ones((1, 40), int), time=16, heads=1, kv_heads=1)

    @jax.jit
    def run(window, first_slot):
        return gradients_and_value(
            inputs.cast(jnp.float32), block=8, window=window, first_slot=first_slot
        )

    ones = np.ones_like(inputs.q)
    expected = attention(inputs, ones, scale=SCALE, window=window, first_slot=first_slot)
    for a, b in zip(run(window, first_slot), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_blocks_that_no_query_sees_are_not_computed():
    """Blocks of 8, queries in slots 24 to 31, window 8: keys 17 to 31, so blocks 2 and 3."""
    inputs = draw(np.ones((1, 48), int), time=8)
    for array in (inputs.k, inputs.v):
        array[..., :16] = array[..., 32:] = np.nan
    found = gradients_and_value(inputs.cast(jnp.float32), block=8, window=8, first_slot=24)
    assert all(np.isfinite(array).all() for array in found)
    for gradient in found[2:]:
        assert not gradient[..., :16].any() and not gradient[..., 32:].any()
        assert np.asarray(gradient[..., 17:32]).any(axis=(0, 1, 2)).all()


def test_a_query_that_sees_nothing():
    """Zero, with zero gradients; its cotangent is not zero here."""
    inputs = draw(np.ones((1, 8), int))
    inputs.query_segments[:] = 7  # the queries' array is another one than the keys'
    inputs = inputs._replace(key_segments=np.ones((1, 8), np.int32))
    for array in gradients_and_value(inputs.cast(jnp.float32), block=4):
        np.testing.assert_array_equal(array, 0.0)


def test_memory_does_not_grow_with_the_square_of_time():
    def temporary(time):
        shapes = [(1, time, 2, 16), (1, 1, 16, time), (1, 1, 16, time)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        segments = jax.ShapeDtypeStruct((1, time), jnp.int32)

        def total(q, k, v, segments):
            return jnp.sum(chunked_attention(q, k, v, segments, segments, scale=SCALE))

        lowered = jax.jit(jax.value_and_grad(total, (0, 1, 2))).lower(*arrays, segments)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(1024), temporary(4096)
    assert large < 4.5 * small and large < 4096 * 4096  # a byte for each pair


def test_the_forward_pass_is_not_run_twice_where_its_residuals_are_kept():
    inputs = draw(np.ones((1, 8), int)).cast(jnp.float32)

    def loops(policy):
        @functools.partial(jax.checkpoint, policy=policy)
        def total(q):
            return jnp.sum(jnp.sin(chunked_attention(q, *inputs[1:], scale=SCALE, block=4)))

        text = jax.jit(jax.value_and_grad(total)).lower(inputs.q).as_text()
        return len(re.findall(r"stablehlo\.while", text))

    # Two loops forward, two backward, and two again where nothing was kept.
    kept = loops(jax.checkpoint_policies.save_only_these_names(RESIDUALS))
    assert (kept, loops(None)) == (4, 6)


def test_eight_devices_give_what_one_does():
    inputs = draw(np.tile(PACKED, (2, 1)), heads=4, kv_heads=2).cast(jnp.float32)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = ("data", "fsdp")
    specs = [(rows, None, "tensor"), (rows, "tensor"), (rows, "tensor"), (rows,), (rows,)]
    split = type(inputs)(
        *(
            jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))
            for x, spec in zip(inputs, specs, strict=True)
        )
    )
    one, eight = gradients_and_value(inputs, block=8), gradients_and_value(split, block=8)
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
