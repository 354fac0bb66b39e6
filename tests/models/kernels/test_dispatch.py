"""Each implementation against float64, what a token can move, and which one is chosen."""

import functools
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.models.kernels import attend, choose, chunked, dispatch
from tests.models.kernels.oracle import Inputs, attention, draw

IMPLEMENTATIONS = ("einsum", "chunked", "chunked in blocks", "xla", "splash")
SCALE = 0.3  # not head_dim**-0.5


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    if request.param == "chunked in blocks":
        small = functools.partial(chunked.chunked_attention, block=16)
        monkeypatch.setattr(dispatch, "chunked_attention", small)
        return "chunked"
    return request.param


@dataclass(frozen=True)
class Case:
    """Inputs, options of `attend` and the same for the oracle."""

    inputs: Inputs
    options: dict[str, Any] = field(default_factory=dict)
    window: int | None = None


FULL = np.ones((2, 37), int)
PACKED = np.array([[1] * 5 + [2] * 17 + [3] * 10 + [0] * 5, [1] * 20 + [2] * 16 + [3]])
LEFT_AND_RIGHT = np.array([[0] * 18 + [1] * 19, [1] * 12 + [0] * 25])
CACHED = np.array([[0] * 3 + [1] * 40, [1] * 25 + [2] * 18])
# Row 0: a trunk of 4 with branches of 6, 9 and 2, then a trunk of 3 with two of 4, then padding.
# Row 1: no trunk, a branch of 1, one of 30, and another text of a trunk alone.
BRANCHED = np.array([[1] * 21 + [2] * 11 + [0] * 5, [1] * 31 + [2] * 6])
BRANCHES = np.array([
    [0] * 4 + [1] * 6 + [2] * 9 + [3] * 2 + [0] * 3 + [1] * 4 + [2] * 4 + [0] * 5,
    [1] + [2] * 30 + [0] * 6,
], np.int32)  # fmt: skip
POSITIONS = np.array([
    [*range(4), *range(4, 10), *range(4, 13), 4, 5, *range(3), *[3, 4, 5, 6] * 2, *[0] * 5],
    [0, *range(30), *range(6)],
], np.int32)  # fmt: skip
FORKED = {"branches": BRANCHES, "positions": POSITIONS}
CASES = {
    "grouped heads": Case(draw(FULL)),
    "nine heads on three": Case(draw(PACKED, heads=9)),
    "five heads on five": Case(draw(FULL, heads=5, kv_heads=5, head_dim=12)),
    "five heads on one": Case(draw(FULL, heads=5, kv_heads=1)),
    "one token": Case(draw([[1], [0]])),
    "packed": Case(draw(PACKED)),
    "padding": Case(draw(LEFT_AND_RIGHT)),
    "window": Case(draw(PACKED), {"windows": (4,)}, 4),
    "window of one": Case(draw(FULL), {"windows": (1,)}, 1),
    "window across blocks": Case(draw(FULL), {"windows": (19,)}, 19),
    "window wider than time": Case(draw(FULL), {"windows": (100,)}, 100),
    "second of two windows": Case(draw(FULL), {"windows": (3, 7), "layer": 1}, 7),
    "soft-cap": Case(draw(PACKED), {"soft_cap": 0.7}),
    "soft-cap and window": Case(draw(FULL), {"soft_cap": 0.7, "windows": (9,)}, 9),
    "cache": Case(draw(CACHED, time=20), {"first_slot": 23}),
    "cache and window": Case(draw(CACHED, time=20), {"first_slot": 23, "windows": (6,)}, 6),
    "decoding": Case(draw(CACHED, time=1), {"first_slot": 42}),
    "branches": Case(draw(BRANCHED), FORKED),
    "branches and window": Case(draw(BRANCHED), {**FORKED, "windows": (5,)}, 5),
    "branches, soft-cap and wide window": Case(
        draw(BRANCHED), {**FORKED, "windows": (17,), "soft_cap": 0.7}, 17
    ),
}


def value_and_gradients(inputs, cotangent, **options):
    def total(q, k, v):
        out = attend(q, k, v, *inputs[3:], scale=SCALE, **options)
        return jnp.sum(out.astype(jnp.float32) * cotangent), out

    gradients, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*inputs[:3])
    return out, *gradients


def skip_what_cannot(implementation, options):
    if implementation == "xla" and "soft_cap" in options:
        pytest.skip("jax.nn.dot_product_attention has no soft-cap")
    if implementation == "splash" and "first_slot" in options:
        pytest.skip("splash attention is for whole rows")
    if implementation == "splash" and "branches" in options:
        pytest.skip("splash attention has no branches")


def cotangent_of(inputs, seed=1):
    drawn = np.random.default_rng(seed).normal(size=inputs.q.shape).astype(np.float32)
    return drawn * (inputs.query_segments > 0)[:, :, None, None]


def test_the_gradients_of_the_oracle():
    inputs = draw(PACKED[:, 3:9], heads=2, kv_heads=1, head_dim=2)
    options = {"scale": SCALE, "soft_cap": 0.7, "window": 3}
    cotangent = cotangent_of(inputs)
    gradients = attention(inputs, cotangent, **options)[1:]
    for argument, gradient in enumerate(gradients):
        for index in np.ndindex(gradient.shape):
            losses = []
            for step in (1e-5, -1e-5):
                arrays = [np.array(x, np.float64) for x in inputs[:3]]
                arrays[argument][index] += step
                moved = Inputs(*arrays, *inputs[3:])
                losses.append(np.sum(attention(moved, cotangent, **options)[0] * cotangent))
            np.testing.assert_allclose((losses[0] - losses[1]) / 2e-5, gradient[index], atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_against_float64(implementation, name):
    inputs, options = CASES[name].inputs, CASES[name].options
    skip_what_cannot(implementation, options)
    cotangent = cotangent_of(inputs)
    found = value_and_gradients(
        inputs.cast(jnp.float32), cotangent, implementation=implementation, **options
    )
    oracle_options = {key: options[key] for key in options if key not in ("windows", "layer")}
    expected = attention(
        inputs, cotangent, scale=SCALE, window=CASES[name].window, **oracle_options
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["padding", "soft-cap and window", "cache", "branches"])
def test_bfloat16_against_float64(implementation, name):
    inputs, options = CASES[name].inputs.cast(jnp.bfloat16), CASES[name].options
    skip_what_cannot(implementation, options)
    cotangent = np.asarray(jnp.asarray(cotangent_of(inputs), jnp.bfloat16), np.float32)
    found = value_and_gradients(inputs, cotangent, implementation=implementation, **options)
    oracle_options = {key: options[key] for key in options if key not in ("windows", "layer")}
    expected = attention(
        inputs, cotangent, scale=SCALE, window=CASES[name].window, **oracle_options
    )
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=0.02 * np.abs(b).max())


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_windows_by_a_traced_layer(implementation, layer):
    """Windows of layers 0 to 2: 5, none, 5."""
    inputs = draw(PACKED)

    @jax.jit
    def run(number):
        return attend(
            *inputs.cast(jnp.float32),
            scale=SCALE,
            windows=(5, None, 5),
            layer=number,
            implementation=implementation,
        )

    zeros = np.zeros_like(inputs.q)
    expected = attention(inputs, zeros, scale=SCALE, window=None if layer == 1 else 5)[0]
    np.testing.assert_allclose(run(layer), expected, atol=1e-5)


def test_gradients_by_a_traced_layer_of_a_scan(implementation):
    inputs = draw(FULL[:, :20])

    def total(q, windows_and_layers):
        def add(total, layer):
            out = attend(
                q,
                *inputs.cast(jnp.float32)[1:],
                scale=SCALE,
                windows=(4, None),
                layer=layer,
                implementation=implementation,
            )
            return total + jnp.sum(out), None

        return jax.lax.scan(jax.checkpoint(add), 0.0, windows_and_layers)[0]

    found = jax.jit(jax.grad(total))(jnp.asarray(inputs.q), jnp.arange(2))
    ones = np.ones_like(inputs.q)
    expected = sum(attention(inputs, ones, scale=SCALE, window=window)[1] for window in (4, None))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_packed_equals_unpacked(implementation):
    inputs = draw(PACKED[:1]).cast(jnp.float32)
    attended = jax.jit(
        functools.partial(attend, scale=SCALE, windows=(6,), implementation=implementation)
    )
    packed = attended(*inputs)
    for start, stop in ((0, 5), (5, 22), (22, 32)):
        part = np.s_[:, start:stop]
        segments = jnp.ones((1, stop - start), jnp.int32)
        k, v = inputs.k[..., start:stop], inputs.v[..., start:stop]
        alone = attended(inputs.q[part], k, v, segments, segments)
        np.testing.assert_allclose(packed[part], alone, atol=2e-6)


def test_a_token_moves_nothing_before_it_nor_of_others(implementation):
    """Bit for bit; and it does move the tokens after it of its own document."""
    inputs = draw(PACKED[:1])
    attended = jax.jit(functools.partial(attend, scale=SCALE, implementation=implementation))
    before = attended(*inputs.cast(jnp.float32))
    for array in (inputs.q[:, 10], inputs.k[..., 10], inputs.v[..., 10]):
        array += 1
    after = attended(*inputs.cast(jnp.float32))
    moves = np.asarray(before != after).any(axis=(0, 2, 3))
    assert np.flatnonzero(moves).tolist() == list(range(10, 22))  # document 2 is slots 5 to 21


def test_a_branch_moves_no_other(implementation):
    """Bit for bit, those before it and those after it; and it does move itself from there on."""
    skip_what_cannot(implementation, FORKED)
    inputs = draw(BRANCHED)
    attended = jax.jit(
        functools.partial(attend, scale=SCALE, implementation=implementation, **FORKED)
    )
    before = attended(*inputs.cast(jnp.float32))
    for array in (inputs.q[0, 12], inputs.k[0, ..., 12], inputs.v[0, ..., 12]):
        array += 1
    moves = np.asarray(before != attended(*inputs.cast(jnp.float32))).any(axis=(2, 3))
    assert np.argwhere(moves).tolist() == [[0, t] for t in range(12, 19)]


@pytest.mark.parametrize("garbage", [-3e4, 1e15])
def test_what_lies_on_padding_moves_nothing(implementation, garbage):
    """Outputs and gradients of tokens: the same bits. Outputs of padding are finite."""
    inputs = draw(LEFT_AND_RIGHT)
    cotangent = cotangent_of(inputs)
    run = functools.partial(value_and_gradients, implementation=implementation)
    clean = run(inputs.cast(jnp.float32), cotangent)
    b, t = np.nonzero(inputs.query_segments == 0)
    inputs.q[b, t] = inputs.k[b, :, :, t] = inputs.v[b, :, :, t] = garbage
    dirty = run(inputs.cast(jnp.float32), cotangent)
    assert all(np.isfinite(array).all() for array in dirty)
    b, t = np.nonzero(inputs.query_segments)
    for a, c in ((clean[0], dirty[0]), (clean[1], dirty[1])):
        np.testing.assert_array_equal(a[b, t], c[b, t])
    b, t = np.nonzero(inputs.query_segments == 0)
    for a, c in ((clean[2], dirty[2]), (clean[3], dirty[3])):
        np.testing.assert_array_equal(a, c)
        assert not np.asarray(c)[b, :, :, t].any()


def shape(time, slots, *, dtype=jnp.bfloat16, head_dim=64):
    q = jax.ShapeDtypeStruct((2, time, 4, head_dim), dtype)
    return q, jax.ShapeDtypeStruct((2, 2, head_dim, slots), dtype)


CPU, TPU = SimpleNamespace(platform="cpu"), SimpleNamespace(platform="tpu")
A100 = SimpleNamespace(platform="gpu", compute_capability="8.0")
H100 = SimpleNamespace(platform="gpu", compute_capability="9.0")


@pytest.mark.parametrize(
    ("device", "arrays", "soft_cap", "is_self", "expected"),
    [
        (CPU, shape(512, 512), None, True, "einsum"),
        (CPU, shape(514, 514), None, True, "chunked"),
        (CPU, shape(1, 100_000), None, False, "einsum"),
        (CPU, shape(512, 4096), None, False, "chunked"),
        (TPU, shape(4096, 4096), 50.0, True, "splash"),
        (TPU, shape(64, 64), None, True, "splash"),
        (TPU, shape(4096, 4096, dtype=jnp.float32), None, True, "chunked"),
        (TPU, shape(1, 4096), None, False, "einsum"),
        (H100, shape(4096, 4096), None, True, "cudnn"),
        (H100, shape(4096, 4096), 50.0, True, "chunked"),
        (H100, shape(4096, 4096, dtype=jnp.float32), None, True, "chunked"),
        (H100, shape(4097, 4097), None, True, "chunked"),
        (H100, shape(4096, 4096, head_dim=256), None, True, "cudnn"),
        (A100, shape(4096, 4096, head_dim=256), None, True, "chunked"),
        (A100, shape(4096, 4096, head_dim=100), None, True, "chunked"),
        (A100, shape(4096, 4096, head_dim=128), None, True, "cudnn"),
        (A100, shape(1, 4096), None, False, "einsum"),
    ],
)
def test_what_is_chosen(device, arrays, soft_cap, is_self, expected):
    assert choose(*arrays, soft_cap, is_self=is_self, device=device) == expected


@pytest.mark.parametrize(("device", "time"), [(TPU, 64), (H100, 64), (TPU, 4096), (H100, 4096)])
def test_fused_kernels_are_not_chosen_for_branches(device, time):
    chosen = choose(*shape(time, time), None, is_self=True, device=device, is_branched=True)
    assert chosen == ("einsum" if time == 64 else "chunked")


def test_auto_is_what_is_chosen():
    inputs = draw(FULL).cast(jnp.float32)
    auto, einsum = (
        attend(*inputs, scale=SCALE, implementation=name) for name in ("auto", "einsum")
    )
    np.testing.assert_array_equal(auto, einsum)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"k": np.zeros((2, 3, 8, 36), np.float32)}, r"v is \(2, 3, 8, 37\).* \(2, 3, 8, 36\)"),
        ({"key_segments": np.zeros((2, 36), int)}, r"key_segments is \(2, 36\)"),
        ({"q": np.zeros((2, 37, 7, 8), np.float32)}, "7 heads of queries cannot share 3"),
        ({"v": np.zeros((2, 3, 8, 37), jnp.bfloat16)}, "float32, float32, bfloat16"),
        ({"windows": (0,)}, r"windows=\(0,\)"),
        ({"windows": ()}, r"windows=\(\)"),
        ({"implementation": "flash"}, "'flash' is none of auto, einsum"),
        ({"implementation": "splash", "first_slot": 1}, "T = S and first_slot = 0"),
        ({"implementation": "xla", "soft_cap": 1.0}, "no soft_cap"),
        ({"implementation": "splash", **FORKED}, "splash attention has no branches"),
        ({"implementation": "cudnn", **FORKED}, "cudnn attention has no branches"),
        ({**FORKED, "first_slot": 1}, "T = S and first_slot = 0"),
        ({"branches": BRANCHES}, r"positions is None; beside branches it should be \(2, 37\)"),
        ({**FORKED, "branches": BRANCHES[:1]}, r"branches is \(1, 37\)"),
    ],
)
def test_what_is_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        attend(**{**draw(FULL)._asdict(), "scale": SCALE, **changes})
