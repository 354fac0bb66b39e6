"""Codes of frozen kernels: levels by the paper's definition, by hand, bounds and bytes."""

import dataclasses
from statistics import NormalDist

import jax
import numpy as np
import pytest
from flax import nnx

from alignjax.models import Model, ModelConfig, load, lora, save
from alignjax.models.layers import Linear
from alignjax.models.quantize import BLOCK, KERNELS, NF4, num_bytes, quantize_linear
from alignjax.sharding import MeshConfig, make_mesh

MODEL = Model(ModelConfig(vocab_size=19, hidden_size=128, num_heads=4, num_kv_heads=2))


def linear(kernel, num_inputs=1):
    kernel = np.asarray(kernel, np.float32)
    names = ("embed", "heads", "head_dim")[: kernel.ndim]
    sizes = dict(zip(names, kernel.shape, strict=True))
    inputs = {name: sizes.pop(name) for name in names[:num_inputs]}
    made = Linear(inputs, sizes, bias=False, std=1.0, rngs=nnx.Rngs(0))
    made.kernel = nnx.Param(kernel)
    return made


def test_nf4_levels_are_quantiles_of_a_normal_distribution():
    """arXiv:2305.14314 sec. 3: 8 quantiles below 0 and 9 from 0 on, the outermost as far out as the
    mean of 1/32 and 1/30, each half divided by the largest."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.sort([*positive, 0.0, *negative]) / quantile(offset)
    np.testing.assert_allclose(levels, NF4, atol=1e-6)
    assert len(NF4) == 16 and NF4[0] == -1 and NF4[7] == 0 and NF4[15] == 1


def test_int8_by_hand():
    """Scales 2.54 / 127 = 0.02 and 1 / 127; the output without weights stays 0."""
    made = linear([[2.54, 0.5, 0], [-0.031, -1, 0]])
    quantize_linear(made, "int8")
    np.testing.assert_array_equal(made.kernel.codes, [[127, 64, 0], [-2, -127, 0]])
    assert made.kernel.codes.dtype == np.int8
    np.testing.assert_allclose(made.kernel.scale, [0.02, 1 / 127, 0], rtol=1e-6)
    np.testing.assert_allclose(
        made.kernel[...], [[2.54, 64 / 127, 0], [-0.04, -1, 0]], rtol=1e-6
    )  # fmt: skip


def test_nf4_by_hand():
    """Two blocks of inputs, the second cut short, each with its largest; the nearest level."""
    kernel = np.zeros((70, 2))
    kernel[:3, 0] = 2.0, -1.0, 0.35  # 1, -0.5, 0.175 -> 1, -0.525, 0.161
    kernel[40, 0] = -0.95  # -0.475 -> -0.525: in the upper half of a byte
    kernel[64:67, 0] = -0.5, 0.04, 0.01  # -1, 0.08, 0.02 -> -1, 0.0796, 0
    made = linear(kernel)
    quantize_linear(made, "nf4")
    assert made.kernel.codes.shape == (2, 32, 2) and made.kernel.codes.dtype == np.uint8
    np.testing.assert_array_equal(made.kernel.scale, [[2, 0], [0.5, 0]])
    expected = np.zeros((70, 2))
    expected[:3, 0] = 2.0, 2 * -0.5250730514526367, 2 * 0.16093020141124725
    expected[40, 0] = 2 * -0.5250730514526367
    expected[64:67, 0] = -0.5, 0.5 * 0.07958029955625534, 0
    np.testing.assert_allclose(made.kernel[...], expected, rtol=1e-6)


@pytest.mark.parametrize("shape, num_inputs", [((128, 6), 1), ((4, 24, 10), 2), ((6, 4, 3), 1)])
@pytest.mark.parametrize("kind", KERNELS)
def test_errors_are_at_most_half_of_the_widest_step(kind, shape, num_inputs):
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    made = linear(kernel, num_inputs)
    quantize_linear(made, kind)
    found = made.kernel[...]
    assert found.shape == shape and found.dtype == np.float32
    flat = kernel.reshape(-1, *shape[num_inputs:])
    error = np.abs(found - kernel).reshape(flat.shape)
    if kind == "int8":
        bound = np.abs(flat).max(0) / 127 / 2
        assert (error <= bound * 1.001).all()
    else:
        # Between -1 and the next level lies the widest gap.
        for start in range(0, len(flat), BLOCK):
            block = slice(start, start + BLOCK)
            bound = np.abs(flat[block]).max(0) * (1 - 0.6961928) / 2
            assert (error[block] <= bound * 1.001).all()
    assert np.sqrt((error**2).mean()) > 1e-3, "the bound holds something"


@pytest.mark.parametrize("kind, share", [("int8", 1 / 4 + 1 / 128), ("nf4", 1 / 8 + 1 / 64)])
def test_bytes_of_the_base(kind, share):
    """Of a float32 kernel: a byte, or half of one, for four; and a scale for each output and all
    inputs (128, 384), or each 64 of them."""
    params = MODEL.init(jax.random.key(0))
    model = dataclasses.replace(MODEL, quantize=kind)
    coded = jax.jit(lambda p: lora.quantize(model, p))(params)
    names = {"mlp": ("gate", "up", "down"), "attention": ("query", "key", "value", "out")}
    kernels = [
        [tree["layers"][part][name]["kernel"] for part in names for name in names[part]]
        for tree in (params, coded)
    ]
    before, after = map(num_bytes, kernels)
    assert before == 4 * 2 * (3 * 128 * 384 + 2 * 128 * 128 + 2 * 128 * 64)
    assert share * 0.97 < after / before <= share
    # All else is as it was.
    assert num_bytes(params) - num_bytes(coded) == before - after


def test_products_are_those_of_what_the_codes_stand_for():
    params = MODEL.init(jax.random.key(0))
    for kind in KERNELS:
        model = dataclasses.replace(MODEL, quantize=kind)
        coded = jax.jit(lora.quantize, static_argnums=0)(model, params)
        jax.tree.map(
            lambda axes, x: np.testing.assert_equal(len(axes), x.ndim),
            model.logical_axes(), coded, is_leaf=lambda node: isinstance(node, tuple),
        )  # fmt: skip
        tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
        batch = tokens, np.ones_like(tokens), tokens % 8
        restored = jax.jit(lora.merge, static_argnums=0)(model, coded)
        assert jax.tree.map(np.shape, restored) == jax.tree.map(np.shape, params)
        apply = jax.jit(Model.apply, static_argnums=0)
        found, expected = apply(model, coded, *batch)[0], apply(MODEL, restored, *batch)[0]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert np.abs(found - apply(MODEL, params, *batch)[0]).max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe"])
@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("tensor", [1, 2])
def test_codes_made_while_reading_are_those_of_what_is_read(tmp_path, family, kind, tensor):
    config = ModelConfig(
        family=family, vocab_size=11, hidden_size=64, num_heads=4, num_kv_heads=2, num_layers=3
    )
    plain = Model(config)
    save(tmp_path, plain, plain.init(jax.random.key(0)))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4 // tensor, tensor=tensor), jax.devices()[:4])
    model, found = load(tmp_path, mesh=mesh, quantize=kind)
    assert model == dataclasses.replace(plain, quantize=kind, mesh=mesh)
    _, params = load(tmp_path)
    expected = jax.jit(lora.quantize, static_argnums=0)(model, params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="quantize='int3' is unknown; use one of int8, nf4"):
        quantize_linear(linear(np.ones((2, 2))), "int3")
