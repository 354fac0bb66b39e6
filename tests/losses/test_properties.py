"""What every loss owes: the same gradient however the same sequences are laid out and split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alignjax import losses

D, V = 5, 11
LENGTHS = (9, 4, 7, 2, 12, 3, 5, 8)
FIELDS = {"tokens": 0, "mask": False, "old": np.nan, "ref": np.inf, "adv": np.nan}


def sequences():
    """Each a dict of arrays over time; the first half of each is a prompt."""
    rng = np.random.default_rng(4)
    made = []
    for length in LENGTHS:
        hidden = rng.normal(size=(length, D)).astype(np.float32)
        made.append(
            {
                "hidden": hidden,
                "tokens": rng.integers(0, V, length).astype(np.int32),
                "mask": np.arange(length) >= (length + 1) // 2,
                "old": -rng.exponential(2.0, length).astype(np.float32),
                "ref": -rng.exponential(2.0, length).astype(np.float32),
                "adv": np.full(length, rng.normal(), np.float32),
            }
        )
    return made


def rows(layout, time, left=False):
    """Lays sequences out, layout [[i, j], [k], ...] by row; padding is dirt."""
    made, shape = sequences(), (len(layout), time)
    out = {name: np.full(shape, dirt, made[0][name].dtype) for name, dirt in FIELDS.items()}
    out["hidden"] = np.full((*shape, D), np.nan, np.float32)
    out["segments"] = np.zeros(shape, np.int32)
    for row, members in enumerate(layout):
        at = time - sum(LENGTHS[i] for i in members) if left else 0
        for segment, i in enumerate(members, 1):
            where = slice(at, at + LENGTHS[i])
            for name, x in made[i].items():
                out[name][row, where] = x
            out["segments"][row, where] = segment
            at += LENGTHS[i]
    return out


PLAIN = [[i] for i in range(8)]
PACKED = [[0, 1], [4], [2, 3, 5], [7, 6]]


def reduced(loss, batch):
    """All reductions at once, in unequal parts so that no error cancels another."""
    mask, segments = batch["mask"], batch["segments"]
    sums = {
        "token_mean": losses.token_mean(loss, mask),
        "sequence_mean": losses.sequence_mean(loss, mask, segments),
        "fixed_length": losses.fixed_length(loss, mask, segments, max_len=16),
    }
    total = sum(k * sums[name].total for k, name in zip((0.2, 1.0, 0.1), sums, strict=True))
    return total, sums


def rl_loss(unembedding, batch):
    """Clip, KL and entropy on chunked log-probs: all that a GRPO step asks of this package."""
    mask = batch["mask"]
    out = losses.next_token_logps(
        batch["hidden"], unembedding, batch["tokens"], mask, chunk_size=3, with_entropy=True
    )
    clipped = losses.ppo_clip(out.logps, batch["old"], batch["adv"], mask)
    loss = clipped.loss + 0.1 * losses.k3(out.logps, batch["ref"], mask) - 0.01 * out.entropies
    return reduced(loss, batch)


def lm_loss(unembedding, batch):
    mask = batch["mask"]
    out = losses.next_token_logps(batch["hidden"], unembedding, batch["tokens"], mask)
    return reduced(losses.cross_entropy(out.logps, mask), batch)


@pytest.fixture(scope="module")
def unembedding():
    return jnp.asarray(np.random.default_rng(5).normal(size=(D, V)), jnp.float32)


def gradient(loss):
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", [rl_loss, lm_loss])
def test_layout_does_not_matter(loss, unembedding):
    grad = gradient(loss)
    plain = grad(unembedding, rows(PLAIN, 12))
    assert plain[0][0] != 0 and np.abs(plain[1]).max() > 0.1
    same(grad(unembedding, rows(PLAIN, 19)), plain)
    same(grad(unembedding, rows(PLAIN, 19, left=True)), plain)
    same(grad(unembedding, rows(PACKED, 15)), plain)
    same(grad(unembedding, rows([*PACKED, []], 21, left=True)), plain)


def test_micro_batches_add_up(unembedding):
    grad = gradient(rl_loss)
    whole = grad(unembedding, rows(PLAIN, 12))
    parts = [grad(unembedding, rows(PLAIN[i : i + 2], 12)) for i in range(0, 8, 2)]
    same(jax.tree.map(lambda *x: sum(x), *parts), whole)


def test_devices_do_not_matter(unembedding):
    devices = jax.devices()[:8]
    assert len(devices) == 8
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,), devices=devices)
    grad = gradient(rl_loss)
    batch = rows(PLAIN, 12)
    spread = jax.device_put(batch, NamedSharding(mesh, P("data")))
    replicated = jax.device_put(unembedding, NamedSharding(mesh, P()))
    compiled = grad.lower(replicated, spread).compile()
    same(compiled(replicated, spread), grad(unembedding, batch))
    assert "all-gather" not in compiled.as_text()


def test_gradients_only_where_they_should_be(unembedding):
    batch = rows(PLAIN, 12)
    floats = {name: batch[name] for name in ("hidden", "old", "ref", "adv")}

    def loss(floats):
        return rl_loss(unembedding, {**batch, **floats})[0]

    grads = jax.jit(jax.grad(loss))(floats)
    for name in ("old", "ref", "adv"):
        assert (grads[name] == 0).all()
    predicts = np.roll(batch["mask"], -1, axis=1)
    assert (np.asarray(grads["hidden"])[~predicts] == 0).all()
    assert (np.asarray(grads["hidden"])[predicts] != 0).any(-1).all()
