"""Presets end to end, from hidden states to the gradient: against papers, and however laid out."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alignjax import losses
from alignjax.losses.presets import LEVELS, TOKEN_ADVANTAGES
from tests.losses.layouts import LENGTHS, OTHERS, PACKED, PLAIN, lay_out, targets

D, V, MAX_LEN = 5, 11, 16


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
                "old": -rng.exponential(2.0, length).astype(np.float32),
                "ref": -rng.exponential(2.0, length).astype(np.float32),
                "adv": np.full(length, rng.normal(), np.float32),
            }
        )
    return made


def rows(layout=PLAIN, time=12, left=False):
    return lay_out(sequences(), layout, time, left)


def rl_loss(algorithm, unembedding, batch):
    mask = batch["mask"]
    out = losses.next_token_logps(
        batch["hidden"], unembedding, batch["tokens"], mask, chunk_size=3, with_entropy=True
    )
    found = losses.policy_loss(
        algorithm, out.logps, batch["old"], batch["ref"], batch["adv"], mask, batch["segment_ids"],
        max_len=MAX_LEN,
    )  # fmt: skip
    bonus = losses.token_mean(losses.entropy_bonus(out.entropies, mask), mask)
    return found.loss.total + 0.01 * bonus.total, found.loss


def lm_loss(unembedding, batch):
    mask = batch["mask"]
    out = losses.next_token_logps(batch["hidden"], unembedding, batch["tokens"], mask)
    loss = losses.token_mean(losses.cross_entropy(out.logps, mask), mask)
    return loss.total, loss


LOSSES = {"lm": lm_loss} | {
    name: functools.partial(rl_loss, algorithm) for name, algorithm in losses.PRESETS.items()
}
everywhere = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.fixture(scope="module")
def unembedding():
    return jnp.asarray(np.random.default_rng(5).normal(size=(D, V)), jnp.float32)


def gradient(loss):
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def same(a, b):
    scale = max(np.abs(x).max(initial=1.0) for x in jax.tree.leaves(b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6 * scale)


@everywhere
def test_layout_does_not_matter(loss, unembedding):
    grad = gradient(loss)
    plain = grad(unembedding, rows())
    assert plain[0][0] != 0 and np.abs(plain[1]).max() > 0.1
    for layout in OTHERS:
        same(grad(unembedding, rows(*layout)), plain)


@everywhere
def test_micro_batches_add_up(loss, unembedding):
    grad = gradient(loss)
    whole = grad(unembedding, rows())
    parts = [grad(unembedding, rows(PLAIN[i : i + 2], 12)) for i in range(0, 8, 2)]
    total = jax.tree.map(lambda *x: sum(x), *parts)
    if loss is LOSSES["bnpo"]:  # the mean of means, as its name says
        assert total[0][1].weight == 4 and abs(total[0][1].total / 4 - whole[0][1].total) > 1e-3
    else:
        same(total, whole)


@everywhere
def test_devices_do_not_matter(loss, unembedding):
    devices = jax.devices()[:8]
    assert len(devices) == 8
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,), devices=devices)
    grad = gradient(loss)
    batch = rows()
    spread = jax.device_put(batch, NamedSharding(mesh, P("data")))
    replicated = jax.device_put(unembedding, NamedSharding(mesh, P()))
    compiled = grad.lower(replicated, spread).compile()
    same(compiled(replicated, spread), grad(unembedding, batch))
    assert "all-gather" not in compiled.as_text()


@everywhere
def test_gradients_only_where_they_should_be(loss, unembedding):
    batch = rows()
    floats = {name: batch[name] for name in ("hidden", "old", "ref", "adv")}

    def total(floats):
        return loss(unembedding, {**batch, **floats})[0]

    grads = jax.jit(jax.grad(total))(floats)
    for name in ("old", "ref", "adv"):
        assert (grads[name] == 0).all()
    predicts = np.roll(batch["mask"], -1, axis=1)
    assert (np.asarray(grads["hidden"])[~predicts] == 0).all()
    assert (np.asarray(grads["hidden"])[predicts] != 0).any(-1).all()


# --- against the papers ---------------------------------------------------------------------------


def oracle(name, logp, old, ref, adv):
    """A preset's loss, from lists of sequences (float64 arrays of tokens), as its paper has it."""
    total = weight = 0.0
    for lp, lo, lr, a in zip(logp, old, ref, adv, strict=True):
        T, r = len(lp), np.exp(lp - lo)
        clip = lambda r, low, high, a: -np.minimum(r * a, np.clip(r, 1 - low, 1 + high) * a)  # noqa: E731
        d = lp - lr
        match name:
            case "grpo":
                total += np.mean(clip(r, 0.2, 0.2, a) + 0.04 * (np.exp(-d) - 1 + d))
                weight += 1
            case "bnpo" | "dapo" | "ppo" | "reinforce_pp":
                total += clip(r, 0.2, 0.28 if name == "dapo" else 0.2, a).sum()
                weight += T
            case "reinforce_pp_baseline":
                total += (clip(r, 0.2, 0.2, a) + 0.001 * d**2 / 2).sum()
                weight += T
            case "dr_grpo":
                total += clip(r, 0.2, 0.2, a).sum()
                weight += MAX_LEN
            case "gdpo":
                total += clip(r, 0.2, 0.2, a).mean()
                weight += 1
            case "gspo":
                total += clip(np.exp((lp - lo).mean()), 3e-4, 4e-4, a)
                weight += 1
            case "rloo":
                total += clip(np.exp((lp - lo).sum()), 0.2, 0.2, a)
                weight += 1
            case "gmpo":
                worse = np.minimum if a > 0 else np.maximum
                log_r = worse(lp - lo, np.clip(lp - lo, -0.4, 0.4))
                total += -a * np.prod(np.exp(log_r)) ** (1 / T)
                weight += 1
            case "sapo":
                tau = 1.0 if a > 0 else 1.05
                total += np.mean(-4 / tau / (1 + np.exp(-tau * (r - 1))) * a)
                weight += 1
            case "remax" | "opo":
                total += -(a * lp).sum()
                weight += 1
            case "gpg":
                total += -(a * lp).sum()
                weight += T
            case _:
                raise AssertionError(f"no oracle of {name}")
    return (total / weight, 1.0) if name == "bnpo" else (total, weight)


@pytest.mark.parametrize("name", [n for n in losses.PRESETS if n != "cispo"])
def test_presets_are_the_papers(name):
    made = sequences()
    rng = np.random.default_rng(1)
    for sequence in made:
        noise = rng.normal(0, 0.3, len(sequence["old"])).astype(np.float32)
        sequence["logp"] = sequence["old"] + noise
    names = ("logp", "old", "ref")
    args = [[np.float64(s[n][targets(len(s[n]))]) for s in made] for n in names]
    expected = oracle(name, *args, [float(s["adv"][0]) for s in made])
    batch = lay_out(made, PACKED, 15)
    found = losses.policy_loss(
        losses.PRESETS[name], *(batch[n] for n in (*names, "adv", "mask", "segment_ids")),
        max_len=MAX_LEN,
    )  # fmt: skip
    np.testing.assert_allclose(found.loss, expected, rtol=2e-5)


def test_cispo_is_token_mean_of_its_surrogate():
    """What CISPO's gradient is, -sg(clip(r)) A grad log p, is tested with the surrogate."""
    cispo = losses.PRESETS["cispo"]
    assert (cispo.advantage, cispo.surrogate, cispo.reduction) == (
        "group_zscore", "cispo", "token_mean",
    )  # fmt: skip
    assert cispo.level == "token_level" and not cispo.kl_coef


ADVANTAGES = {
    "ppo": "gae", "grpo": "group_zscore", "dr_grpo": "group_center", "bnpo": "group_zscore",
    "dapo": "group_zscore", "gspo": "group_zscore", "gmpo": "group_zscore",
    "cispo": "group_zscore", "sapo": "group_zscore", "rloo": "leave_one_out",
    "reinforce_pp": "reinforce_pp", "reinforce_pp_baseline": "reinforce_pp_baseline",
    "remax": "remax", "opo": "opo", "gdpo": "gdpo", "gpg": "gpg",
}  # fmt: skip


def test_advantages_and_rewards_of_the_presets():
    assert {name: a.advantage for name, a in losses.PRESETS.items()} == ADVANTAGES
    in_reward = {n: (a.kl, a.kl_coef) for n, a in losses.PRESETS.items() if a.kl_in_reward}
    assert in_reward == {
        "ppo": ("k1", 0.05), "rloo": ("k1", 0.05), "reinforce_pp": ("k1", 0.001),
        "remax": ("k1", 0.05),
    }  # fmt: skip


def test_nobody_changes_a_preset_for_everybody():
    with pytest.raises(dataclasses.FrozenInstanceError):
        losses.PRESETS["grpo"].kl_coef = 0.0


def test_every_advantage_of_outcomes():
    """That each name gives its function what it needs; the functions are tested by themselves."""
    rng = np.random.default_rng(0)
    rewards, parts = rng.normal(size=(5, 4)), rng.normal(size=(5, 4, 2))
    valid, lengths = rng.random((5, 4)) < 0.8, rng.integers(1, 9, (5, 4), np.int32)
    greedy = rng.normal(size=5)
    o = losses.Outcomes(*map(jnp.asarray, (rewards, valid, lengths, parts, greedy)))
    expected = {
        "group_zscore": losses.group_zscore(o.rewards, o.is_valid),
        "group_center": losses.group_center(o.rewards, o.is_valid),
        "leave_one_out": losses.leave_one_out(o.rewards, o.is_valid),
        "reinforce_pp_baseline": losses.reinforce_pp_baseline(o.rewards, o.is_valid),
        "remax": losses.remax(o.rewards, o.greedy_rewards, o.is_valid),
        "opo": losses.opo(o.rewards, o.lengths, o.is_valid),
        "gpg": losses.gpg(o.rewards, o.is_valid),
        "gdpo": losses.gdpo(o.part_rewards, o.is_valid),
    }
    assert expected.keys() == losses.ADVANTAGES.keys()
    for name, advantage in expected.items():
        np.testing.assert_array_equal(losses.ADVANTAGES[name](o), advantage)


def test_every_token_advantage():
    x, on, ids = jnp.array([[1.0, 2.0]]), jnp.ones((1, 2), bool), jnp.ones((1, 2), jnp.int32)
    zero = jnp.zeros((1, 2))
    # lambda 0.5: delta = (1 + 0 - 0, 2); A = (1 + 0.5 * 2, 2)
    out = TOKEN_ADVANTAGES["gae"](x, zero, zero, on, ids, gae_lambda=0.5)
    assert out.tolist() == [[2.0, 2.0]]
    # returns to go 3 and 2: mean 2.5, standard deviation 0.5
    np.testing.assert_allclose(
        TOKEN_ADVANTAGES["reinforce_pp"](x, on, ids), [[1.0, -1.0]], rtol=1e-5
    )


def test_levels():
    logp = jnp.log(jnp.array([[0.5, 0.25, 0.5]]))
    on, ids = jnp.ones((1, 3), bool), jnp.array([[1, 1, 2]])
    halves = {
        "token_level": [1, 2, 1], "sequence_level": [3, 3, 1],
        "sequence_mean_level": [1.5, 1.5, 1], "sequence_token_level": [1.5, 1.5, 1],
    }  # fmt: skip
    assert halves.keys() == LEVELS.keys()
    for name, powers in halves.items():
        expected = [[-math.log(2) * p for p in powers]]
        np.testing.assert_allclose(LEVELS[name](logp, on, ids), expected, rtol=1e-6)


def test_a_name_that_is_in_no_list():
    with pytest.raises(ValueError, match="surrogate='ppo': expected one of ppo_clip, dual_clip"):
        losses.Algorithm("group_zscore", "ppo", "token_mean")
    with pytest.raises(ValueError, match="level='word': expected one of token_level"):
        losses.Algorithm("group_zscore", "ppo_clip", "token_mean", level="word")


def test_a_reference_that_is_missing():
    x, on, ids = jnp.zeros((1, 2)), jnp.ones((1, 2), bool), jnp.ones((1, 2), jnp.int32)
    with pytest.raises(ValueError, match=r"ref_logp=None with kl_coef=0\.04"):
        losses.policy_loss(losses.PRESETS["grpo"], x, x, None, x, on, ids, max_len=2)
    assert losses.policy_loss(losses.PRESETS["ppo"], x, x, None, x, on, ids, max_len=2).kl is None


def test_importance_weights_by_hand():
    """On policy, where a term is -A and the KL is 0 for the third token alone; the last is off."""
    zeros, on = jnp.zeros((1, 4)), jnp.array([[True, True, True, False]])
    ids, advantages = jnp.ones((1, 4), jnp.int32), jnp.array([[1.0, 1.0, -1.0, 9.0]])
    rollout = jnp.array([[-math.log(0.5), -math.log(5.0), 0.0, jnp.inf]])
    ref = jnp.array([[-1.0, -1.0, 0.0, jnp.nan]])
    k3 = math.exp(-1) - 1 + 1
    grpo = dataclasses.replace(losses.PRESETS["grpo"], importance_cap=2.0)
    found = losses.policy_loss(
        grpo, zeros, zeros, ref, advantages, on, ids, max_len=4, rollout_logp=rollout
    )
    np.testing.assert_allclose(found.weights, [[0.5, 2.0, 1.0, 0.0]], rtol=1e-6)
    terms = 0.5 * (-1 + 0.04 * k3) + 2 * (-1 + 0.04 * k3) + 1
    assert float(found.loss.total) == pytest.approx(terms / 3, rel=1e-6)
    # Of a whole sequence: the cube root of 0.5 * 5 * 1.
    gspo = dataclasses.replace(losses.PRESETS["gspo"], importance_cap=2.0)
    found = losses.policy_loss(
        gspo, zeros, zeros, None, advantages, on, ids, max_len=4, rollout_logp=rollout
    )
    np.testing.assert_allclose(found.weights, [[2.5 ** (1 / 3)] * 3 + [0.0]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"rollout_logp=None with importance_cap=2\.0"):
        losses.policy_loss(gspo, zeros, zeros, None, advantages, on, ids, max_len=4)


def test_importance_weights_have_no_gradient():
    """Nor has what they are made of."""
    algorithm = dataclasses.replace(losses.PRESETS["dapo"], importance_cap=2.0)
    on, ids = jnp.ones((1, 3), bool), jnp.ones((1, 3), jnp.int32)

    def total(logp, old, rollout):
        return losses.policy_loss(
            algorithm, logp, old, None, jnp.ones((1, 3)), on, ids, max_len=3, rollout_logp=rollout
        ).loss.total

    rollout = jnp.log(jnp.array([[2.0, 1.0, 0.1]]))
    grads = jax.grad(total, argnums=(0, 1, 2))(jnp.zeros((1, 3)), jnp.zeros((1, 3)), rollout)
    np.testing.assert_allclose(grads[0], [[-0.5, -1.0, -2.0]], rtol=1e-6)
    assert not np.any(grads[1]) and not np.any(grads[2])
