"""The same loss and gradients whatever axes a mesh has, and nothing gathered that need not be."""

import functools
import re

import jax
import numpy as np
import pytest

from alignjax.models import Model, ModelConfig
from alignjax.phases.sft import balanced_sft_loss
from alignjax.sharding import (
    MeshConfig,
    batch_shards,
    init_sharded,
    make_mesh,
    put_batch,
    shardings,
)

ROWS, LENGTH, WIDTH, LAYERS, VOCAB = 8, 24, 16, 3, 40
MESHES = {
    "fsdp 8": {"fsdp": -1},
    "tensor 8": {"data": 1, "tensor": 8},
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "sequence 4": {"sequence": 4},
    "expert 4": {"expert": 4},
}


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    first = rng.integers(5, LENGTH - 5, (ROWS, 1))  # Two texts in a row, and padding.
    slots = np.arange(LENGTH) * np.ones((ROWS, 1), np.int32)
    segments = np.where(slots < first, 1, np.where(slots < LENGTH - 2, 2, 0))
    positions = np.where(segments == 2, slots - first, slots)
    mask = (segments > 0) & (positions > 2)
    arrays = {"tokens": tokens, "segment_ids": segments, "positions": positions}
    return {k: v.astype(np.int32) for k, v in arrays.items()} | {"mask": mask}


def compiled(mesh, batch):
    """The program of the loss and its gradient, and what it gives, with inputs on the mesh."""
    model = Model(
        ModelConfig(
            family="mixtral", vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48,
            num_layers=LAYERS, num_heads=8, num_kv_heads=8, head_dim=4, num_experts=4,
            experts_per_token=2, sliding_window=5, max_position_embeddings=LENGTH,
            initializer_range=0.4,
        ),
        mesh=mesh,
    )  # fmt: skip
    key, num_shards = jax.random.key(1), 1
    if mesh is None:
        params = model.init(key)
    else:
        params = init_sharded(model.init, key, shardings(model.logical_axes(), mesh))
        batch, num_shards = put_batch(batch, mesh), batch_shards(mesh)
        gate = params["layers"]["mlp"]["gate"].addressable_shards[0].data
        assert gate.shape[1] == 4 // mesh.shape["expert"]
    loss = functools.partial(balanced_sft_loss, model, num_shards=num_shards)
    function = jax.jit(jax.value_and_grad(lambda p, b: loss(p, b)[0].total))
    program = function.lower(params, batch).compile()
    return program.as_text(), jax.device_get(program(params, batch))


@pytest.fixture(scope="module")
def expected(batch):
    return compiled(None, batch)[1]


@pytest.mark.parametrize("name", MESHES)
def test_meshes_change_nothing(name, batch, expected):
    text, (loss, grads) = compiled(make_mesh(MeshConfig(**MESHES[name])), batch)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)

    def close(found, wanted):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5 * np.abs(wanted).max())

    jax.tree.map(close, grads, expected[1])
    gathers = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
    for shape in (tuple(map(int, sizes.split(","))) for sizes in gathers):
        assert shape[0] != LAYERS or len(shape) < 3, f"{shape}: parameters of all layers at once"
        assert VOCAB not in shape or np.prod(shape) <= VOCAB * WIDTH, f"{shape}: logits"
        whole = {(ROWS, LENGTH, WIDTH), (ROWS * LENGTH, WIDTH), (ROWS * LENGTH * 2, WIDTH)}
        assert shape not in whole or name == "tensor 8", f"{shape}: tokens of the whole batch"
