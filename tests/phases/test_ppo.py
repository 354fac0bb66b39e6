"""An iteration of PPO against an independent one, sequence by sequence in float64: samples and
rewards are made up. The whole with a real sampler is in test_ppo_runs.py."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from alignjax.core.errors import UserError
from alignjax.core.types import LENGTH, STOP, Completions, Sample, Sampling, Score
from alignjax.models import Model, ModelConfig, ScalarModel, save_reward
from alignjax.phases import rollouts, scoring
from alignjax.phases.ppo import Ppo
from alignjax.phases.ppo_config import PpoAlgorithm, PpoConfig
from alignjax.phases.ppo_loss import ppo_loss
from alignjax.phases.ppo_rows import best_of_n, diagnose, explained_variance
from alignjax.recipes import chains
from alignjax.rewards.rollout import Rollouts, Task
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.text import load_tokenizer, vocab_tokenizer
from alignjax.train.loop import StopRunError
from tests import alone

SHAPE = {
    "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    chains.write(
        folder, seed=0, num_questions=30, num_drills=1, num_train=40, num_test=6, num_ops=(1, 2)
    )
    tokenizer = load_tokenizer(folder / "tokenizer")
    reward = ScalarModel(Model(ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE)))
    ids = {"pad_token_id": tokenizer.pad_id}
    save_reward(folder / "rm", reward, reward.init(jax.random.key(2)), extra_config=ids)
    tokenizer.save(str(folder / "rm"))
    (folder / "rm/reward.json").write_text(json.dumps({"mean": 0.3, "std": 0.5, "num": 9}))
    return folder


LENGTHS = np.array([3, 8, 1, 5, 8, 2, 7, 8], np.int32)
TOKENS = np.random.default_rng(0).integers(7, 17, (8, 8), dtype=np.int32)
LOGPS = -1.5 - np.random.default_rng(1).random((8, 8)).astype(np.float32)
REWARDS = [0.3, -1.0, None, 2.0, 0.5, 0.5, -0.25, 1.5]


def frozen(params, prompts, lengths, key, sampling):
    """Always the same completions; those of 8 tokens were cut."""
    on = np.arange(8) < LENGTHS[:, None]
    reasons = np.where(LENGTHS == 8, LENGTH, STOP).astype(np.int8)
    return Completions(np.where(on, TOKENS, 0), LENGTHS, np.where(on, LOGPS, 0), reasons)


def rewards(samples):
    return [Score(None, error="no luck") if r is None else Score(r) for r in REWARDS]


def values_of(world, **changes):
    return {
        "phase": "ppo", "name": "x", "tokenizer": str(world / "tokenizer"),
        "model": {"init": SHAPE},
        "data": {
            "train": str(world / "train.jsonl"), "eval": str(world / "test.jsonl"),
            "text": {"fields": {"prompt": "prompt", "reference": "reference"}},
            "micro_batches": 2, **changes.pop("data", {}),
        },
        "rollout": {
            "num_prompts": 8, "max_prompt_tokens": 16, "max_tokens": 8, "temperature": 0.7,
            **changes.pop("rollout", {}),
        },
        "algorithm": {
            "kl_coef": 0.2, "gamma": 0.97, "gae_lambda": 0.9, "value_coef": 0.3, "value_clip": 0.05,
            "num_epochs": 2, "num_minibatches": 1, "missing_eos_penalty": 0.4,
            **changes.pop("algorithm", {}),
        },
        "critic": {"path": str(world / "rm")},
        "rewards": {"functions": {"f": {"function": "verify.exact"}}},
        "evaluation": {"num_problems": 6},
        **changes,
    }  # fmt: skip


@pytest.fixture
def make(world, monkeypatch):
    def build(score=rewards, **changes):
        monkeypatch.setattr(rollouts, "make_generate", lambda model, **_: frozen)
        monkeypatch.setattr(scoring, "RewardPool", lambda config, **_: score)
        mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
        return Ppo(PpoConfig.model_validate(values_of(world, **changes)), mesh)

    return build


WIDTH = 24
"""Of all rows, so that little is compiled."""


# --- the independent one ------------------------------------------------------------------------


def logps_of(model, params, texts, temperature):
    """[N, WIDTH - 1]: log-probs of the tokens after the first, and more than a text has."""
    return alone.next_logps(model, params, temperature, *alone.rows(*texts, width=WIDTH))


def values_before(phase, params, texts):
    """[N, WIDTH]: values of the states in which the tokens after the first were chosen, and more:
    each is read at the token before."""
    rows = alone.rows(*texts, width=WIDTH)
    if "value_head" in params:
        hidden = alone.hidden(phase._policy.model, params["policy"], *rows)
        head, offset = params["value_head"], 0.0
    else:
        decoder = phase._critic._model.decoder
        hidden = alone.hidden(decoder, params["critic"]["decoder"], *rows)
        head, offset = params["critic"]["head"], 0.3 / 0.5  # As rm/reward.json has it.
    return hidden.astype(jnp.float32) @ head["kernel"] - offset


def f64(x):
    return np.asarray(x, np.float64)


def chain(algorithm, sequences):
    """Rewards with KL, GAE and whitening, by loops. Adds advantages and returns."""
    for s in sequences:
        n = len(s["old"])
        d = s["old"] - s["ref"]
        s["kl"] = d if algorithm.kl_estimator == "k1" else np.exp(-d) - 1 + d
        s["r"] = [-algorithm.kl_coef * s["kl"][t] + (s["score"] if t == n - 1 else 0.0)
                  for t in range(n)]  # fmt: skip
    if algorithm.whiten_rewards:
        every = np.concatenate([s["r"] for s in sequences])
        for s in sequences:
            spread = np.sqrt(every.var() + 1e-8)
            s["r"] = (np.array(s["r"]) - every.mean()) / spread + every.mean()
    for s in sequences:
        n, following, value = len(s["r"]), 0.0, 0.0
        s["adv"] = np.zeros(n)
        for t in reversed(range(n)):
            delta = s["r"][t] + algorithm.gamma * value - s["v"][t]
            following = delta + algorithm.gamma * algorithm.gae_lambda * following
            s["adv"][t], value = following, s["v"][t]
        s["ret"] = s["adv"] + s["v"]
    if algorithm.whiten_advantages:
        every = np.concatenate([s["adv"] for s in sequences])
        for s in sequences:
            s["adv"] = (s["adv"] - every.mean()) / np.sqrt(every.var() + 1e-8)


def independent_loss(phase, params, sequences, texts, xp=jnp):
    """(loss, policy part, value part, part of texts): means over tokens, sequence by sequence."""
    algorithm, temperature = phase._config.algorithm, phase._config.rollout.temperature
    model = phase._policy.model
    cast = f64 if xp is np else lambda x: x
    policy, value, num = 0.0, 0.0, 0
    every = [s["ids"] for s in sequences]
    logps = cast(logps_of(model, params["policy"], every, temperature))
    values = cast(values_before(phase, params, every))
    for i, s in enumerate(sequences):
        new, v = logps[i, s["span"]], values[i, s["span"]]
        ratio = xp.exp(new - s["old"])
        clipped = xp.clip(ratio, 1 - algorithm.clip_low, 1 + algorithm.clip_high)
        one = xp.maximum(-ratio * s["adv"], -clipped * s["adv"])
        if algorithm.dual is not None:
            one = xp.where(s["adv"] < 0, xp.minimum(one, -algorithm.dual * s["adv"]), one)
        near = xp.clip(v, s["v"] - algorithm.value_clip, s["v"] + algorithm.value_clip)
        policy += xp.sum(one)
        value += 0.5 * xp.sum(xp.maximum((v - s["ret"]) ** 2, (near - s["ret"]) ** 2))
        num += len(s["old"])
    nll, num_targets = 0.0, 0
    if texts:
        logps = cast(logps_of(model, params["policy"], [ids for ids, _ in texts], 1.0))
    for i, (ids, mask) in enumerate(texts):
        nll -= xp.sum(xp.where(mask[1:], logps[i, : len(ids) - 1], 0.0))
        num_targets += mask.sum()
    parts = policy / num, value / num, nll / max(num_targets, 1)
    return parts[0] + algorithm.value_coef * parts[1] + algorithm.ptx_coef * parts[2], *parts


def texts_in(batch):
    """The sequences of the rows that have a weight."""
    found = []
    flat = {k: np.asarray(v).reshape(-1, v.shape[-1]) for k, v in batch.items()}
    if "ptx_weights" not in flat:
        return []
    for row in np.flatnonzero(flat["ptx_weights"].any(1)):
        for number in range(1, flat["segment_ids"][row].max() + 1):
            at = flat["segment_ids"][row] == number
            found.append((flat["tokens"][row][at], flat["mask"][row][at]))
    return found


CASES = {
    "plain": {},
    "everything": {"algorithm": {"kl_estimator": "k3", "whiten_rewards": True, "dual": 1.3,
                                 "clip_high": 0.3, "ptx_coef": 0.6}},
    "shared": {"critic": {"trunk": "shared"}, "algorithm": {"whiten_advantages": False}},
    "one row each": {"data": {"packed": False, "micro_batches": 1},
                     "algorithm": {"num_minibatches": 2}},
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c == "one row each" else c for c in CASES]
)
def test_the_first_iteration_is_that_of_an_independent_one(make, world, case):
    changes = {k: dict(v) for k, v in CASES[case].items()}
    if changes.get("algorithm", {}).get("ptx_coef"):
        changes["ptx"] = {
            "train": str(world / "corpus.jsonl"), "text": {"fields": {"completion": "text"}},
            "overlong": "drop", "rows": 2,
        }  # fmt: skip
    phase = make(rewards={"functions": {"f": {"function": "verify.exact"}},
                          "max_failure_frac": 0.2}, **changes)  # fmt: skip
    algorithm, temperature = phase._config.algorithm, phase._config.rollout.temperature
    state, records = phase.init(jax.random.PRNGKey(3)), phase.records()
    if case == "shared":  # Else all values are 0.
        state.params["value_head"]["kernel"] = 0.3 * jax.random.normal(jax.random.key(4), (16,))
    params = jax.device_get(state.params)
    prompts = next(phase._sampler.records())
    state, collected = phase.collect(state, records)

    every = [np.concatenate([prompts[i].tokens, TOKENS[i, : LENGTHS[i]]]) for i in range(8)]
    ref = f64(logps_of(phase._policy.model, params["policy"], every, temperature))
    values = f64(values_before(phase, params, every))
    sequences = []
    for i, (ids, reward) in enumerate(zip(every, REWARDS, strict=True)):
        if reward is None:
            continue
        span = slice(len(prompts[i].tokens) - 1, len(ids) - 1)
        sequences.append({
            "ids": ids, "span": span, "old": f64(LOGPS[i, : LENGTHS[i]]), "ref": ref[i, span],
            "v": values[i, span], "score": reward - (0.4 if LENGTHS[i] == 8 else 0.0),
        })  # fmt: skip
    chain(algorithm, sequences)
    assert np.std(np.concatenate([s["v"] for s in sequences])) > 0.05

    # What was seen.
    mean = lambda values: float(np.mean([np.sum(v) for v in values]))  # noqa: E731
    kl, scores = mean([s["kl"] for s in sequences]), np.mean([s["score"] for s in sequences])
    every = {name: np.concatenate([s[name] for s in sequences]) for name in ("ret", "v")}
    expected = {
        "objective/kl": kl, "objective/scores": scores, "kl_coef": 0.2,
        "objective/non_score_reward": -0.2 * kl, "objective/rlhf_reward": scores - 0.2 * kl,
        "objective/entropy": -mean([s["old"] for s in sequences]),
        "val/explained_variance": 1 - np.var(every["ret"] - every["v"]) / np.var(every["ret"]),
        "val/num_eos_tokens": 5, "num_failed_rewards": 1, "completions/clipped_ratio": 3 / 8,
    }  # fmt: skip
    for name, value in expected.items():
        assert collected.metrics[name] == pytest.approx(value, rel=2e-5, abs=1e-5), name

    # The losses of the first minibatch, at the first parameters and at others, and the gradient.
    batch = next(iter(collected.batches))
    flat = {k: np.asarray(v).reshape(-1, v.shape[-1]) for k, v in batch.items()}
    there = {
        tuple(flat["tokens"][row][flat["segment_ids"][row] == number])
        for row in range(len(flat["tokens"]))
        for number in range(1, flat["segment_ids"][row].max() + 1)
    }
    chosen = [s for s in sequences if tuple(s["ids"]) in there]
    assert len(chosen) in ((7,) if algorithm.num_minibatches == 1 else (3, 4))
    texts = texts_in(batch)
    assert bool(texts) == bool(algorithm.ptx_coef)

    def ours(params):
        loss, metrics = phase_loss(phase, params, batch)
        return loss.total / loss.weight, metrics

    noise = jax.tree.map(
        lambda x: 0.03 * np.random.default_rng(x.size).standard_normal(x.shape, np.float32), params
    )
    moved = jax.tree.map(lambda a, b: a + b, params, noise)
    ours = jax.jit(jax.value_and_grad(ours, has_aux=True))
    slow = jax.jit(jax.grad(lambda p: independent_loss(phase, p, chosen, texts)[0]))
    for at in (params, moved):
        (found, metrics), grads = ours(at)
        expected = independent_loss(phase, at, chosen, texts, np)
        names = ("loss/policy_avg", "loss/value_avg", "loss/ptx_avg")
        assert float(found) == pytest.approx(expected[0], abs=1e-5)
        for name, value in zip(names, expected[1:], strict=True):
            if name in metrics:
                got = float(metrics[name].total / metrics[name].weight)
                assert got == pytest.approx(value, abs=1e-5), name
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), grads, slow(at)
        )
    assert float(metrics["val/clipfrac_avg"].total) > 0
    assert 0 < float(metrics["policy/clipfrac_avg"].total) < LENGTHS.sum()

    # And the update itself reports the same.
    _, seen = phase.step(state, batch)
    first = independent_loss(phase, params, chosen, texts, np)
    assert float(seen["loss"]) == pytest.approx(first[0], abs=1e-5)
    assert float(seen["loss/value_avg"]) == pytest.approx(first[2], abs=1e-5)


def phase_loss(phase, params, batch):
    """The sum over micro-batches, as the step takes it."""
    parts = [
        ppo_loss(
            phase._policy.model, phase._critic, params, {k: v[m] for k, v in batch.items()},
            phase._config.algorithm, temperature=phase._config.rollout.temperature,
        )
        for m in range(batch["mask"].shape[0])
    ]  # fmt: skip
    add = lambda *xs: sum(xs)  # noqa: E731
    loss = jax.tree.map(add, *[loss for loss, _ in parts])
    sums = [
        {k: v for k, v in metrics.items() if not k.startswith("sampling/")} for _, metrics in parts
    ]
    return loss, jax.tree.map(add, *sums)


def test_a_critic_starts_as_the_reward_of_whole_texts(make, world, tmp_path):
    rm = str(world / "rm")
    phase = make(rewards={"models": {"rm": {"path": rm, "weight": -0.7}}}, critic={})
    params = phase.init(jax.random.PRNGKey(0)).params
    ids = np.concatenate([np.array([1, 8, 9, 3], np.int32), TOKENS[1]])
    sample = Sample("p", "c", prompt_ids=ids[:4], completion_ids=ids[4:])
    rows = map(jnp.asarray, alone.rows(ids, width=WIDTH))
    row = dict(zip(("tokens", "segment_ids", "positions"), rows, strict=True))
    values = phase._critic.values(params, row, None)[0]
    (score,) = phase._sampler.rewards([sample])
    assert float(values[len(ids) - 1]) == pytest.approx(score.value, abs=1e-5)
    assert abs(score.value) > 0.01
    # What it is written as says the same when it is read again, as a reward or as a critic.
    phase._critic.export(params["critic"], tmp_path / "critic")
    again = make(rewards={"models": {"rm": {"path": str(tmp_path / "critic")}}}, critic={})
    assert again._sampler.rewards([sample])[0].value == pytest.approx(score.value, abs=1e-5)
    params = again.init(jax.random.PRNGKey(0)).params
    np.testing.assert_allclose(again._critic.values(params, row, None)[0], values, atol=1e-5)
    # From the policy, all values are 0 at first.
    fresh = make(critic={"from_policy": True}, rewards={"models": {"rm": {"path": rm}}})
    params = fresh.init(jax.random.PRNGKey(0)).params
    assert not np.any(fresh._critic.values(params, row, None))
    # A squashed reward is no such sum of a head's values.
    squashed = {"models": {"rm": {"path": rm, "squash": "sigmoid"}}}
    with pytest.raises(UserError, match=r"squashed.* set critic.from_policy to true"):
        make(critic={}, rewards=squashed)
    make(critic={"from_policy": True}, rewards=squashed)


def test_epochs_see_each_completion_once_in_other_orders(make):
    phase = make(algorithm={"num_epochs": 3, "num_minibatches": 2}, data={"micro_batches": 1},
                 rewards={"functions": {"f": {"function": "verify.exact"}}})  # fmt: skip
    _, collected = phase.collect(phase.init(jax.random.PRNGKey(0)), phase.records())
    batches = jax.device_get(list(collected.batches))
    assert len(batches) == 6
    orders = []
    for pair in zip(batches[::2], batches[1::2], strict=True):
        sizes = [int(b["mask"].sum()) for b in pair]
        assert sum(sizes) == LENGTHS.sum() - LENGTHS[2]
        orders.append(tuple(np.concatenate([b["advantages"][b["mask"]] for b in pair])))
    assert len(set(orders)) == 3 and len({tuple(sorted(o)) for o in orders}) == 1
    again = phase.collect(phase.init(jax.random.PRNGKey(0)), phase.records())[1].batches
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(list(again)), batches)


def test_ratios_may_be_taken_against_the_trainer(make):
    """The made-up log-probs of the sampler are then metrics alone."""
    phase = make(algorithm={"old_logps": "trainer", "num_epochs": 1}, data={"micro_batches": 1})
    state, collected = phase.collect(phase.init(jax.random.PRNGKey(0)), phase.records())
    (batch,) = collected.batches
    before = jax.device_get(batch)
    _, metrics = phase.step(state, batch)
    assert float(metrics["policy/approxkl_avg"]) < 1e-9
    on = before["mask"]
    difference = np.abs(before["old_logps"] - before["sampler_logps"])[on].mean()
    assert difference > 0.1
    assert float(metrics["sampling/sampling_logp_difference/mean"]) == pytest.approx(
        difference, rel=1e-4
    )


@pytest.mark.parametrize("control", ["fixed", "adaptive", "target"])
def test_the_coefficient_follows_the_kl_of_the_iteration(make, control):
    more = {} if control == "fixed" else {"kl_target": 0.01, "kl_horizon": 70}
    phase = make(algorithm={"kl_control": control, **more})
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    state, collected = phase.collect(state, records)
    kl = collected.metrics["objective/kl"]
    # 7 completions of 70: a KL that is far off changes it by 0.2 x 7 / 70.
    up = {"fixed": 1.0, "adaptive": 1.02, "target": 2.0}[control]
    down = {"fixed": 1.0, "adaptive": 0.98, "target": 0.5}[control]
    expected = 0.2 * (up if kl > 0.02 else down)
    assert abs(kl) > 0.1 and float(state.extra.control.kl_coef) == pytest.approx(expected)
    _, collected = phase.collect(state, records)
    assert collected.metrics["kl_coef"] == pytest.approx(expected)


def test_scores_are_scaled_by_all_that_came_so_far(make):
    phase = make(algorithm={"scale_scores": True, "missing_eos_penalty": 0.0})
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    valid = np.array([r for r in REWARDS if r is not None])
    for rounds in (1, 2):
        state, collected = phase.collect(state, records)
        assert float(state.extra.moments.num_rewards) == 7 * rounds
        assert float(state.extra.moments.mean) == pytest.approx(valid.mean(), rel=1e-5)
        # The mean stays where it is, and the spread becomes 1.
        assert collected.metrics["objective/scores"] == pytest.approx(valid.mean(), rel=1e-4)
        assert collected.metrics["reward"] == pytest.approx(valid.mean(), rel=1e-5)


# --- bad input ------------------------------------------------------------------------------------


def test_rewards_that_are_nan_stop_a_run_that_has_too_many(make):
    phase = make(rewards={"functions": {"f": {"function": "verify.exact"}},
                          "max_failure_frac": 0.1})  # fmt: skip
    with pytest.raises(StopRunError, match=r"1 of 8 samples have no reward, more than .*no luck"):
        phase.collect(phase.init(jax.random.PRNGKey(0)), phase.records())


def test_no_reward_at_all_trains_nothing_and_says_so(make):
    failing = lambda samples: [Score(None, error="broken")] * len(samples)  # noqa: E731
    phase = make(failing, rewards={"functions": {"f": {"function": "verify.exact"}},
                                   "max_failure_frac": 1.0})  # fmt: skip
    state = phase.init(jax.random.PRNGKey(0))
    after, collected = phase.collect(state, phase.records())
    assert list(collected.batches) == [] and collected.metrics["num_failed_rewards"] == 8
    assert float(after.extra.control.kl_coef) == pytest.approx(0.2)
    (text,) = phase.diagnose(collected.metrics)
    assert "no sample has a reward" in text


def test_what_does_not_fit_is_refused(make, world, tmp_path):
    with pytest.raises(UserError, match=r"max_tokens=60 exceed the model's context of 64 tokens"):
        make(rollout={"max_tokens": 60})
    phase = make(rollout={"max_prompt_tokens": 3})
    with pytest.raises(UserError, match=r"tokens, but only 3 fit; allow more, shorten the record"):
        phase.collect(phase.init(jax.random.PRNGKey(0)), phase.records())
    other = tmp_path / "other"
    model = ScalarModel(
        Model(ModelConfig(vocab_size=23, **SHAPE | {"max_position_embeddings": 20}))
    )
    save_reward(other, model, model.init(jax.random.key(0)), extra_config={"pad_token_id": 0})
    load_tokenizer(world / "tokenizer").save(str(other))
    with pytest.raises(UserError, match=r"critic: a prompt and its completion have up to 24 tokens"
                                        r", but .*other has a context of 20; lower"):  # fmt: skip
        make(critic={"path": str(other)})
    vocab_tokenizer(["<pad>", "<bos>", "<eos>", "x"]).save(str(other))
    with pytest.raises(UserError, match=r"critic.path: .*other has another tokenizer than the pol"):
        make(critic={"path": str(other)})
    models = {"models": {"rm": {"path": str(other)}}}
    with pytest.raises(UserError, match=r"rewards.models.rm.path: .*another tokenizer"):
        make(rewards=models)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": {"kl_control": "adaptive"}}, "adaptive and target need the KL"),
        ({"algorithm": {"kl_target": 3.0}}, "fixed has none"),
        ({"algorithm": {"ptx_coef": 1.0}}, "without ptx: give both, or neither"),
        ({"ptx": {"train": "x", "text": {"fields": {"completion": "t"}}}}, "with ptx: give both"),
        ({"algorithm": {"kl_coef": 0.0}}, "greater than 0"),
        ({"algorithm": {"dual": 1.0}}, "greater than 1"),
        ({"algorithm": {"num_minibatches": 3}}, r"8 completions .* do not divide into 3 minibatch"),
        ({"critic": {"trunk": "shared", "path": "x"}}, "trunk: shared: a critic that is read has"),
        ({"critic": {"path": "x", "from_policy": True}}, "path='x' and from_policy"),
        ({"rollout": {"group_size": 0}}, "group_size=0: expected at least 1"),
        (
            {"algorithm": {"kl_control": "adaptive", "kl_target": 1.0, "kl_horizon": 1}},
            "kl_horizon=1 is too short for 8 completions",
        ),
    ],
)
def test_configs_that_make_no_sense(world, changes, message):
    with pytest.raises(ValidationError, match=message):
        PpoConfig.model_validate(values_of(world, **changes))


# --- figures --------------------------------------------------------------------------------------


def test_best_of_n_by_hand():
    lengths = np.array([3, 5, 2, 9, 4, 1], np.int32)
    scores = [Score(1.0, {"f": 5.0}), Score(3.0, {"f": 7.0, "f/x": 2.0})]
    scores += [Score(None, error="x"), Score(-1.0, {"f": -2.0})]
    scores += [Score(None, error="x")] * 2
    empty = np.zeros((6, 9), np.float32)
    out = Completions(empty.astype(np.int32), lengths, empty, np.zeros(6, np.int8))
    found = best_of_n(Rollouts([Task(np.zeros(1, np.int32))] * 3, out, [None] * 6, scores))
    assert found == pytest.approx({
        "eval/best_of_n/reward": (3 - 1) / 2, "eval/best_of_n/mean_length": (5 + 9) / 2,
        "eval/best_of_n/kl": math.log(2) - 0.5, "eval/best_of_n/reference_reward": 1.0,
        "eval/best_of_n/f": (7 - 2) / 2, "eval/best_of_n/f/x": 2.0,
    })  # fmt: skip


def test_explained_variance_by_hand():
    returns = np.array([1.0, 2.0, 3.0], np.float32)
    assert explained_variance(returns, returns) == 1
    assert explained_variance(returns, returns + 5) == 1, "a constant is another matter"
    assert explained_variance(returns, np.zeros(3)) == pytest.approx(0)
    assert explained_variance(returns, -returns) == pytest.approx(-3)
    assert explained_variance(np.ones(3), np.zeros(3)) == 0


HEALTHY = {
    "objective/kl": 3.0, "policy/clipfrac_avg": 0.1, "val/explained_variance": 0.5,
    "completions/clipped_ratio": 0.1, "sampling/sampling_logp_difference/max": 1e-6,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"objective/kl": 200.0}, "200 nats for each completion: lower"),
        ({"objective/kl": -6.0}, "which a KL cannot be"),
        ({"policy/clipfrac_avg": 0.6}, "60% of the tokens are clipped"),
        ({"val/explained_variance": -2.0}, "less than a constant would"),
        ({"completions/clipped_ratio": 1.0}, "every completion was cut at rollout.max_tokens=8"),
        ({"sampling/sampling_logp_difference/max": 2.0}, "differ from the trainer's by 2 nats"),
    ],
)
def test_what_looks_wrong_is_said(change, message):
    found = diagnose(PpoAlgorithm(), Sampling(max_tokens=8), HEALTHY | change)
    assert [message in text for text in found] == ([] if message is None else [True])
