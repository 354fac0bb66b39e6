"""Adafactor, Muon, schedule-free and narrow moments: one rule each written out in float64, and what
must hold of every one: a bad gradient, a restart and devices change nothing."""

import contextlib
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from pydantic import ValidationError

from alignjax.core.types import Weighted
from alignjax.models import Model, ModelConfig
from alignjax.models.lora import LoraConfig
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.train.checkpoint import Checkpointer
from alignjax.train.matrices import are_matrices, layer_matrices
from alignjax.train.moments import Codes
from alignjax.train.optim import OptimizerConfig, averaged, make_optimizer
from alignjax.train.state import create_state
from alignjax.train.step import make_step

SHAPES = {
    "embedding": (11, 16),
    "layers": {
        "attention": {"query": {"kernel": (2, 16, 2, 4)}, "out": {"kernel": (2, 2, 4, 16)}},
        "mlp": {"up": {"kernel": (2, 16, 24)}},
        "norm": {"scale": (2, 16)},
    },
}
RATE, DECAY = 0.1, 0.5


def draw(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32), shapes, is_leaf=is_shape
    )


def walk(config, params, steps):
    """Params before the first update and after each of them, and the last state."""
    transform = make_optimizer(config, len(steps)).transform
    update, state, seen = jax.jit(transform.update), transform.init(params), [params]
    for grads in steps:
        updates, state = update(grads, state, seen[-1])
        seen.append(jax.tree.map(lambda p, u: p + u, seen[-1], updates))
    return seen, state


def config_of(name, **changes):
    return OptimizerConfig(
        name=name, learning_rate=RATE, weight_decay=DECAY, max_grad_norm=1e9, **changes
    )


# --- each against its paper -----------------------------------------------------------------------


def test_adafactor_in_float64():
    """Row and column means of each layer by itself, decay 1 - t^-0.8, updates of RMS 1 at most."""
    shapes = {"layers": {"up": {"kernel": (2, 130, 128)}, "norm": {"scale": (2, 5)}}}
    params, steps = draw(0, shapes), [draw(i, shapes) for i in (1, 2, 3)]
    for grads in steps:  # Layers far apart: pooled over both, the small one would not move.
        grads["layers"]["up"]["kernel"][1] *= 1e-3
    seen, state = walk(config_of("adafactor"), params, steps)
    w, s = (np.float64(params["layers"][k][n]) for k, n in (("up", "kernel"), ("norm", "scale")))
    row, column, second = np.zeros((2, 130)), np.zeros((2, 128)), np.zeros((2, 5))

    def clipped(update):
        rms = np.sqrt((update**2).mean(axis=tuple(range(1, update.ndim)), keepdims=True))
        return update / np.maximum(1.0, rms)

    for t, grads in enumerate(steps, start=1):
        beta = 1 - t**-0.8
        g = np.float64(grads["layers"]["up"]["kernel"])
        row = beta * row + (1 - beta) * (g**2).mean(2)
        column = beta * column + (1 - beta) * (g**2).mean(1)
        v = row[:, :, None] * column[:, None, :] / row.mean(1)[:, None, None]
        w = w - RATE * (clipped(g / np.sqrt(v)) + DECAY * w)
        g = np.float64(grads["layers"]["norm"]["scale"])
        second = beta * second + (1 - beta) * g**2
        s = s - RATE * clipped(g / np.sqrt(second))
    np.testing.assert_allclose(seen[-1]["layers"]["up"]["kernel"], w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen[-1]["layers"]["norm"]["scale"], s, rtol=1e-4, atol=1e-5)
    assert sum(x.size for x in jax.tree.leaves(state)) < 600, "no moment of 33,280 numbers"


def newton_schulz(x):
    """arXiv:2502.16982 eq. 2, with the coefficients of K. Jordan's code."""
    x = x / np.linalg.norm(x)
    x, is_tall = (x.T, True) if x.shape[0] > x.shape[1] else (x, False)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if is_tall else x


def test_muon_in_float64():
    params, steps = draw(0), [draw(i) for i in (1, 2, 3)]
    seen, _ = walk(config_of("muon"), params, steps)
    by_adamw, _ = walk(config_of("adamw"), params, steps)
    ours, theirs = seen[-1], by_adamw[-1]
    np.testing.assert_array_equal(ours["embedding"], theirs["embedding"])
    np.testing.assert_array_equal(
        ours["layers"]["norm"]["scale"], theirs["layers"]["norm"]["scale"]
    )
    for names, shape in (
        (("attention", "query", "kernel"), (16, 8)),
        (("attention", "out", "kernel"), (8, 16)),
        (("mlp", "up", "kernel"), (16, 24)),
    ):

        def leaf(tree, names=names):
            for name in ("layers", *names):
                tree = tree[name]
            return np.float64(tree)

        for layer, expected in enumerate(leaf(params)):
            w, m = expected.reshape(shape), np.zeros(shape)
            for t, grads in enumerate(steps, start=1):
                g = leaf(grads)[layer].reshape(shape)
                m = 0.95 * m + 0.05 * g
                nesterov = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
                update = 0.2 * math.sqrt(max(shape)) * newton_schulz(nesterov)
                w = w - RATE * (update + DECAY * w)
            got = np.asarray(leaf(ours)[layer]).reshape(shape)
            np.testing.assert_allclose(got, w, rtol=1e-3, atol=1e-4)


def test_muon_moves_matrices_of_layers_alone():
    """And knows from where to where each goes: by a model with every kind there is."""
    config = ModelConfig(
        family="qwen3", vocab_size=11, hidden_size=16, num_layers=2, num_heads=2, head_dim=8,
        attention_bias=True, tie_embeddings=False,
    )  # fmt: skip
    model = Model(config, lora=LoraConfig(dora=True))
    params = jax.eval_shape(model.init, jax.random.PRNGKey(0))
    params["layers"]["mlp"] |= {
        "experts": {
            "router": jax.ShapeDtypeStruct((2, 16, 4), jnp.float32),
            "down": jax.ShapeDtypeStruct((2, 4, 64, 16), jnp.float32),
        }
    }
    axes = layer_matrices(params)
    assert axes["embedding"] is axes["unembedding"] is axes["norm"]["scale"] is None
    layers = axes["layers"]
    attention, mlp = layers["attention"], layers["mlp"]
    assert attention["query"]["kernel"] == (1, (2, 3))
    assert attention["out"]["kernel"] == ((1, 2), 3)
    assert mlp["down"]["kernel"] == (1, (2,))
    assert attention["query"]["lora"]["a"] == ((1,), 2)
    assert attention["query"]["lora"]["b"] == (1, (2, 3))
    assert attention["out"]["lora"]["a"] == ((1, 2), 3)
    assert attention["out"]["lora"]["b"] == (1, (2,))
    assert mlp["experts"] == {"router": None, "down": (2, 3)}
    for other in (attention["query"]["bias"], attention["query_norm"]["scale"],
                  layers["mlp_norm"]["scale"], mlp["up"]["lora"]["magnitude"]):  # fmt: skip
        assert other is None


def test_schedule_free_in_float64():
    """Three sequences (arXiv:2405.15682 algorithm 1): z moves, x averages z by the square of the
    rate, and gradients are taken between them."""
    config = config_of("schedule_free", warmup_steps=2, b1=0.8)
    params, steps = draw(0), [draw(i) for i in range(1, 5)]
    seen, state = walk(config, params, steps)
    z = x = y = np.float64(params["embedding"])
    second, total = np.zeros_like(z), 0.0
    for t, (grads, rate) in enumerate(zip(steps, (0.05, 0.1, 0.1, 0.1), strict=True), start=1):
        g = np.float64(grads["embedding"])
        second = 0.95 * second + 0.05 * g**2
        z = z - rate * (g / (np.sqrt(second / (1 - 0.95**t)) + 1e-8) + DECAY * y)
        total += rate**2
        x = x + rate**2 / total * (z - x)
        y = 0.8 * x + 0.2 * z
        np.testing.assert_allclose(seen[t]["embedding"], y, rtol=1e-5, atol=1e-5)
    found = averaged(seen[-1], state)
    np.testing.assert_allclose(found["embedding"], x, rtol=1e-5, atol=1e-5)
    assert np.abs(x - y).max() > 0.01, "the average is another point"
    plain, state = walk(config_of("adamw"), params, steps[:1])
    assert averaged(plain[-1], state) is plain[-1]


@pytest.mark.parametrize(
    "name, moments, rel",
    [
        ("adamw", "int8", 0.05),
        ("schedule_free", "bfloat16", 0.01),
        pytest.param("adamw", "bfloat16", 0.01, marks=pytest.mark.slow),
        pytest.param("muon", "bfloat16", 0.01, marks=pytest.mark.slow),
        pytest.param("muon", "int8", 0.05, marks=pytest.mark.slow),
        pytest.param("schedule_free", "int8", 0.05, marks=pytest.mark.slow),
    ],
)
def test_narrow_moments_take_less_memory_and_lead_to_about_the_same(name, moments, rel):
    params, steps = draw(0), [draw(i) for i in range(1, 7)]
    wide, state = walk(config_of(name), params, steps)
    narrow, state_ = walk(config_of(name, moments=moments), params, steps)

    def apart(a, b):
        return math.sqrt(sum(float(jnp.sum((x - y) ** 2)) for x, y in
                             zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)))  # fmt: skip

    assert 0 < apart(wide[-1], narrow[-1]) < rel * apart(wide[-1], params)
    num_moments = {"adamw": 2, "muon": 1, "schedule_free": 1}[name]
    saved = sum(x.nbytes for x in jax.tree.leaves(state)) - sum(
        x.nbytes for x in jax.tree.leaves(state_)
    )
    sizes = [math.prod(s) for s in ((11, 16), (2, 16, 2, 4), (2, 2, 4, 16), (2, 16, 24))]
    num = num_moments * sum(sizes) + (sizes[0] if name == "muon" else 0)
    assert saved == pytest.approx(num * {"bfloat16": 2, "int8": 3}[moments], rel=0.35)
    kinds = {x.dtype.name for x in jax.tree.leaves(state_)}
    assert {"bfloat16": "bfloat16", "int8": "uint8"}[moments] in kinds


# --- what holds of each ---------------------------------------------------------------------------

FEW = {"embedding": (11, 16), "layers": {"up": {"kernel": (2, 16, 24)}, "norm": (2, 16)}}
ALL = [
    ("adafactor", "float32"),
    ("muon", "float32"),
    ("schedule_free", "int8"),
    *(
        pytest.param(name, moments, marks=pytest.mark.slow)
        for name, moments in (
            ("adamw", "float32"), ("adamw", "bfloat16"), ("adamw", "int8"), ("muon", "int8"),
            ("schedule_free", "float32"),
        )
    ),
]  # fmt: skip


def quadratic(params, batch):
    """Gradients that are the same to the last bit however rows and parameters are spread."""
    pull = batch["x"][0, 0]
    total = sum(jnp.sum(0.5 * p * p * pull) for p in jax.tree.leaves(params))
    return Weighted(total, jnp.float32(1.0)), {}


def batch(pull):
    x = np.full((1, 1, 1), pull, np.float32)
    return {"x": x, "mask": np.ones((1, 1, 1), bool)}


def after(step, state, pulls):
    skipped = []
    for pull in pulls:
        state, metrics = step(state, batch(pull))
        skipped.append(float(metrics["num_skipped_updates"]))
    return state, skipped


@pytest.mark.parametrize("name, moments", ALL)
def test_bad_gradients_restarts_and_devices_change_nothing(name, moments, tmp_path):
    optimizer = make_optimizer(config_of(name, moments=moments), 6)
    step = make_step(quadratic, optimizer)

    def start(place=lambda tree: tree):
        params = place(jax.tree.map(jnp.asarray, draw(0, FEW)))
        return create_state(params, optimizer.transform, jax.random.PRNGKey(0))

    good = (1.0, -0.5, 2.0, 1.5)
    straight, skipped = after(step, start(), good)
    assert skipped == [0.0] * 4
    expected = jax.device_get(straight)
    # Bad ones in between are counted, and that is all.
    state, skipped = after(step, start(), (1.0, math.nan, -0.5, math.inf, 2.0, 1.5))
    assert skipped == [0, 1, 0, 1, 0, 0]
    jax.tree.map(np.testing.assert_array_equal, expected, jax.device_get(state))
    # Saved and read back in the middle.
    state, _ = after(step, start(), good[:2])
    with contextlib.closing(Checkpointer(tmp_path, keep=1)) as checkpoints:
        checkpoints.save(2, state, {}, {})
        checkpoints.wait()
        _, state, _ = checkpoints.restore(start(), warn=print)
    state, _ = after(step, state, good[2:])
    jax.tree.map(np.testing.assert_array_equal, expected, jax.device_get(state))
    # On 8 devices, every matrix spread over all of them.
    mesh = make_mesh(MeshConfig(fsdp=2, data=1, tensor=4))

    def place(params):
        def one(x):
            spec = [None, "fsdp", *[None] * (x.ndim - 3), "tensor"] if x.ndim > 2 else [None, None]
            return jax.device_put(x, NamedSharding(mesh, P(*spec)))

        return jax.tree.map(one, params)

    spread = make_step(quadratic, optimizer)
    state, skipped = after(spread, start(place), good)
    assert skipped == [0.0] * 4
    kept = [x for x in jax.tree.leaves(state.opt_state) if x.size >= 256]
    if name != "adafactor":
        assert any(not x.is_fully_replicated for x in kept), "moments lie where parameters do"
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        expected.params,
        jax.device_get(state.params),
    )


def test_what_makes_no_sense_is_refused():
    for values, message in (
        ({"name": "adafactor", "moments": "int8"}, "rows and columns in place of moments"),
        ({"name": "schedule_free", "schedule": "cosine"}, "averages in place of a decay"),
        ({"name": "schedule_free", "b1": 0}, "b1=0.0"),
        ({"name": "sgd"}, "'adamw', 'adafactor', 'muon' or 'schedule_free'"),
    ):
        with pytest.raises(ValidationError, match=message):
            OptimizerConfig(**values)


def test_the_state_of_adamw_is_that_of_optax():
    """So that checkpoints of runs begun before there were other optimizers are read."""
    params = jax.tree.map(jnp.asarray, draw(0))
    config = OptimizerConfig(weight_decay=0.1)
    ours = make_optimizer(config, 1).transform.init(params)
    rule = optax.adamw(lambda count: 1e-3, weight_decay=0.1, mask=are_matrices)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), rule).init(params)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)


def codes_in(state):
    is_codes = lambda x: isinstance(x, Codes)  # noqa: E731
    return [*filter(is_codes, jax.tree.leaves(state, is_leaf=is_codes))]


def test_only_matrices_are_narrow():
    _, state = walk(config_of("adamw", moments="int8"), draw(0), [draw(1)])
    assert len(codes_in(state)) == 2 * 4
    for x in itertools.chain.from_iterable(codes_in(state)):
        assert x.ndim >= 2
