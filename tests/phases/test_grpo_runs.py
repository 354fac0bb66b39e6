"""GRPO with its real sampler: it learns, and what must not change it does not."""

import json
import math

import jax
import numpy as np
import pytest

from alignjax.core.types import Score
from alignjax.phases import scoring
from alignjax.phases.grpo import Grpo
from alignjax.phases.grpo_config import GrpoConfig
from alignjax.recipes import chains
from alignjax.sharding import MeshConfig, make_mesh
from tests.phases.compiled import compilations


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Prompts of 7, 10 and 13 tokens."""
    folder = tmp_path_factory.mktemp("world")
    chains.write(
        folder, seed=0, num_questions=1, num_drills=1, num_train=60, num_test=8, num_ops=(1, 2, 3)
    )
    return folder


def share_of_sevens(samples):
    """Dense, deterministic and not flat: a random policy gets about 0.04."""
    return [Score(s.completion.count("7") / max(1, s.num_tokens)) for s in samples]


@pytest.fixture
def make(world, monkeypatch):
    def build(sizes=(1, 1, 1), rewards=share_of_sevens, **changes):
        monkeypatch.setattr(scoring, "RewardPool", lambda config, **_: rewards)
        values = {
            "phase": "grpo", "name": "x", "tokenizer": str(world / "tokenizer"),
            "model": {"init": {
                "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32,
                "max_position_embeddings": 64, "initializer_range": 0.3,
            }},
            "data": {
                "train": str(world / "train.jsonl"), "eval": str(world / "test.jsonl"),
                "text": {"fields": {"prompt": "prompt", "reference": "reference"}},
                "num_sharing": 1, **changes.pop("data", {}),
            },
            "rollout": {
                "num_prompts": 8, "group_size": 4, "max_prompt_tokens": 16, "max_tokens": 8,
                **changes.pop("rollout", {}),
            },
            # A loss that is not 0 by construction, and weights that have moved since sampling.
            "algorithm": {
                "preset": "dapo", "kl_coef": 0.1, "num_updates": 2, "num_minibatches": 2,
                "reference_every": 2, **changes.pop("algorithm", {}),
            },
            "rewards": {"functions": {"sevens": {"function": "verify.exact"}}},
            "evaluation": {"num_problems": 8},
            "optimizer": {"learning_rate": 3e-3},
            **changes,
        }  # fmt: skip
        mesh = make_mesh(
            MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))),
            jax.devices()[: math.prod(sizes)],
        )
        return Grpo(GrpoConfig.model_validate(values), mesh)

    return build


def run(phase, num_steps, *, after=lambda state: None):
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    seen = []
    for _ in range(num_steps):
        state, collected = phase.collect(state, records)
        updates = []
        for batch in collected.batches:
            state, metrics = phase.step(state, batch)
            updates.append(metrics)
        state = state._replace(step=state.step + 1)
        seen.append((collected, jax.device_get(updates)))
        after(state)
    return state, seen


def test_it_learns_to_say_seven(make):
    phase = make(algorithm={"kl_coef": 0.0, "reference_every": 0, "dynamic_sampling": False,
                            "overlong_frac": 0.0},
                 optimizer={"learning_rate": 2e-2})  # fmt: skip
    state = phase.init(jax.random.PRNGKey(0))
    before = phase.evaluate(state).metrics
    state, seen = run(phase, 12)
    after = phase.evaluate(state).metrics
    assert before["eval/sampled/reward"] < 0.15 and seen[0][0].metrics["reward"] < 0.15
    assert after["eval/sampled/reward"] > 0.6
    assert after["eval/greedy/reward"] > 0.9


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_nothing_is_compiled_after_the_first_iteration(make, sizes):
    """On ragged prompts and completions, with everything on that an iteration can have."""
    rewards = {"round": 0}

    def sometimes_flat(samples):
        # Of the rounds of training, every other has two groups only that tell good from bad.
        if len(samples) == 32:
            rewards["round"] += 1
        scores = share_of_sevens(samples)
        scores = [Score(s.value + (i % 4 == 0)) for i, s in enumerate(scores)]
        if rewards["round"] % 2 and len(samples) == 32:
            scores[8:] = [Score(0.0)] * 24
            scores[3] = Score(None, error="failed")
        return scores

    phase = make(sizes, sometimes_flat, data={"micro_batches": 2})
    per_step, lengths = [], set()
    with compilations() as names:

        def after(state):
            phase.evaluate(state)
            per_step.append(list(names))
            names.clear()

        _, seen = run(phase, 5, after=after)
    assert "decode" in " ".join(per_step[0]) or len(per_step[0]) > 5, "counting works"
    assert per_step[1:] == [[]] * 4
    for collected, updates in seen:
        lengths.add(collected.metrics["completions/mean_length"])
        assert collected.metrics["num_rounds"] >= 2 and len(updates) == 4
    assert len(lengths) == 5, "ragged"
    assert any(c.metrics["num_failed_rewards"] for c, _ in seen)


TOLERANCES = {
    "loss": 1e-5, "grad_norm": 1e-4, "entropy": 1e-5,
    "sampling/importance_sampling_ratio/mean": 1e-5,
    "kl": 1e-4,  # exp(-d) - 1 + d of a small d: most of its digits cancel.
}  # fmt: skip


@pytest.fixture(scope="module")
def reference():
    return {}


@pytest.fixture
def five_steps(make, reference):
    """On one device, one micro-batch, packed."""
    if not reference:
        state, seen = run(make(), 5)
        reference["result"] = jax.device_get(state.params), seen
    return reference["result"]


def assert_same(result, expected):
    (state, got), (params, want) = result, expected
    for (collected, updates), (collected_, updates_) in zip(got, want, strict=True):
        assert collected.metrics == pytest.approx(collected_.metrics, rel=1e-6), "same samples"
        for a, b in zip(updates, updates_, strict=True):
            for name, rel in TOLERANCES.items():
                assert float(a[name]) == pytest.approx(float(b[name]), rel=rel), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state.params, params)


def test_the_sampler_is_the_trainer(five_steps):
    for _, updates in five_steps[1]:
        assert len(updates) == 4
        for update in updates[:1]:  # Later ones have other weights.
            assert float(update["sampling/sampling_logp_difference/max"]) < 1e-5
            assert abs(float(update["sampling/importance_sampling_ratio/max"]) - 1) < 1e-5
        assert float(updates[-1]["sampling/sampling_logp_difference/max"]) > 1e-3
    losses = [float(u["loss"]) for _, updates in five_steps[1] for u in updates]
    assert min(map(abs, losses)) > 1e-4, "not the 0 of an on-policy surrogate"


def test_the_temperature_is_that_of_sampler_trainer_and_reference(make):
    """Before the first update all three are the same weights, whatever the temperature."""
    _, ((_, updates),) = run(make(rollout={"temperature": 0.6}), 1)
    assert float(updates[0]["kl"]) < 1e-9
    assert float(updates[0]["sampling/sampling_logp_difference/max"]) < 1e-5


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_8_devices_change_nothing(make, five_steps, sizes):
    result = run(make(sizes), 5)
    assert_same(result, five_steps)
    for _, updates in result[1]:
        assert float(updates[0]["sampling/sampling_logp_difference/max"]) < 1e-5


def test_4_micro_batches_change_nothing(make, five_steps):
    assert_same(run(make(data={"micro_batches": 4}), 5), five_steps)


def test_packing_changes_nothing(make, five_steps):
    assert_same(run(make(data={"packed": False}), 5), five_steps)


@pytest.mark.parametrize(
    "sizes, data",
    [
        ((1, 1, 1), {"num_sharing": "auto"}),  # Prompts of up to 16 tokens, completions of 8.
        # Groups of 4 in rows of 3 and of 1, which minibatches cut anywhere.
        pytest.param((2, 2, 2), {"num_sharing": 3, "micro_batches": 2}, marks=pytest.mark.slow),
    ],
)
def test_sharing_prompts_changes_nothing(make, five_steps, sizes, data):
    phase = make(sizes, data=data)
    assert phase._rows.num_sharing == (4 if data["num_sharing"] == "auto" else 3)
    result = run(phase, 5)
    assert_same(result, five_steps)
    for _, updates in result[1]:
        assert float(updates[0]["sampling/sampling_logp_difference/max"]) < 1e-5


def test_another_seed_is_another_run(make, five_steps):
    phase = make()
    state = phase.init(jax.random.PRNGKey(1))
    _, collected = phase.collect(state, phase.records())
    assert collected.metrics != five_steps[1][0][0].metrics


def test_iterations_sample_other_completions(five_steps):
    """Also where prompts come back: another step is another key."""
    texts = [[s["completion"] for s in c.samples] for c, _ in five_steps[1]]
    assert len({tuple(t) for t in texts}) == 5
    assert all(len(set(t)) > 1 for t in texts)
    json.dumps(five_steps[1][0][0].samples)
