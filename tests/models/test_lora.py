"""Adapters: a float64 oracle of each kind, merging, gradients, dropout, devices."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from alignjax.core.errors import UserError
from alignjax.models import Model, ModelConfig, lora, transformer
from alignjax.models.layers import Linear
from alignjax.models.lora import Adapter, LoraConfig
from alignjax.sharding import MeshConfig, make_mesh, put_batch, shardings

CONFIG = ModelConfig(
    family="qwen3", vocab_size=19, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8,
    intermediate_size=48, attention_bias=True, initializer_range=0.3,
)  # fmt: skip
KINDS = {
    "lora": LoraConfig(rank=3, alpha=6),
    "rslora": LoraConfig(rank=3, alpha=6, rslora=True),
    "dora": LoraConfig(rank=3, alpha=6, dora=True),
    "some": LoraConfig(rank=3, alpha=6, targets=("attention.query", "mlp.*")),
}
TOKENS = np.random.default_rng(0).integers(0, 19, (8, 8)).astype(np.int32)
BATCH = {
    "tokens": TOKENS,
    "segment_ids": np.ones_like(TOKENS),
    "positions": np.tile(np.arange(8, dtype=np.int32), (8, 1)),
}


# Compiled as wholes: one by one, their operations take most of the time of these tests.
INIT, MERGE, QUANTIZE = (
    jax.jit(function, static_argnums=0) for function in (lora.init, lora.merge, lora.quantize)
)
NEW = jax.jit(Model.init, static_argnums=0)


def make(kind="lora", quantize=None, **changes):
    """Model, base and new adapters."""
    config = KINDS[kind].model_copy(update=changes)
    model = Model(CONFIG, lora=config, quantize=quantize)
    base = NEW(Model(CONFIG), jax.random.key(0))
    if quantize is not None:
        base = QUANTIZE(model, base)
    return model, base, INIT(model, base, jax.random.key(1))


def moved(tree):
    """As if it had been trained."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noise)


def forward(model, params, **more):
    return model.logits(params, model.apply(params, **BATCH, **more)[0])


logits = jax.jit(forward, static_argnums=0)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("inputs", [("embed",), ("heads", "head_dim")])
def test_against_float64(kind, inputs):
    rng = np.random.default_rng(0)
    sizes = {"embed": 12, "heads": 3, "head_dim": 4}
    outputs = ("heads", "head_dim") if inputs == ("embed",) else ("embed",)
    linear = Linear(
        {name: sizes[name] for name in inputs}, {name: sizes[name] for name in outputs},
        bias=True, std=1.0, rngs=nnx.Rngs(0),
    )  # fmt: skip
    linear.lora = Adapter(linear, KINDS[kind], nnx.Rngs(1))
    arrays = {"b": linear.lora.b, "bias": linear.bias}
    if kind == "dora":
        arrays["m"] = linear.lora.magnitude
    for array in arrays.values():
        array.set_value(jnp.asarray(rng.normal(size=array.shape), jnp.float32))
    x = rng.normal(size=(2, 5, 12))
    f64 = lambda array, *shape: np.asarray(array[...], np.float64).reshape(shape)  # noqa: E731
    w, a, b = f64(linear.kernel, 12, 12), f64(linear.lora.a, 12, 3), f64(linear.lora.b, 3, 12)
    scale = 6 / math.sqrt(3) if kind == "rslora" else 6 / 3
    total = w + scale * (a @ b)
    if kind == "dora":
        total = total * f64(arrays["m"], 12) / np.sqrt((total**2).sum(0))
    expected = x @ total + f64(linear.bias, 12)
    found = linear(jnp.asarray(x, jnp.float32).reshape(2, 5, *linear.kernel.shape[: len(inputs)]))
    np.testing.assert_allclose(np.reshape(found, (2, 5, 12)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, quantize", [("rslora", None), ("some", "nf4")])
def test_new_adapters_change_nothing(kind, quantize):
    """Bit for bit where operations are compiled one by one; fused, sums may be made otherwise."""
    model, base, adapters = make(kind, quantize)
    params = lora.combine(base, adapters)
    with jax.disable_jit():
        expected = forward(lora.base(model), base)
        np.testing.assert_array_equal(forward(model, params), expected)
    np.testing.assert_allclose(logits(model, params), expected, atol=1e-4)
    if quantize is None:
        merged = MERGE(model, params)
        jax.tree.map(np.testing.assert_array_equal, merged, base)


def test_new_dora_changes_nothing():
    model, base, adapters = make("dora")
    found = logits(model, lora.combine(base, adapters))
    np.testing.assert_allclose(found, logits(lora.base(model), base), atol=1e-4)
    kernel = np.asarray(base["layers"]["mlp"]["down"]["kernel"], np.float64)
    magnitude = adapters["layers"]["mlp"]["down"]["lora"]["magnitude"]
    np.testing.assert_allclose(magnitude, np.sqrt((kernel**2).sum(1)), rtol=1e-6)


def test_how_they_start():
    """As PEFT: kaiming_uniform(sqrt(5)) is uniform in +-1 / sqrt(inputs); b is 0."""
    _, _, adapters = make(rank=64)
    a = adapters["layers"]["attention"]["out"]["lora"]["a"]
    assert a.shape == (2, 4, 8, 64) and a.dtype == np.float32
    assert 0.98 / math.sqrt(32) < np.abs(a).max() <= 1 / math.sqrt(32)
    assert np.std(a) == pytest.approx(1 / math.sqrt(3 * 32), rel=0.05)
    assert np.abs(a[0] - a[1]).mean() > 0.05  # each layer has numbers of its own
    query, key = (adapters["layers"]["attention"][name]["lora"] for name in ("query", "key"))
    assert np.abs(query["a"] - key["a"]).mean() > 0.05
    assert not np.any(query["b"]) and query["b"].shape == (2, 64, 4, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_merged_equals_unmerged(kind, quantize):
    model, base, adapters = make(kind, quantize)
    params = lora.combine(base, moved(adapters))
    merged = MERGE(model, params)
    found = logits(Model(CONFIG), merged)
    np.testing.assert_allclose(found, logits(model, params), rtol=1e-4, atol=1e-4)
    assert np.abs(found - logits(lora.base(model), base)).max() > 0.5
    assert jax.tree.map(np.shape, merged) == jax.tree.map(
        np.shape, Model(CONFIG).init(jax.random.key(0))
    )


def test_split_and_combine():
    model, base, adapters = make("dora")
    params = lora.combine(base, adapters)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, shapes)
    again, rest = lora.split(params)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    assert jax.tree.structure(rest) == jax.tree.structure(base)
    same = jax.tree.map(lambda a, b: a is b, (again, rest), (adapters, base))
    assert all(jax.tree.leaves(same))
    assert lora.split(base) == ({}, base)
    assert "lora" not in base["layers"]["mlp"]["up"], "the base is left as it was"


def test_gradients_against_differences():
    """Of the adapters, by float32 differences along a direction; DoRA's norm is held fixed."""
    model, base, adapters = make("lora")
    adapters = moved(adapters)

    @jax.jit
    def loss(adapters):
        return jnp.mean(jnp.square(logits(model, lora.combine(base, adapters))))

    gradient = jax.jit(jax.grad(loss))(adapters)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapters)
    step = jax.tree.map(lambda x: 1e-3 * jnp.sign(x), gradient)
    up, down = (
        loss(jax.tree.map(lambda x, s: x + sign * s, adapters, step)) for sign in (1, -1)  # noqa: B023
    )  # fmt: skip
    expected = sum(jax.tree.leaves(jax.tree.map(lambda g, s: 2 * jnp.sum(g * s), gradient, step)))
    assert float(up - down) == pytest.approx(float(expected), rel=0.03)


def test_the_norm_of_dora_passes_no_gradient_on():
    """Else the gradient in b would have no part along the merged weights of an output."""
    linear = Linear({"embed": 5}, {"mlp": 4}, bias=False, std=1.0, rngs=nnx.Rngs(0))
    linear.lora = Adapter(linear, KINDS["dora"], nnx.Rngs(1))
    rng = np.random.default_rng(0)
    linear.lora.b.set_value(jnp.asarray(rng.normal(size=(3, 4)), jnp.float32))
    x, ahead = rng.normal(size=(6, 5)), rng.normal(size=(6, 4))
    graph, state = nnx.split(linear)
    gradient = jax.grad(lambda s: jnp.sum(ahead * nnx.merge(graph, s)(jnp.float32(x))))(state)
    w, a, b, m = (
        np.asarray(p[...], np.float64)
        for p in (linear.kernel, linear.lora.a, linear.lora.b, linear.lora.magnitude)
    )
    norm = np.sqrt(((w + 2 * a @ b) ** 2).sum(0))
    expected = 2 * a.T @ x.T @ (ahead * m / norm)
    np.testing.assert_allclose(gradient["lora"]["b"][...], expected, rtol=1e-4, atol=1e-4)
    expected = (ahead * (x @ (w + 2 * a @ b))).sum(0) / norm
    np.testing.assert_allclose(gradient["lora"]["magnitude"][...], expected, rtol=1e-4, atol=1e-4)


def test_dropout_by_its_mean_and_spread():
    linear = Linear({"embed": 6}, {"mlp": 4}, bias=False, std=1.0, rngs=nnx.Rngs(0))
    config = KINDS["lora"].model_copy(update={"dropout": 0.25})
    linear.lora = Adapter(linear, config, nnx.Rngs(1))
    linear.lora.b.set_value(jnp.ones((3, 4)))
    x = jnp.ones((40_000, 6))
    whole = linear(x)[0]
    linear.lora.dropout_key = jax.random.key(3)
    found = np.asarray(linear(x), np.float64)
    np.testing.assert_allclose(found.mean(0), whole, atol=0.02)
    # Each input times 0 or 4/3: variance 1/3 of its part, which is 2 * the sum of its row of a.
    spread = np.sqrt(((2 * np.asarray(linear.lora.a[...]).sum(1)) ** 2).sum() / 3)
    np.testing.assert_allclose(found.std(0), spread, rtol=0.02)


def test_dropout_of_the_model():
    """Its key decides; layers and projections differ; without a key nothing is left out."""
    model, base, adapters = make(dropout=0.5)
    params = lora.combine(base, moved(adapters))
    first, again, other = (
        logits(model, params, dropout_key=jax.random.key(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    without = logits(dataclasses.replace(model, lora=KINDS["lora"]), params)
    np.testing.assert_array_equal(logits(model, params), without)
    layer = model._layer.build(nnx.Rngs(0))
    lora.set_dropout(layer, jax.random.key(0))
    keys = [x.lora.dropout_key for x in lora.linears(layer).values()]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 7


def test_each_layer_drops_other_inputs(monkeypatch):
    model, base, adapters = make(dropout=0.5)
    seen = []

    def spy(layer, key):
        jax.debug.callback(lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(key))

    monkeypatch.setattr(transformer, "set_dropout", spy)
    forward(model, lora.combine(base, adapters), dropout_key=jax.random.key(1))
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == 2


def test_targets():
    _, _, adapters = make("some")
    assert sorted(adapters["layers"]) == ["attention", "mlp"]
    assert sorted(adapters["layers"]["attention"]) == ["query"]
    assert sorted(adapters["layers"]["mlp"]) == ["down", "gate", "up"]
    message = (
        r"lora.targets: 'q_proj' names no projection; there are attention.key, attention.out, "
        r"attention.query, attention.value, mlp.down, mlp.gate, mlp.up"
    )
    with pytest.raises(UserError, match=message):
        make(targets=("mlp.up", "q_proj"))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_one_and_eight_devices(kind, quantize):
    model, base, adapters = make(kind, quantize)
    adapters = moved(adapters)

    def loss(adapters, base, batch):
        params = lora.combine(base, adapters)
        return jnp.mean(jnp.square(model.logits(params, model.apply(params, **batch)[0])))

    step = jax.jit(jax.value_and_grad(loss))
    expected, expected_gradient = step(adapters, base, BATCH)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = lora.combine(base, adapters)
    placed = jax.device_put(params, shardings(model.logical_axes(), mesh, params))
    split = placed["layers"]["mlp"]["up"]["lora"]["b"].sharding.spec
    assert tuple(split) == (None, None, "tensor")
    adapters, base = lora.split(placed)
    value, gradient = step(adapters, base, put_batch(BATCH, mesh))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        gradient, expected_gradient,
    )  # fmt: skip


def test_bfloat16():
    model, base, adapters = make("dora", "nf4")
    half = dataclasses.replace(model, compute_dtype="bfloat16")
    params = lora.combine(base, moved(adapters))
    hidden, _ = half.apply(params, **BATCH)
    assert hidden.dtype == jnp.bfloat16
    exact, _ = model.apply(params, **BATCH)
    assert 0 < np.abs(np.asarray(hidden, np.float32) - exact).mean() < 0.1


def test_no_product_is_made_as_large_as_a_kernel():
    """Neither the merged weights nor the gradient of the frozen ones."""
    for kind in ("lora", "dora"):
        model, base, adapters = make(kind)

        def loss(adapters, base, model=model):
            return jnp.sum(logits(model, lora.combine(base, adapters)))

        text = jax.jit(jax.grad(loss)).lower(adapters, base).as_text()
        dots = [x for x in text.splitlines() if "stablehlo.dot_general" in x]
        assert len(dots) > 20
        assert not [x for x in dots if "-> tensor<32x48x" in x or "-> tensor<48x32x" in x]
