"""Packing, masks, caches, depth, precision and devices of the decoder."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.models import Model, ModelConfig
from alignjax.models.layers import RMSNorm
from alignjax.models.rope import rope_angles, rotate
from alignjax.sharding import MeshConfig, init_sharded, make_mesh, put_batch, shardings

CONFIG = ModelConfig(
    family="qwen3", vocab_size=19, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8,
    initializer_range=0.3,
)  # fmt: skip
MODEL = Model(CONFIG)
APPLY = jax.jit(MODEL.apply)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


def make_batch(batch=4, time=8, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 19, (batch, time)).astype(np.int32)
    positions = np.broadcast_to(np.arange(time, dtype=np.int32), (batch, time))
    return tokens, np.ones_like(tokens), positions


def test_rotation_by_hand():
    """head_dim 4, base 100: frequencies 1 and 1/10; pairs (0, 2) and (1, 3); turned forwards."""
    cos, sin = rope_angles(jnp.array([[3]], jnp.int32), 4, 100.0)
    x = jnp.array([1.0, 2.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    expected = [np.cos(3), 2 * np.cos(0.3), np.sin(3), 2 * np.sin(0.3)]
    np.testing.assert_allclose(rotate(x, cos, sin)[0, 0, 0], expected, atol=1e-6)


def test_rms_norm_by_hand():
    # mean square of (3, 4) = 12.5; with epsilon 3.5 the root is 4
    np.testing.assert_allclose(RMSNorm(2, 3.5)(jnp.array([3.0, 4.0])), [0.75, 1.0], rtol=1e-6)


def test_packed_equals_unpacked(params):
    lengths = [3, 4, 1]
    tokens, segment_ids, positions = make_batch(1, 10)
    segment_ids, positions = np.zeros((1, 10), np.int32), np.zeros((1, 10), np.int32)
    start = 0
    for number, length in enumerate(lengths, 1):
        segment_ids[0, start : start + length] = number
        positions[0, start : start + length] = np.arange(length)
        start += length
    packed, _ = APPLY(params, tokens, segment_ids, positions)
    start = 0
    for length in lengths:
        part = np.s_[:, start : start + length]
        ones = np.ones((1, length), np.int32)
        alone, _ = APPLY(params, tokens[part], ones, positions[part])
        np.testing.assert_allclose(packed[part], alone, atol=2e-5)
        start += length


OTHERS = {
    "windows": {"family": "gemma2", "sliding_window": 3, "sliding_layers": (True, False),
                "attention_soft_cap": 3.0},
    "two-bases": {"family": "gemma3_text", "sliding_window": 2, "sliding_layers": (True, False),
                  "local_rope_theta": 7.0},
    "experts": {"family": "qwen3_moe", "num_experts": 4, "experts_per_token": 2},
    "learned-positions": {"family": "gpt2", "num_kv_heads": 4},
    "no-positions": {"family": "smollm3", "rope_layers": (True, False)},
    "norms-after": {"family": "olmo2"},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_documents_of_a_row_do_not_see_each_other_in_any_family(name):
    shape = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "initializer_range": 0.3}
    model = Model(ModelConfig(vocab_size=19, **(shape | OTHERS[name])))
    params = model.init(jax.random.key(0))
    apply = jax.jit(model.apply)
    tokens, _, _ = make_batch(1, 10)
    segment_ids = np.array([[1] * 5 + [2] * 4 + [0]], np.int32)
    positions = np.array([[*range(5), *range(4), 0]], np.int32)
    packed, _ = apply(params, tokens, segment_ids, positions)
    for part in (np.s_[:, :5], np.s_[:, 5:9]):
        alone, _ = apply(params, tokens[part], np.ones_like(tokens[part]), positions[part])
        np.testing.assert_allclose(packed[part], alone, atol=2e-5)
    tokens[0, 3] = (tokens[0, 3] + 1) % 19
    after, _ = apply(params, tokens, segment_ids, positions)
    np.testing.assert_array_equal(packed[:, :3], after[:, :3])
    np.testing.assert_array_equal(packed[:, 5:9], after[:, 5:9])
    assert (np.abs(packed - after)[:, 3:5].max(-1) > 1e-3).all()


def test_a_token_changes_nothing_before_it(params):
    tokens, segment_ids, positions = make_batch(1)
    before, _ = APPLY(params, tokens, segment_ids, positions)
    tokens = tokens.copy()  # The first call may still be reading it.
    tokens[0, 5] = (tokens[0, 5] + 1) % 19
    after, _ = APPLY(params, tokens, segment_ids, positions)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before - after)[:, 5:].max(-1) > 1e-3).all()


def test_rows_of_padding_are_finite_with_finite_gradients(params):
    tokens, _, positions = make_batch()
    segment_ids = np.zeros_like(tokens)
    segment_ids[0] = 1

    def loss(params):
        hidden, _ = MODEL.apply(params, tokens, segment_ids, positions)
        return jnp.sum(hidden[0] ** 2), hidden

    gradients, hidden = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradients, hidden)))


@pytest.mark.parametrize("pad", [-1, 37, 10**6])
def test_padding_may_hold_any_id(params, pad):
    tokens, segment_ids, positions = make_batch()
    segment_ids[0, 5:] = segment_ids[1, :3] = 0
    is_real = segment_ids > 0
    hidden, _ = APPLY(params, np.where(is_real, tokens, pad), segment_ids, positions)
    expected, _ = APPLY(params, tokens, segment_ids, positions)
    assert np.isfinite(hidden).all()
    np.testing.assert_array_equal(hidden[is_real], expected[is_real])


def test_remat_gives_the_same_gradient(params):
    batch = make_batch()

    def gradient(model):
        return jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, *batch)[0] ** 3)))(params)

    plain, remat = gradient(MODEL), gradient(dataclasses.replace(MODEL, remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, remat)


def test_bfloat16(params):
    half = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    hidden, cache = jax.jit(half.apply)(params, *make_batch(), half.init_cache(4, 9))
    assert hidden.dtype == cache.k.dtype == jnp.bfloat16
    logits = half.logits(params, hidden)
    assert logits.dtype == jnp.float32
    # Of rounded factors, the sums are those of float32: rounded themselves they are off by 1e-3.
    factors = hidden, half.unembedding(params).astype(jnp.bfloat16)
    np.testing.assert_allclose(
        logits, np.matmul(*(np.asarray(x, np.float64) for x in factors)), rtol=1e-5, atol=1e-5
    )
    exact, _ = APPLY(params, *make_batch())
    error = np.abs(np.asarray(hidden, np.float32) - exact)
    assert 0 < error.mean() < 0.05
    gradient = jax.jit(jax.grad(lambda p: half.logits(p, half.apply(p, *make_batch())[0]).max()))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient(params)))


def test_scores_are_not_kept_for_the_backward_pass(params):
    """What the layers keep grows with T, not with T^2."""
    time = 24
    _, backward = jax.vjp(lambda p: MODEL.apply(p, *make_batch(2, time))[0], params)
    shapes = [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.size > 1]
    assert (2, 2, time, 32) in shapes  # [L, B, T, D]
    assert not [
        shape for shape in shapes if shape.count(time) > 1 and shape[0] == 2 and len(shape) > 3
    ]


def test_float32_matmuls_ask_for_float32(params):
    """Where the default is fewer bits (GPU, TPU), float32 must be asked for, everywhere."""

    def logits(params, *batch):
        return MODEL.logits(params, MODEL.apply(params, *batch)[0])

    text = jax.jit(logits).lower(params, *make_batch()).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(dots) >= 9
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in dots)


def test_the_program_does_not_grow_with_depth(params):
    def size(num_layers):
        model = Model(CONFIG.model_copy(update={"num_layers": num_layers}))
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        step = jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, *make_batch())[0])))
        return len(step.lower(shapes).as_text().splitlines())

    # Two layers to a turn of the loop: of 2 layers there is no loop left.
    assert size(4) == size(12)


def test_cache_is_updated_in_place(params):
    """No copy of the cache, of one layer's or of all of it, in the compiled decode loop."""
    cache = MODEL.init_cache(6, 48)

    def decode(params, cache):
        def step(_, carry):
            cache, tokens = carry
            positions = jnp.full((6, 1), cache.index)
            hidden, cache = MODEL.apply(params, tokens, jnp.ones_like(tokens), positions, cache)
            return cache, MODEL.logits(params, hidden[:, -1]).argmax(-1, keepdims=True)

        return jax.lax.fori_loop(0, 4, step, (cache, jnp.zeros((6, 1), int)))

    compiled = jax.jit(decode, donate_argnums=1).lower(params, cache).compile()
    shape = ",".join(map(str, cache.k.shape))
    copies = re.findall(rf"= f32\[{shape}\]\S* copy\(.*", compiled.as_text())
    assert not copies
    assert compiled.memory_analysis().alias_size_in_bytes >= cache.k.nbytes + cache.v.nbytes


def test_logical_axes_match_params(params):
    axes = MODEL.logical_axes()
    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    jax.tree.map(
        lambda a, p: np.testing.assert_equal(len(a), p.ndim), axes, params, is_leaf=is_axes
    )
    assert axes["layers"]["attention"]["out"]["kernel"] == ("layers", "heads", "head_dim", "embed")


def test_init(params):
    jax.tree.map(np.testing.assert_array_equal, params, MODEL.init(jax.random.key(0)))
    query = params["layers"]["attention"]["query"]["kernel"]
    assert query.std() == pytest.approx(0.3, rel=0.05)
    assert np.abs(query[0] - query[1]).mean() > 0.1  # each layer has numbers of its own
    assert np.abs(query - params["layers"]["mlp"]["gate"]["kernel"][..., :1, None]).mean() > 0.1


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_one_and_eight_devices(sizes):
    """Loss and gradient of a sharded model and batch equal those of one device."""
    batch = dict(zip(("tokens", "segment_ids", "positions"), make_batch(8), strict=True))

    def loss(params, batch):
        return jnp.mean(jnp.square(MODEL.logits(params, MODEL.apply(params, **batch)[0])))

    step = jax.jit(jax.value_and_grad(loss))
    single = MODEL.init(jax.random.key(1))
    expected, expected_gradient = step(single, batch)
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    params = init_sharded(MODEL.init, jax.random.key(1), shardings(MODEL.logical_axes(), mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, single)
    value, gradient = step(params, put_batch(batch, mesh))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradient,
        expected_gradient,
    )
