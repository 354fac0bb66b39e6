"""Products by groups against a loop in float64; the TPU's kernel interpreted, and compiled ahead of
time where libtpu is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.models.kernels.grouped import _tiling, choose_grouped, grouped_dot
from tests.models.kernels.tpu import run_for_tpu

WAYS = {"ragged": {}, "megablox": {"interpret": True}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "sizes", [[3, 0, 5, 2], [10, 0, 0, 0], [0, 0, 0, 0], [0, 150, 40, 62]], ids=str
)
def test_each_row_has_the_product_and_gradients_of_its_group(way, sizes):
    rng = np.random.default_rng(0)
    num_rows, depth, width = 300 if max(sizes) > 100 else 13, 5, 7
    rows = rng.standard_normal((num_rows, depth)).astype(np.float32)
    matrices = rng.standard_normal((4, depth, width)).astype(np.float32)
    cotangent = rng.standard_normal((num_rows, width)).astype(np.float32)
    group = np.repeat([0, 1, 2, 3, -1], [*sizes, num_rows - sum(sizes)])
    is_grouped = group >= 0
    expected = np.zeros((num_rows, width)), np.zeros(rows.shape), np.zeros(matrices.shape)
    for i in np.flatnonzero(is_grouped):
        row, matrix = rows[i].astype(np.float64), matrices[group[i]].astype(np.float64)
        expected[0][i] = row @ matrix
        expected[1][i] = matrix @ cotangent[i]
        expected[2][group[i]] += np.outer(row, cotangent[i])

    def total(rows, matrices):
        out = grouped_dot(
            rows, matrices, jnp.array(sizes, jnp.int32), implementation=way, **WAYS[way]
        )
        # As `models.moe` has it: nobody reads the others.
        return jnp.sum(jnp.where(is_grouped[:, None], out, 0) * cotangent), out

    # What is read in another group, or in none, would show.
    rows[~is_grouped] = 1e3
    gradients, out = jax.jit(jax.grad(total, (0, 1), has_aux=True))(rows, matrices)
    assert np.isfinite(out).all()
    out = np.where(is_grouped[:, None], out, 0)
    for found, wanted in zip((out, *gradients), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-5)


def test_blocks_divide_the_rows():
    assert _tiling(4096 + 128, 2048, 768) == (128, 1024, 768)
    assert _tiling(8192, 768, 2048) == (1024, 768, 1024)


class Chip:
    platform = "tpu"


def test_the_kernel_is_for_devices_by_themselves_and_for_what_it_does_not_round():
    assert choose_grouped(jnp.bfloat16, Chip(), is_manual=True) == "megablox"
    assert choose_grouped(jnp.bfloat16, Chip(), is_manual=False) == "ragged"
    assert choose_grouped(jnp.float32, Chip(), is_manual=True) == "ragged"
    assert choose_grouped(jnp.bfloat16, jax.devices()[0], is_manual=True) == "ragged"


COMPILE = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from alignjax.models import Model, ModelConfig
from alignjax.phases.sft import balanced_sft_loss
from alignjax.sharding import MeshConfig, batch_shards, make_mesh, shardings
import functools

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")

def kernels(**sizes):
    mesh = make_mesh(MeshConfig(**sizes), topology.devices)
    config = ModelConfig(
        family="qwen3_moe", vocab_size=512, hidden_size=256, intermediate_size=384, num_layers=2,
        num_heads=4, num_kv_heads=4, head_dim=64, num_experts=8, experts_per_token=2,
        max_position_embeddings=256,
    )
    model = Model(config, mesh=mesh, compute_dtype="bfloat16")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    where = shardings(model.logical_axes(), mesh, shapes)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
    )
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp", "expert")))
    arrays = {
        name: jax.ShapeDtypeStruct((8, 256), dtype, sharding=rows)
        for name, dtype in (("tokens", np.int32), ("segment_ids", np.int32),
                            ("positions", np.int32), ("mask", np.bool_))
    }
    loss = functools.partial(balanced_sft_loss, model, num_shards=batch_shards(mesh))
    step = jax.jit(jax.grad(lambda params, batch: loss(params, batch)[0].total))
    text = step.lower(params, arrays).compile().as_text()
    return sum("gmm" in line and "tpu_custom_call" in line for line in text.splitlines())

print(kernels(fsdp=4), kernels(fsdp=2, expert=2), kernels(fsdp=2, tensor=2))
"""


@pytest.mark.slow
def test_it_compiles_for_a_tpu():
    """Three products, each with two gradients, and what remat computes again."""
    done = run_for_tpu(COMPILE)
    alone, shared, split = map(int, done.stdout.split()) if done.stdout else (0, 0, -1)
    assert alone >= 9 and shared >= 9 and split == 0, done.stderr
