"""One update against AdamW with clipping written out in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alignjax.core.types import Maximum, Minimum, Weighted
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.train.optim import OptimizerConfig, make_optimizer
from alignjax.train.state import create_state
from alignjax.train.step import accumulate, finalize, make_evaluate, make_step, merge

CONFIG = OptimizerConfig(
    learning_rate=0.1, schedule="linear", warmup_steps=2, final_frac=0.0, weight_decay=0.5,
    max_grad_norm=0.7,
)  # fmt: skip
RATES = [0.05, 0.1, 0.1, 0.075, 0.05]  # By hand: 2 of warm-up, then down to 0 over 4.


def linear_loss(params, batch):
    """Squared error of a linear model, over the targets of a micro-batch."""
    error = jnp.einsum("rtd,do->rto", batch["x"], params["w"]) + params["bias"] - batch["y"]
    square = jnp.where(batch["mask"], jnp.sum(error**2, -1), 0.0)
    weight = jnp.sum(batch["mask"], dtype=jnp.float32)
    return Weighted(jnp.sum(square), weight), {
        "error": Weighted(jnp.sum(jnp.where(batch["mask"], error[..., 0], 0.0)), weight),
        "worst": Maximum(jnp.max(square, initial=-jnp.inf, where=batch["mask"])),
        "best": Minimum(jnp.min(square, initial=jnp.inf, where=batch["mask"])),
    }


def start(seed=0, config=CONFIG):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    optimizer = make_optimizer(config, 6)
    step = make_step(linear_loss, optimizer)
    return create_state(params, optimizer.transform, jax.random.PRNGKey(0)), step


def rows(seed, num_rows=8, row_len=5):
    """Ragged rows, one of them without a target. Off mask lies what must not be looked at."""
    rng = np.random.default_rng([7, seed])
    mask = rng.random((num_rows, row_len)) < np.linspace(0.0, 0.9, num_rows)[:, None]
    mask[0] = False
    x = rng.normal(size=(num_rows, row_len, 3)).astype(np.float32)
    y = rng.normal(size=(num_rows, row_len, 2)).astype(np.float32)
    return {"x": x, "y": np.where(mask[..., None], y, 1e6).astype(np.float32), "mask": mask}


def split(batch, parts):
    return {k: v.reshape(parts, len(v) // parts, *v.shape[1:]) for k, v in batch.items()}


def oracle(params, batches):
    """float64: mean over targets, clip to a global norm of 0.7, AdamW with b1 0.9, b2 0.95."""
    params = {k: np.asarray(v, np.float64) for k, v in params.items()}
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(v) for k, v in params.items()}
    seen = []
    for t, (batch, rate) in enumerate(zip(batches, RATES, strict=False), start=1):
        x, y = (np.asarray(batch[k][batch["mask"]], np.float64) for k in ("x", "y"))
        error = x @ params["w"] + params["bias"] - y
        n = len(x)
        grads = {"w": 2 * x.T @ error / n, "bias": 2 * error.sum(0) / n}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        square = (error**2).sum(1)
        seen.append((square.mean(), norm, rate, error[:, 0].mean(), square.max(), square.min()))
        for k, g in grads.items():
            g = g * min(1.0, 0.7 / norm)
            m[k] = 0.9 * m[k] + 0.1 * g
            v[k] = 0.95 * v[k] + 0.05 * g**2
            update = (m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.95**t)) + 1e-8)
            decay = 0.5 * params[k] if k == "w" else 0.0
            params[k] = params[k] - rate * (update + decay)
    return params, seen


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_updates_are_those_of_adamw_written_by_hand(parts):
    state, step = start()
    batches = [rows(i) for i in range(5)]
    expected, seen = oracle(state.params, batches)
    assert max(norm for _, norm, *_ in seen) > 0.7, "clipping must be at work"
    names = ("loss", "grad_norm", "learning_rate", "error", "worst", "best")
    for batch, values in zip(batches, seen, strict=True):
        state, metrics = step(state, split(batch, parts))
        for name, value in zip(names, values, strict=True):
            assert float(metrics[name]) == pytest.approx(value, rel=2e-5, abs=1e-6), name
        assert float(metrics["num_skipped_updates"]) == 0
    for name, value in expected.items():
        np.testing.assert_allclose(state.params[name], value, rtol=2e-5, atol=2e-6)
    assert int(state.step) == 0, "the loop counts iterations"


def test_a_micro_batch_without_targets_is_not_even_looked_at():
    batch = split(rows(0), 2)
    empty = jax.tree.map(lambda x: np.full_like(x, np.nan), batch)
    empty["mask"] = np.zeros_like(batch["mask"])
    padded = {k: np.concatenate([batch[k][:1], empty[k], batch[k][1:]]) for k in batch}
    results = []
    for b in (batch, padded):
        state, step = start()
        state, metrics = step(state, b)
        results.append(jax.device_get((state.params, metrics)))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_skipping_is_at_run_time():
    calls = []

    def count(micro_batch):
        jax.debug.callback(lambda: calls.append(1))
        return {"n": jnp.sum(micro_batch["mask"], dtype=jnp.float32)}

    mask = np.zeros((4, 2, 3), bool)
    mask[[0, 3], 0, 0] = True
    out = jax.jit(lambda b: accumulate(count, b))({"mask": mask})
    jax.effects_barrier()
    assert (len(calls), float(out["n"])) == (2, 2.0)


def test_state_is_donated():
    state, step = start()
    old = state.params["w"]
    step(state, split(rows(0), 2))
    assert old.is_deleted()


def test_state_comes_back_where_it_was():
    """Left to itself, the compiler splits the bias as the columns of w are: everything that reads
    it would be compiled once more."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    state, step = start()
    state = state._replace(
        params={
            "w": jax.device_put(state.params["w"], NamedSharding(mesh, P(None, "tensor"))),
            "bias": jax.device_put(state.params["bias"], NamedSharding(mesh, P())),
        }
    )
    state = create_state(state.params, make_optimizer(CONFIG, 6).transform, state.key)
    leaves = jax.tree.leaves(state)
    assert all(isinstance(x.sharding, NamedSharding) for x in leaves), "the key and counters too"
    before = [x.sharding for x in leaves]
    for i in range(2):
        batch = jax.device_put(split(rows(i), 2), NamedSharding(mesh, P(None, ("data", "fsdp"))))
        state, _ = step(state, batch)
        assert [x.sharding for x in jax.tree.leaves(state)] == before


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_update_with_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(bad):
    state, step = start()
    state, _ = step(state, split(rows(0), 4))
    before = jax.device_get(state)
    batch = rows(1)
    where = tuple(np.argwhere(batch["mask"])[-1])
    batch["y"][where] = bad
    state, metrics = step(state, split(batch, 4))
    assert float(metrics["num_skipped_updates"]) == 1
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
    # And the next one is taken as if the bad one had not been.
    after_bad, metrics = step(state, split(rows(2), 4))
    assert float(metrics["num_skipped_updates"]) == 0
    again, step = start()
    for i in (0, 2):
        again, _ = step(again, split(rows(i), 4))
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((after_bad.params, again.params)))


def test_batch_without_targets_changes_nothing_and_is_counted():
    state, step = start()
    before = jax.device_get(state)
    batch = split(rows(0), 2)
    batch["mask"][:] = False
    state, metrics = step(state, batch)
    assert float(metrics["num_skipped_updates"]) == 1
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))


def test_loss_of_weight_0_does_not_divide_by_it():
    def loss(params, batch):
        return Weighted(jnp.sum(params["w"]), jnp.zeros(())), {}

    state, _ = start()
    step = make_step(loss, make_optimizer(CONFIG, 6))
    before = np.array(state.params["w"])
    state, metrics = step(state, split(rows(0), 1))
    np.testing.assert_array_equal(before, state.params["w"])
    assert np.isfinite([float(v) for v in metrics.values()]).all()


def test_the_weight_carries_no_gradient():
    """d(total / weight) would have another term if it did."""

    def loss(params, batch):
        return Weighted(jnp.sum(params["w"] ** 2), jnp.sum(params["w"] ** 2) + 1.0), {}

    state, _ = start()
    w = np.array(state.params["w"], np.float64)
    _, metrics = make_step(loss, make_optimizer(CONFIG, 6))(state, split(rows(0), 1))
    expected = np.linalg.norm(2 * w) / ((w**2).sum() + 1)
    assert float(metrics["grad_norm"]) == pytest.approx(expected, rel=1e-5)


def test_merge_and_finalize_by_hand():
    w = merge(Weighted(1.0, 2.0), Weighted(5.0, 1.0))
    assert float(finalize(w)) == 2.0, "6 over 3, not the mean 2.75 of the means 0.5 and 5"
    assert float(finalize(merge(Maximum(1.0), Maximum(-3.0)))) == 1.0
    assert float(finalize(merge(Minimum(1.0), Minimum(-3.0)))) == -3.0
    assert float(finalize(Weighted(jnp.float32(0.0), jnp.float32(0.0)))) == 0.0
    with pytest.raises(TypeError, match="cannot merge Weighted with Maximum"):
        merge(w, Maximum(1.0))


def test_evaluation_gives_the_same_sums_however_it_is_split():
    state, _ = start()
    batch = rows(3)
    evaluate = make_evaluate(linear_loss)
    x, y = batch["x"][batch["mask"]], batch["y"][batch["mask"]]
    square = ((x @ np.array(state.params["w"]) + np.array(state.params["bias"]) - y) ** 2).sum(1)
    for parts in (1, 4):
        loss, metrics = evaluate(state.params, split(batch, parts))
        assert float(loss.total) == pytest.approx(square.sum(), rel=1e-5)
        assert float(loss.weight) == batch["mask"].sum()
        assert float(metrics["worst"].value) == pytest.approx(square.max(), rel=1e-5)
        assert float(metrics["best"].value) == pytest.approx(square.min(), rel=1e-5)
