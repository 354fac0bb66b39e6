"""What an iteration of GRPO samples, keeps, drops and minimises: samples and rewards are made up.

The whole with a real sampler is in test_grpo_runs.py.
"""

import dataclasses
import functools
import json
import math
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from alignjax import losses
from alignjax.core.errors import UserError
from alignjax.core.types import LENGTH, STOP, Completions, Score
from alignjax.data import pack, sequence_ids, share_prompts
from alignjax.losses import next_token_logps
from alignjax.models import Model, ModelConfig, save
from alignjax.phases import common, rollouts, scoring
from alignjax.phases.grpo import Grpo, grpo_loss, is_informative
from alignjax.phases.grpo_config import PRESETS, AlgorithmConfig, GrpoConfig, keyword_defaults
from alignjax.recipes import chains
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.text import load_tokenizer
from alignjax.train.loop import StopRunError
from tests import alone

VOCAB = 23


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    chains.write(folder, seed=0, num_questions=1, num_drills=1, num_train=40, num_test=6)
    return folder


class FakeSampler:
    """Completions of chosen or random lengths; remembers what it was asked."""

    def __init__(self):
        self.lengths, self.calls = None, []

    def __call__(self, params, prompts, lengths, key, sampling):
        rng = np.random.default_rng(np.asarray(key))
        n, width = len(prompts) * sampling.num_samples, sampling.max_tokens
        sizes = rng.integers(1, width + 1, n) if self.lengths is None else self.lengths
        sizes = np.asarray(sizes, np.int32)
        on = np.arange(width) < sizes[:, None]
        self.calls.append((prompts.copy(), tuple(np.asarray(key).tolist()), sampling))
        return Completions(
            tokens=np.where(on, rng.integers(7, 17, (n, width)), 0).astype(np.int32),
            lengths=sizes,
            logps=np.where(on, -rng.random((n, width)), 0).astype(np.float32),
            finish_reasons=np.where(sizes == width, LENGTH, STOP).astype(np.int8),
        )


class FakeRewards:
    """The rewards of each call in turn; None is a failure. The last one stays."""

    def __init__(self, *calls):
        self.calls, self.samples = list(calls), []

    def made(self, *, log_path):
        self.log_path = log_path
        return self

    def __call__(self, samples):
        values = self.calls.pop(0) if len(self.calls) > 1 else self.calls[0]
        self.samples.append(samples)
        flat = np.array(values, object).reshape(-1)
        assert len(flat) == len(samples)
        return [
            Score(None, error="no luck") if v is None else Score(float(v), {"luck": float(v) / 2})
            for v in flat
        ]


@pytest.fixture
def make(world, monkeypatch):
    def build(*rewards, num_prompts=4, group_size=3, max_tokens=10, devices=1, **changes):
        sampler, score = FakeSampler(), FakeRewards(*rewards)
        monkeypatch.setattr(rollouts, "make_generate", lambda model, **_: sampler)
        monkeypatch.setattr(scoring, "RewardPool", lambda config, **options: score.made(**options))
        values = {
            "phase": "grpo", "name": "x", "tokenizer": str(world / "tokenizer"),
            "model": {"init": {
                "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32,
                "max_position_embeddings": 64,
            }},
            "data": {
                "train": str(world / "train.jsonl"), "eval": str(world / "test.jsonl"),
                "text": {"fields": {"prompt": "prompt", "reference": "reference"}},
                "num_sharing": 1, **changes.pop("data", {}),
            },
            "rollout": {
                "num_prompts": num_prompts, "group_size": group_size, "max_prompt_tokens": 16,
                "max_tokens": max_tokens, **changes.pop("rollout", {}),
            },
            "algorithm": {"kl_coef": 0.0, **changes.pop("algorithm", {})},
            "rewards": {
                "functions": {"luck": {"function": "verify.exact"}}, **changes.pop("rewards", {}),
            },
            "evaluation": {"num_problems": 6},
            **changes,
        }  # fmt: skip
        mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
        phase = Grpo(GrpoConfig.model_validate(values), mesh)
        phase.sampler, phase.score = sampler, score
        return phase

    return build


def collect(phase, num=1, step=0):
    state, records = phase.init(jax.random.PRNGKey(5)), phase.records()
    state = state._replace(step=jnp.int32(step))
    out = []
    for _ in range(num):
        state, collected = phase.collect(state, records)
        out.append((collected, jax.device_get(list(collected.batches))))
        state = state._replace(step=state.step + 1)
    return out


def sequences(batch):
    """[M, R, T] -> {tokens of the completion: (advantages, old log-probs, positions)}."""
    batch = {k: v.reshape(-1, v.shape[-1]) for k, v in batch.items()}
    found = {}
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            at = batch["segment_ids"][row] == segment
            on = batch["mask"][row] & at
            prompt = tuple(batch["tokens"][row][at & ~on])
            key = prompt, tuple(batch["tokens"][row][on])
            assert key not in found, "the made-up completions differ"
            found[key] = batch["advantages"][row][on], batch["old_logps"][row][on]
            assert np.flatnonzero(on)[0] == np.flatnonzero(at)[0] + len(prompt)
            np.testing.assert_array_equal(batch["positions"][row][at], np.arange(at.sum()))
    return found


def sampled(phase, call=0, group=3):
    """What the sampler made in a call, as in `sequences`, in order."""
    prompts, key, sampling = phase.sampler.calls[call]
    widths = [len(p) for p in phase.prompts_of[call]]
    again = FakeSampler()
    again.lengths = phase.sampler.lengths
    out = again(None, prompts, None, np.array(key, np.uint32), sampling)
    return [
        (
            (tuple(prompts[i // group][: widths[i // group]]), tuple(out.tokens[i][:n])),
            out.logps[i][:n],
        )
        for i, n in enumerate(out.lengths)
    ]


@pytest.fixture
def watch(monkeypatch):
    """Notes the prompts of each rollout in phase.prompts_of."""

    def on(phase):
        phase.prompts_of = []
        inner = phase._rollout

        def rollout(params, prompts, key, sampling):
            phase.prompts_of.append([list(p.tokens) for p in prompts])
            return inner(params, prompts, key, sampling)

        monkeypatch.setattr(phase, "_rollout", rollout)
        return phase

    return on


# --- advantages and what is left out --------------------------------------------------------------


def zscore(group):
    group = np.array(group, np.float64)
    return (group - group.mean()) / (group.std(ddof=1) + 1e-4)


def test_each_completion_carries_its_own_advantage_and_log_probs(make, watch):
    rewards = [[1, 0, 0.5], [0, 0, 1], [0.25, 1, 0], [0, 1, 1]]
    phase = watch(make(rewards))
    ((_, (batch,)),) = collect(phase)
    found = sequences(batch)
    expected = np.concatenate([zscore(g) for g in rewards])
    assert len(found) == 12
    for (key, logps), advantage in zip(sampled(phase), expected, strict=True):
        advantages, old_logps = found[key]
        np.testing.assert_allclose(advantages, np.full(len(key[1]), advantage), rtol=1e-5)
        np.testing.assert_array_equal(old_logps, logps)


def test_a_failed_reward_leaves_its_sample_out_and_the_others_do_not_feel_it(make, watch):
    rewards = [[1, None, 0], [0, 0, 1], [None, 1, None], [None, None, None]]
    phase = watch(make(rewards, rewards={"max_failure_frac": 0.6}))
    ((collected, (batch,)),) = collect(phase)
    found = sequences(batch)
    pair = zscore([1, 0])
    expected = [pair[0], None, pair[1], *zscore([0, 0, 1]), None, 0.0, None, None, None, None]
    kept = 0
    for (key, _), advantage in zip(sampled(phase), expected, strict=True):
        assert (key in found) == (advantage is not None)
        if advantage is not None:
            kept += 1
            np.testing.assert_allclose(found[key][0], advantage, rtol=1e-5, atol=1e-9)
    assert len(found) == kept == 6
    assert collected.metrics["num_failed_rewards"] == 6
    assert collected.warnings == ["6 of 12 samples have no reward and are left out: no luck"]
    assert [s["error"] for s in collected.samples][:6] == ["no luck"] * 6, "shown first"


def test_too_many_failures_stop_the_run(make):
    rewards = [[1, None, 0], [0, 0, 1], [0, 1, None], [0, 1, 1]]
    collect(make(rewards, rewards={"max_failure_frac": 2 / 12}))
    with pytest.raises(StopRunError, match=r"2 of 12 samples have no reward, more than .*no luck"):
        collect(make(rewards, rewards={"max_failure_frac": 0.16}))


@pytest.mark.parametrize("advantage", ["group_zscore", "group_center"])
def test_groups_that_agree_give_no_gradient(make, advantage):
    phase = make([[1, 1, 1], [0, 0, 0], [0.3] * 3, [0.7] * 3], algorithm={"advantage": advantage})
    state = phase.init(jax.random.PRNGKey(0))
    before = jax.device_get(state.params)
    state, collected = phase.collect(state, phase.records())
    (batch,) = list(collected.batches)
    assert not np.any(np.array(batch["advantages"]))
    assert np.any(np.array(batch["mask"]))
    state, metrics = phase.step(state, batch)
    assert float(metrics["grad_norm"]) == 0
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))


def test_centred_advantages_by_hand(make, watch):
    phase = watch(make([[1, 0, 0.5]] * 4, algorithm={"advantage": "group_center"}))
    ((_, (batch,)),) = collect(phase)
    found = sequences(batch)
    for (key, _), advantage in zip(sampled(phase), [0.5, -0.5, 0.0] * 4, strict=True):
        np.testing.assert_allclose(found[key][0], advantage, atol=1e-6)


def test_advantages_that_need_lengths_parts_or_all_groups(make, watch):
    rewards = np.array([[1, 0, 0.5], [0, 0, 1], [0.25, 1, 0], [0, 1, 1]])
    lengths = np.array([[3, 4, 6], [5, 5, 8], [3, 5, 7], [9, 4, 4]])
    centered = rewards - rewards.mean(1, keepdims=True)
    parts = np.array([zscore(group) for group in rewards / 2])  # FakeRewards' part is the half
    expected = {
        "opo": rewards - (rewards * lengths).sum(1, keepdims=True) / lengths.sum(1, keepdims=True),
        "reinforce_pp_baseline": centered / centered.std(),
        "gdpo": parts / parts.std(ddof=1),
    }
    for name, advantages in expected.items():
        phase = watch(make(rewards.tolist(), algorithm={"preset": name, "kl_coef": 0.0}))
        phase.sampler.lengths = lengths.reshape(-1)
        ((_, (batch,)),) = collect(phase)
        found = sequences(batch)
        for (key, _), value in zip(sampled(phase), advantages.reshape(-1), strict=True):
            np.testing.assert_allclose(found[key][0], value, rtol=1e-3, atol=1e-6)


def test_a_reward_that_a_prompt_does_not_get_leaves_its_advantages_alone(make, world, tmp_path):
    """By its `where` it is no part of these scores. Advantages of each reward by itself, too."""
    others = {
        "luck": {"function": "verify.exact"},
        "other": {"function": "verify.exact", "where": {"kind": "x"}},
    }
    records = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(r | {"kind": "sum"}) + "\n" for r in records))
    for advantage in ("gdpo", "group_zscore"):
        found = []
        for functions in (others, {"luck": others["luck"]}):
            phase = make(
                [[1, 0, 0.5], [0, 0, 1], [0.25, 1, 0], [0, 1, 1]],
                algorithm={"advantage": advantage},
                rewards={"functions": functions},
                data={"train": str(train)},
            )
            ((_, (batch, *_)),) = collect(phase)
            found.append(batch["advantages"])
        assert np.isfinite(found[0]).all() and found[0].any()
        np.testing.assert_array_equal(found[0], found[1])


def test_what_rewards_print_goes_into_the_directory_of_the_run(make):
    assert make([1.0], output_dir="out").score.log_path == Path("out/x/rewards.log")


def test_overlong_penalty_counts_tokens(make, watch):
    """max_tokens 10, of which the last 40%: 4 tokens, -1/4 for each of 7, 8, 9 and 10."""
    phase = watch(make([[1.0] * 6], num_prompts=1, group_size=6,
                       algorithm={"advantage": "group_center", "overlong_frac": 0.4}))  # fmt: skip
    phase.sampler.lengths = [2, 6, 7, 8, 9, 10]
    ((collected, (batch,)),) = collect(phase)
    rewards = np.array([1, 1, 0.75, 0.5, 0.25, 0])
    found = sequences(batch)
    for (key, _), value in zip(sampled(phase, group=6), rewards - rewards.mean(), strict=True):
        np.testing.assert_allclose(found[key][0], value, rtol=1e-5)
    assert collected.metrics["reward"] == 1.0, "what is logged is the reward of the functions"


# --- dynamic sampling -----------------------------------------------------------------------------

FLAT, MIXED = [1, 1, 1], [0, 1, 0]


def test_dynamic_sampling_drops_uninformative_groups_and_samples_other_prompts(make, watch):
    rounds = [
        [FLAT, MIXED, FLAT, [None, 1, None]],
        [MIXED, FLAT, MIXED, FLAT],
        [FLAT, MIXED, MIXED, MIXED],
    ]
    phase = watch(make(*rounds, algorithm={"dynamic_sampling": True}))
    phase.score.calls.append([MIXED] * 4)
    ((collected, (batch,)),) = collect(phase)
    found = sequences(batch)
    expected = {
        key: advantage
        for number, groups in [(0, [1]), (1, [0, 2]), (2, [1])]  # 4 groups are enough.
        for group in groups
        for (key, _), advantage in zip(
            sampled(phase, number)[3 * group : 3 * group + 3], zscore(MIXED), strict=True
        )
    }
    assert found.keys() == expected.keys()
    for key, advantage in expected.items():
        np.testing.assert_allclose(found[key][0], advantage, rtol=1e-5)
    prompts = [tuple(p) for call in phase.prompts_of for p in call]
    assert len(set(prompts)) == 12, "each round takes other prompts"
    assert len({key for _, key, _ in phase.sampler.calls}) == 3
    assert collected.metrics["num_rounds"] == 3
    rows = [row for number in range(3) for row in sampled(phase, number)]
    assert collected.num_tokens == sum(len(prompt) + len(ids) for (prompt, ids), _ in rows)
    assert collected.metrics["epoch"] == pytest.approx(12 / 40)
    assert collected.metrics["frac_reward_zero_std"] == pytest.approx(6 / 12)
    assert collected.metrics["num_failed_rewards"] == 2


def test_dynamic_sampling_has_an_end(make):
    phase = make([FLAT] * 4, algorithm={"dynamic_sampling": True, "max_rounds": 3})
    ((collected, batches),) = collect(phase)
    assert (collected.metrics["num_rounds"], batches) == (3, [])
    assert any("all rewards are equal" in text for text in phase.diagnose(collected.metrics))
    phase = make([FLAT, FLAT, MIXED, FLAT], algorithm={"dynamic_sampling": True, "max_rounds": 2})
    ((collected, (batch,)),) = collect(phase)
    assert len(sequences(batch)) == 6


def test_without_dynamic_sampling_there_is_one_round_and_all_groups_stay(make):
    ((collected, (batch,)),) = collect(make([FLAT, MIXED, FLAT, FLAT]))
    assert (collected.metrics["num_rounds"], len(sequences(batch))) == (1, 12)


def test_informative_groups():
    nan = np.nan
    rewards = [[1, 1, 1], [0, 1, 1], [nan, 1, 1], [nan, 0, 1], [nan, nan, 1], [nan, nan, nan]]
    assert is_informative(np.array(rewards)).tolist() == [False, True, False, True, False, False]


# --- minibatches, updates, shapes -----------------------------------------------------------------


def test_minibatches_part_the_samples_and_updates_repeat_them(make):
    rewards = np.random.default_rng(0).random((4, 3))
    phase = make(rewards, algorithm={"num_minibatches": 3, "num_updates": 2})
    (_, first), (_, second) = collect(phase, num=2)
    assert len(first) == 6
    parts = [sequences(b).keys() for b in first]
    assert [len(p) for p in parts] == [4] * 6
    assert len(set().union(*parts[:3])) == 12, "each sample once in a pass"
    assert parts[:3] == parts[3:]
    for a, b in zip(first[:3], first[3:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)

    def groups(batch):
        return sorted(Counter(prompt for prompt, _ in sequences(batch)).values())

    assert any(groups(b) != [1, 3] for b in first), "drawn from all groups, not cut in order"
    order = [[sorted(p) for p in map(sequences, b[:3])] for b in (first, second)]
    assert order[0] != order[1]
    # The same iteration again: the same parts, as a resumed run needs them.
    ((_, again), _) = collect(make(rewards, algorithm={"num_minibatches": 3, "num_updates": 2}), 2)
    for a, b in zip(first, again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_learning_rate_decays_over_all_updates(make):
    """2 iterations of 3 minibatches, each seen twice: 12 updates."""
    phase = make(
        [MIXED] * 4, algorithm={"num_minibatches": 3, "num_updates": 2}, loop={"steps": 2},
        optimizer={"learning_rate": 1e-3, "schedule": "linear", "final_frac": 0.0},
    )  # fmt: skip
    state, records, rates = phase.init(jax.random.PRNGKey(0)), phase.records(), []
    for _ in range(2):
        state, collected = phase.collect(state, records)
        for batch in collected.batches:
            state, metrics = phase.step(state, batch)
            rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, 1e-3 * (1 - np.arange(12) / 12), rtol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_shapes_depend_on_the_config_alone(make, packed):
    data = {"micro_batches": 2, "packed": packed}
    rewards = [[[None, 1, 0], FLAT, FLAT, MIXED], [MIXED] * 4]
    shapes = set()
    for _, batches in collect(make(*rewards, data=data), num=3):
        (batch,) = batches
        shapes |= {(k, v.shape) for k, v in batch.items()}
        if not packed:
            assert batch["segment_ids"].max() == 1
    names = {"tokens", "mask", "segment_ids", "positions", "old_logps", "advantages"}
    assert shapes == {(name, (2, 6, 26)) for name in names}


def test_packing_leaves_whole_micro_batches_empty(make):
    phase = make([MIXED] * 4, data={"micro_batches": 4}, rollout={"max_prompt_tokens": 40})
    phase.sampler.lengths = [2, 1, 1] * 4  # At most 12 * 18 tokens, in 12 rows of 50.
    ((_, (batch,)),) = collect(phase)
    assert batch["mask"].any((1, 2)).tolist() == [True, True, False, False]
    assert batch["mask"].sum() == 16


# --- the key, the reference, metrics --------------------------------------------------------------


def test_no_key_is_used_twice(make):
    """Over iterations and rounds, and between training and evaluation."""
    phase = make([FLAT] * 4, algorithm={"dynamic_sampling": True, "max_rounds": 2})
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    for step in range(3):
        state = state._replace(step=jnp.int32(step))
        phase.score.calls = [[FLAT] * 4]
        phase.collect(state, records)
        phase.score.calls = [[0] * 6]
        phase.evaluate(state)
    keys = [key for _, key, s in phase.sampler.calls if s.temperature > 0]
    assert len(keys) == len(set(keys)) == 9


def test_the_reference_follows_by_schedule(make):
    phase = make([MIXED] * 4, algorithm={"kl_coef": 0.1, "reference_every": 2})
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    start = jax.device_get(state.params)
    seen = []
    for step in range(5):
        # Stands for training: each iteration has other params.
        params = jax.tree.map(lambda x, i=step: jnp.asarray(x) + i, start)
        state = state._replace(params=params, step=jnp.int32(step))
        state, collected = phase.collect(state, records)
        batches = jax.device_get(list(collected.batches))
        reference = jax.device_get(state.reference)
        seen.append(round(float((reference["norm"]["scale"] - start["norm"]["scale"])[0])))
        assert set(batches[0]) >= {"ref_logps"}
        pointers = [
            {x.addressable_shards[0].data.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)}
            for tree in (state.reference, state.params)
        ]
        assert not pointers[0] & pointers[1], "a copy: the step donates the params"
    assert seen == [0, 0, 2, 2, 4]


@pytest.mark.parametrize(("estimator", "term"), [("k1", lambda d: d), ("k2", lambda d: d**2 / 2)])
def test_kl_is_taken_off_the_rewards(make, watch, estimator, term):
    rewards = [[1, None, 0.5], [0, 0, 1], [0.25, 1, 0], [0, 1, 1]]
    algorithm = {"preset": "rloo", "kl_coef": 0.5, "kl_estimator": estimator, "num_minibatches": 2}
    phase = watch(make(rewards, algorithm=algorithm, rewards={"max_failure_frac": 0.5}))
    ((collected, batches),) = collect(phase)
    found = {key: value for batch in batches for key, value in sequences(batch).items()}
    model, params = phase._policy.model, phase._reference
    texts = [prompt + completion for (prompt, completion), _ in sampled(phase)]
    every = np.asarray(alone.next_logps(model, params, 1.0, *alone.rows(*texts, width=26)))
    kls = [
        term(old - ref[len(prompt) - 1 : len(prompt) - 1 + len(old)])
        for ((prompt, _), old), ref in zip(sampled(phase), every, strict=True)
    ]
    left = np.array(rewards, np.float64) - 0.5 * np.array([k.sum() for k in kls]).reshape(4, 3)
    groups = zip(sampled(phase), left.reshape(-1), left.repeat(3, axis=0), strict=True)
    for (key, _), reward, group in groups:
        if np.isnan(reward):
            assert key not in found
            continue
        others = (np.nansum(group) - reward) / (np.isfinite(group).sum() - 1)
        np.testing.assert_allclose(found[key][0], reward - others, rtol=1e-4, atol=1e-4)
    valid = [k for k, reward in zip(kls, left.reshape(-1), strict=True) if np.isfinite(reward)]
    assert collected.metrics["kl"] == pytest.approx(np.concatenate(valid).mean(), rel=1e-4)
    assert collected.metrics["reward"] == pytest.approx(np.nanmean(np.array(rewards, np.float64)))
    assert not any("ref_logps" in batch for batch in batches), "the loss asks for none"


def test_a_reference_to_refresh_that_nothing_uses_is_refused(make):
    with pytest.raises(ValidationError, match="reference_every=2 without kl_coef, which is 0"):
        make([MIXED] * 4, algorithm={"reference_every": 2})


def test_a_reference_that_stays_is_not_in_the_checkpoint(make):
    assert make([MIXED] * 4).init(jax.random.PRNGKey(0)).reference is None
    phase = make([MIXED] * 4, algorithm={"kl_coef": 0.1})
    state = phase.init(jax.random.PRNGKey(0))
    assert state.reference is None
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((phase._reference, state.params)))


def test_chunks_of_logits_grow_with_the_devices(make, monkeypatch):
    """Each device gets 1,024 rows of logits: with 12 rows over 4 devices, 341 time steps."""
    sizes = []

    def spy(*args, chunk_size, **options):
        sizes.append(chunk_size)
        return next_token_logps(*args, chunk_size=chunk_size, **options)

    monkeypatch.setattr(common, "next_token_logps", spy)
    phase = make([MIXED] * 4, devices=4, algorithm={"kl_coef": 0.1})
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    state, collected = phase.collect(state, records)
    (batch,) = collected.batches
    num_for_reference = len(sizes)
    phase.step(state, batch)
    assert set(sizes) == {341} and len(sizes) > num_for_reference > 0


def test_metrics_of_an_iteration_by_hand(make):
    rewards = [[1, 0, 0.5], [None, 0, 1], [1, 1, 1], [0, None, None]]
    phase = make(rewards, rewards={"max_failure_frac": 0.5})
    phase.sampler.lengths = [1, 2, 10, 4, 5, 6, 10, 8, 9, 1, 2, 2]
    ((collected, _),) = collect(phase)
    values = [1, 0, 0.5, 0, 1, 1, 1, 1, 0]
    expected = {
        "completions/mean_length": 60 / 12,
        "completions/min_length": 1,
        "completions/max_length": 10,
        "completions/clipped_ratio": 2 / 12,
        "completions/mean_terminated_length": 40 / 10,
        "reward": np.mean(values),
        "reward_std": (0.5 + np.std([0, 1], ddof=1) + 0) / 3,
        "frac_reward_zero_std": 2 / 4,
        "num_failed_rewards": 3,
        "num_rounds": 1,
        "rewards/luck/mean": np.mean(values) / 2,
        "rewards/luck/std": np.std(values) / 2,
        "epoch": 4 / 40,
        "num_dropped": 0,
    }
    assert set(collected.metrics) == set(expected)
    assert collected.metrics == pytest.approx(expected, rel=1e-6)
    assert collected.num_tokens == 60 + 3 * sum(
        1 + len(sample.prompt) for sample in phase.score.samples[0][::3]
    )
    shown = [s["prompt"] for s in collected.samples[3:]]
    assert shown == [s.prompt for s in phase.score.samples[0][::3]], "one of each prompt"


def test_rewards_see_the_text_the_reference_and_the_length(make, world):
    phase = make([MIXED] * 4)
    collect(phase)
    truth = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    references = {r["prompt"]: r["reference"] for r in truth}
    for sample in phase.score.samples[0]:
        assert sample.reference == references[sample.prompt]
        assert sample.completion.isdigit() and len(sample.completion) == sample.num_tokens
        assert sample.is_truncated == (sample.num_tokens == 10)


def test_evaluation_by_hand(make):
    phase = make([[1, 0, None, 1, 0, 0]], evaluation={"num_problems": 6, "num_shown": 2})
    phase.sampler.lengths = [1, 2, 3, 4, 5, 9]
    state = phase.init(jax.random.PRNGKey(0))
    seen = phase.evaluate(state)
    for way in ("sampled", "greedy"):
        assert seen.metrics[f"eval/{way}/reward"] == pytest.approx(2 / 5)
        assert seen.metrics[f"eval/{way}/luck"] == pytest.approx(1 / 5)
        assert seen.metrics[f"eval/{way}/mean_length"] == 4
        assert seen.metrics[f"eval/{way}/num_failed_rewards"] == 1
    assert [s.temperature for *_, s in phase.sampler.calls] == [1.0, 0.0]
    assert [s["split"] for s in seen.samples] == ["eval/sampled"] * 2 + ["eval/greedy"] * 2
    prompts = [s["prompt"] for s in seen.samples]
    assert prompts[:2] == prompts[2:]
    assert [s["prompt"] for s in phase.evaluate(state).samples] == prompts
    phase = make([[0] * 18], evaluation={"num_problems": 6, "num_samples": 3, "greedy": False})
    assert {name.split("/")[1] for name in phase.evaluate(state).metrics} == {"sampled"}
    assert len(phase.score.samples[0]) == 18


def test_what_the_model_lists_as_its_ends_stops_it_and_is_exported(make, world, tmp_path):
    """The tokenizer's EOS, which is what is trained, comes first; each stands there once."""
    tokenizer = load_tokenizer(world / "tokenizer")
    shape = {"vocab_size": tokenizer.vocab_size, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    model = Model(ModelConfig(**shape, max_position_embeddings=64))
    listed = {"eos_token_id": [5, tokenizer.eos_id, 7]}
    save(tmp_path / "chat", model, model.init(jax.random.key(0)), extra_config=listed)
    (more,) = tokenizer.encode("+")
    phase = make(
        [1.0] * 12, [1.0] * 6,
        model={"path": str(tmp_path / "chat")}, rollout={"stop_tokens": ["+"]},
    )  # fmt: skip
    state, _ = phase.collect(phase.init(jax.random.PRNGKey(0)), phase.records())
    phase.evaluate(state)
    assert len(phase.sampler.calls) == 3
    assert {s.stop_tokens for *_, s in phase.sampler.calls} == {(tokenizer.eos_id, 5, 7, more)}
    phase.export(state, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "model" / name).read_text())
        assert written["eos_token_id"] == [tokenizer.eos_id, 5, 7]
    assert load_tokenizer(tmp_path / "model").eos_id == tokenizer.eos_id


def test_without_held_out_problems_there_is_no_evaluation(make):
    phase = make([MIXED] * 4, data={"eval": None})
    assert phase.evaluate(phase.init(jax.random.PRNGKey(0))).metrics == {}


# --- configs --------------------------------------------------------------------------------------


COMMON = {
    "advantage": "group_zscore", "level": "token_level", "surrogate": "ppo_clip",
    "reduction": "token_mean", "clip_low": 0.2, "clip_high": 0.2, "dual": None, "tau_pos": None,
    "tau_neg": None, "kl_coef": 0.0, "kl_in_reward": False, "kl_estimator": "k3",
    "reference_every": 0, "num_updates": 1,
    "num_minibatches": 1, "old_logps": "sampler", "importance_cap": None,
    "dynamic_sampling": False, "max_rounds": 4, "overlong_frac": 0.0,
}  # fmt: skip
NO_CLIP = {"clip_low": None, "clip_high": None}
PAPERS = {
    "grpo": {"reduction": "sequence_mean", "kl_coef": 0.04},
    "dr_grpo": {"advantage": "group_center", "reduction": "fixed_length"},
    "bnpo": {"reduction": "micro_batch_mean"},
    "dapo": {"clip_high": 0.28, "dynamic_sampling": True, "overlong_frac": 0.2},
    "gspo": {"level": "sequence_mean_level", "reduction": "sequence_mean", "clip_low": 3e-4,
             "clip_high": 4e-4},
    "gmpo": {"surrogate": "gmpo", "reduction": "sequence_mean", "clip_low": 0.4, "clip_high": 0.4},
    "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0},
    "sapo": {"surrogate": "sapo", "reduction": "sequence_mean", "tau_pos": 1.0, "tau_neg": 1.05,
             **NO_CLIP},
    "reinforce_pp_baseline": {"advantage": "reinforce_pp_baseline", "kl_coef": 0.001,
                              "kl_estimator": "k2"},
    "opo": {"advantage": "opo", "surrogate": "reinforce", "reduction": "sequence_sum", **NO_CLIP},
    "gdpo": {"advantage": "gdpo", "reduction": "sequence_mean"},
    "rloo": {"advantage": "leave_one_out", "level": "sequence_level", "reduction": "sequence_mean",
             "kl_coef": 0.05, "kl_in_reward": True, "kl_estimator": "k1"},
    "gpg": {"advantage": "gpg", "surrogate": "reinforce", **NO_CLIP},
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_papers(preset):
    config = AlgorithmConfig(preset=preset)
    assert config.model_dump() == COMMON | {"preset": preset} | PAPERS[preset]
    # What a run saves is what it reads back, whatever the presets become.
    assert AlgorithmConfig.model_validate(config.model_dump()) == config
    in_losses = losses.PRESETS[preset]
    assert config.algorithm.options == {
        **keyword_defaults(getattr(losses, in_losses.surrogate)), **in_losses.options,
    }  # fmt: skip
    assert dataclasses.replace(config.algorithm, options=in_losses.options) == in_losses


def test_the_default_is_grpo():
    assert AlgorithmConfig() == AlgorithmConfig(preset="grpo")


def test_explicit_values_win_over_the_preset():
    config = AlgorithmConfig(preset="dapo", clip_high=0.5, dynamic_sampling=False, kl_coef=0.01)
    assert (config.clip_high, config.dynamic_sampling, config.kl_coef) == (0.5, False, 0.01)
    assert (config.reduction, config.overlong_frac) == ("token_mean", 0.2)


def test_another_surrogate_brings_its_own_hyperparameters():
    config = AlgorithmConfig(preset="gspo", surrogate="sapo", tau_pos=2.0)
    assert config.algorithm.options == {"tau_pos": 2.0, "tau_neg": 1.05}
    assert AlgorithmConfig(preset="sapo", surrogate="dual_clip").algorithm.options == {
        "clip_low": 0.2, "clip_high": 0.2, "dual": 3.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "ppo"}, "preset\n  Input should be 'grpo', 'dr_grpo', "),
        ({"preset": ["grpo"]}, "preset\n  Input should be 'grpo', 'dr_grpo', "),
        ({"advantage": "zscore"}, "advantage\n  Input should be 'group_zscore', "),
        ({"advantage": "remax"}, "advantage\n  Input should be 'group_zscore', "),
        ({"advantage": "gae"}, "advantage\n  Input should be 'group_zscore', "),
        ({"surrogate": "clip"}, "surrogate\n  Input should be 'ppo_clip', "),
        ({"level": "word"}, "level\n  Input should be 'token_level', "),
        ({"reduction": "mean"}, "reduction\n  Input should be 'token_mean', "),
        ({"kl_estimator": "k4"}, "kl_estimator\n  Input should be 'k1', "),
        ({"clip_low": 1.5}, "clip_low=1.5, clip_high=0.2: expected 0 <= clip_low < 1"),
        ({"preset": "sapo", "clip_low": 0.1}, "'sapo' has no clip_low; it has tau_pos, tau_neg"),
        ({"preset": "opo", "dual": 3.0}, "'reinforce' has no dual; it has no hyperparameters"),
    ],
)
def test_what_is_in_no_list_is_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        AlgorithmConfig(**values)


def test_a_group_of_one_is_refused(make):
    with pytest.raises(ValidationError, match="group_size=1 gives no baseline; use at least 2"):
        make([[1]], group_size=1)


def test_what_does_not_divide_is_refused(make):
    message = "12 completions .* do not divide into 5 minibatches of 1 micro-batches"
    with pytest.raises(ValidationError, match=message):
        make([MIXED] * 4, algorithm={"num_minibatches": 5})
    with pytest.raises(ValidationError, match="2 minibatches of 4 micro-batches"):
        make([MIXED] * 4, algorithm={"num_minibatches": 2}, data={"micro_batches": 4})


def test_more_tokens_than_the_model_can_see_are_refused(make):
    message = "max_prompt_tokens=16 and max_tokens=49 exceed the model's context of 64 tokens"
    with pytest.raises(UserError, match=message):
        make([MIXED] * 4, max_tokens=49)


def test_a_prompt_longer_than_allowed_names_its_line(make, world):
    lines = (world / "train.jsonl").read_text().splitlines()
    longest = max(len(json.loads(line)["prompt"]) for line in lines)
    phase = make([MIXED] * 4, rollout={"max_prompt_tokens": longest})  # One more with BOS.
    with pytest.raises(UserError, match=rf"train.jsonl:\d+: {longest + 1} tokens, but only"):
        collect(phase, num=20)


def test_what_looks_wrong_is_said_with_the_remedy(make):
    phase = make([MIXED] * 4)
    fine = {
        "frac_reward_zero_std": 0.9, "completions/clipped_ratio": 0.9, "reward": 0.5, "kl": 9.0,
        "sampling/sampling_logp_difference/max": 0.5,
    }  # fmt: skip
    assert phase.diagnose(fine) == []
    assert phase.diagnose({k: fine[k] for k in list(fine)[:3]}) == [], "no update, no KL"
    for change, words in [
        ({"frac_reward_zero_std": 1.0}, ["all rewards are equal (mean 0.5)", "group_size"]),
        ({"reward": math.nan, "frac_reward_zero_std": 1.0}, ["no sample has a reward"]),
        ({"completions/clipped_ratio": 1.0}, ["max_tokens=10", "raise it", "stop_tokens"]),
        ({"kl": 11.0}, ["11 nats", "learning_rate", "kl_coef"]),
        ({"sampling/sampling_logp_difference/max": 1.5}, ["1.5 nats", "float32"]),
    ]:
        (text,) = phase.diagnose(fine | change)
        assert all(word in text for word in words), text
    assert len(phase.diagnose({k: 99.0 if k == "kl" else 1.0 for k in fine})) == 3


# --- the loss against the formula in float64 ------------------------------------------------------

LENGTHS = [(2, 5), (1, 1), (4, 3), (3, 6), (1, 4), (2, 2)]  # Of prompt and completion.
TEMPERATURE, MAX_TOKENS = 0.7, 9


@pytest.fixture(scope="module")
def ragged():
    """A model, sequences with made-up old and reference log-probs, and the model's own."""
    model = Model(ModelConfig.tiny(VOCAB, hidden_size=16, num_layers=1, num_heads=2,
                                   intermediate_size=32))  # fmt: skip
    params = model.init(jax.random.PRNGKey(0))
    params["embedding"] = params["embedding"] * 10
    rng = np.random.default_rng(0)

    @jax.jit
    def log_probs(ids):
        hidden, _ = model.apply(params, ids[None], jnp.ones_like(ids[None]), jnp.arange(9)[None])
        return jax.nn.log_softmax(model.logits(params, hidden)[0] / TEMPERATURE)

    made = []
    for i, (before, after) in enumerate(LENGTHS):
        ids = rng.integers(0, VOCAB, before + after).astype(np.int32)
        table = np.asarray(log_probs(np.pad(ids, (0, 9 - len(ids)))), np.float64)
        own = np.array([table[t - 1, ids[t]] for t in range(before, len(ids))])
        entropy = np.array([-(np.exp(table[t - 1]) * table[t - 1]).sum()
                            for t in range(before, len(ids))])  # fmt: skip
        old = (own + rng.normal(0, 0.3, after)).astype(np.float32)
        ref = (own + rng.normal(0, 0.5, after)).astype(np.float32)
        made.append((ids, before, own, old, ref, float(rng.normal()) * (i != 2), entropy))
    return model, params, made


def packed_rows(made):
    def sequence(ids, before, own, old, ref, advantage, entropy):
        full = lambda x: np.concatenate([np.full(before, 77.0), x]).astype(np.float32)  # noqa: E731
        return {
            "tokens": ids, "mask": np.arange(len(ids)) >= before, "old_logps": full(old),
            "ref_logps": full(ref), "advantages": full(np.full(len(old), advantage)),
        }  # fmt: skip

    batch, used = pack([sequence(*m) for m in made], num_rows=4, row_len=16)
    assert used == len(made) and batch["segment_ids"].max() > 1
    return batch


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "dapo"])
def test_loss_is_the_formula_in_float64(ragged, preset, kl):
    model, params, made = ragged
    config = AlgorithmConfig(preset=preset, kl_coef=0.3, kl_estimator=kl)
    high = {"dapo": 0.28}.get(preset, 0.2)
    total, weight, terms = 0.0, 0.0, []
    for _, _, own, old, ref, advantage, _ in made:
        r = np.exp(own - old.astype(np.float64))
        surrogate = np.minimum(r * advantage, np.clip(r, 0.8, 1 + high) * advantage)
        d = own - ref.astype(np.float64)
        penalty = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}[kl]
        per_token = -surrogate + 0.3 * penalty
        match preset:
            case "grpo":
                total, weight = total + per_token.mean(), weight + 1
            case "dr_grpo":
                total, weight = total + per_token.sum(), weight + MAX_TOKENS
            case "dapo":
                total, weight = total + per_token.sum(), weight + len(own)
        low_side = (r < 0.8) & (advantage < 0)
        high_side = (r > 1 + high) & (advantage > 0)
        terms.append(np.stack([penalty, low_side, high_side, low_side | high_side, r]))
    entropies = np.concatenate([m[-1] for m in made])
    terms = np.concatenate(terms, axis=1)
    loss, metrics = jax.jit(
        lambda p, b: grpo_loss(model, p, b, config, temperature=TEMPERATURE, max_tokens=MAX_TOKENS)
    )(params, packed_rows(made))
    assert float(loss.total) == pytest.approx(total, rel=2e-5)
    assert float(loss.weight) == weight

    def mean(name):
        assert float(metrics[name].weight) == terms.shape[1]
        return float(metrics[name].total) / terms.shape[1]

    kl_mean, low, high_mean, region, ratio = terms.mean(1)
    assert low > 0 and high_mean > 0, "both clips are at work"
    difference = np.abs(np.log(terms[4]))
    assert mean("kl") == pytest.approx(kl_mean, rel=2e-5)
    assert mean("entropy") == pytest.approx(entropies.mean(), rel=2e-5)
    assert mean("clip_ratio/low_mean") == pytest.approx(low)
    assert mean("clip_ratio/high_mean") == pytest.approx(high_mean)
    assert mean("clip_ratio/region_mean") == pytest.approx(region)
    name = "sampling/importance_sampling_ratio"
    assert mean(f"{name}/mean") == pytest.approx(ratio, rel=2e-5)
    assert float(metrics[f"{name}/min"].value) == pytest.approx(terms[4].min(), rel=2e-5)
    assert float(metrics[f"{name}/max"].value) == pytest.approx(terms[4].max(), rel=2e-5)
    name = "sampling/sampling_logp_difference"
    assert mean(f"{name}/mean") == pytest.approx(difference.mean(), rel=1e-4)
    assert float(metrics[f"{name}/max"].value) == pytest.approx(difference.max(), rel=1e-4)


@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_completions_beside_one_prompt_have_the_loss_and_gradient_that_each_has_alone(
    ragged, preset
):
    """Prompts of 1, 3 and 4 tokens with 2, 3 and 1 completions, up to 2 of them to a copy."""
    model, params, _ = ragged
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (1, 3, 4)]
    apart = []
    for prompt, length in zip([prompts[i] for i in (0, 1, 1, 2, 0, 1)], (5, 3, 1, 4, 2, 6),
                              strict=True):  # fmt: skip
        num = len(prompt) + length
        on = np.arange(num) >= len(prompt)

        def noise(on=on, num=num):
            return np.where(on, rng.normal(-2, 0.5, num), 9.0).astype(np.float32)

        apart.append({
            "tokens": np.concatenate([prompt, rng.integers(0, VOCAB, length)]).astype(np.int32),
            "mask": on, "old_logps": noise(), "ref_logps": noise(), "advantages": noise() + 2,
        })  # fmt: skip
    together = share_prompts(apart, 2)
    assert [int(one["branches"].max()) for one in together] == [2, 2, 1, 1]
    plain, used = pack(apart, num_rows=4, row_len=20)
    assert used == 6
    shared, used = pack(together, num_rows=4, row_len=20)
    assert used == 4 and shared["segment_ids"].max() > 1
    shared["sequence_ids"] = sequence_ids(shared)
    config = AlgorithmConfig(preset=preset, kl_coef=0.2)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def of(params, batch):
        loss, metrics = grpo_loss(
            model, params, batch, config, temperature=TEMPERATURE, max_tokens=MAX_TOKENS
        )
        return loss.total, (loss.weight, jax.tree.map(lambda m: m, metrics))

    (total, (weight, metrics)), grads = of(params, plain)
    (total_, (weight_, metrics_)), grads_ = of(params, shared)
    assert float(weight) == float(weight_) == 6
    assert float(total) == pytest.approx(float(total_), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grads, grads_)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), metrics, metrics_)
    # A completion that saw the one before it, or whose own were not told apart, would show.
    seeing = {**shared, "branches": np.zeros_like(shared["branches"])}
    (other, _), _ = of(params, seeing)
    assert abs(float(other) - float(total)) > 1e-3
    if preset == "gspo":
        (other, _), _ = of(params, {**shared, "sequence_ids": shared["segment_ids"]})
        assert abs(float(other) - float(total)) > 1e-4


def test_ratios_may_be_taken_against_the_trainer(make):
    """The made-up log-probs of the sampler are then metrics alone."""
    phase = make([MIXED] * 4, algorithm={"old_logps": "trainer"})
    state, collected = phase.collect(phase.init(jax.random.PRNGKey(5)), phase.records())
    (batch,) = collected.batches
    before = jax.device_get(batch)
    _, metrics = phase.step(state, batch)
    assert float(metrics["clip_ratio/region_mean"]) == 0 and abs(float(metrics["loss"])) < 1e-5
    assert float(metrics["sampling/sampling_logp_difference/mean"]) > 0.5
    on = before["mask"]
    difference = np.abs(before["old_logps"] - before["sampler_logps"])[on]
    assert float(metrics["sampling/sampling_logp_difference/mean"]) == pytest.approx(
        difference.mean(), rel=1e-4
    )


def test_rows_hold_every_split_of_groups_over_minibatches(make):
    """Sequences of an update in any mixture of groups, all as long as they may be."""
    phase = make(
        [MIXED] * 4, group_size=4, num_prompts=4, algorithm={"num_minibatches": 2},
        data={"num_sharing": 3, "micro_batches": 2},
    )  # fmt: skip
    rows = phase._rows
    assert (rows.num_sharing, rows.row_len) == (3, 15 + 3 * 11)
    rng = np.random.default_rng(0)
    all_of_them = [
        {"tokens": np.full(26, prompt, np.int32), "mask": np.arange(26) >= 16}
        for prompt in range(4) for _ in range(4)
    ]  # fmt: skip
    for _ in range(50):
        order = rng.permutation(16)
        for half in np.split(order, 2):
            packed = rows.pack([all_of_them[i] for i in half])
            assert packed["tokens"].shape == (2, rows.num_rows // 2, rows.row_len)
            assert packed["mask"].sum() == 80
    assert rows.pack(all_of_them, 2)["mask"].sum() == 160


def test_the_longest_go_into_rows_first(make):
    phase = make([MIXED] * 4)
    lengths = [5, 14, 12, 21, 26, 4]
    packed = phase._rows.pack(
        [{"tokens": np.full(n, n, np.int32), "mask": np.arange(n) > 0} for n in lengths]
    )
    found = [list(dict.fromkeys(row[row > 0].tolist())) for row in packed["tokens"][0]]
    assert [row for row in found if row] == [[26], [21, 5], [14, 12], [4]]


def test_without_reference_log_probs_there_is_no_kl(ragged):
    model, params, made = ragged
    batch = packed_rows(made)
    batch.pop("ref_logps")
    loss, metrics = grpo_loss(
        model,
        params,
        batch,
        AlgorithmConfig(kl_coef=0),
        temperature=TEMPERATURE,
        max_tokens=MAX_TOKENS,
    )
    assert "kl" not in metrics and np.isfinite(float(loss.total))
