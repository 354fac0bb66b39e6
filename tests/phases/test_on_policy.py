"""What is sampled from is what was last trained: to 1e-5 with the engine, to the bit without it."""

import jax
import numpy as np
import pytest
from pydantic import ValidationError

from alignjax.core.types import Sampling, Score
from alignjax.generate import make_generate
from alignjax.generate.exact import make_exact_generate
from alignjax.models import Model, ModelConfig, save
from alignjax.phases import scoring
from alignjax.phases.grpo import Grpo
from alignjax.phases.grpo_config import GrpoConfig
from alignjax.recipes import chains
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.text import load_tokenizer

SHAPE = {
    "family": "qwen3", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
    "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    chains.write(
        folder, seed=0, num_questions=1, num_drills=1, num_train=40, num_test=6, num_ops=(1, 2, 3)
    )
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = Model(ModelConfig(**SHAPE, vocab_size=tokenizer.vocab_size))
    extra = {"eos_token_id": tokenizer.eos_id}
    save(folder / "base", model, model.init(jax.random.PRNGKey(0)), extra_config=extra)
    tokenizer.save(str(folder / "base"))
    return folder


def make(world, monkeypatch, **changes):
    def share_of_sevens(samples):
        return [Score(s.completion.count("7") / max(1, s.num_tokens)) for s in samples]

    monkeypatch.setattr(scoring, "RewardPool", lambda config, **_: share_of_sevens)
    values = {
        "phase": "grpo", "name": "x",
        "model": {"path": str(world / "base"), **changes.pop("model", {})},
        "data": {
            "train": str(world / "train.jsonl"), "num_sharing": 1,
            "text": {"fields": {"prompt": "prompt", "reference": "reference"}},
            **changes.pop("data", {}),
        },
        "rollout": {
            "num_prompts": 4, "group_size": 4, "max_prompt_tokens": 16, "max_tokens": 8,
            **changes.pop("rollout", {}),
        },
        "algorithm": {"preset": "grpo", "kl_coef": 0.0, **changes.pop("algorithm", {})},
        "rewards": {"functions": {"sevens": {"function": "verify.exact"}}},
        "optimizer": {"learning_rate": 0.03},
        **changes,
    }  # fmt: skip
    return Grpo(GrpoConfig.model_validate(values), make_mesh(MeshConfig(), jax.devices()[:1]))


def iterations(phase, num):
    """The first batch of each iteration, its metrics, and the params that it was sampled with."""
    state, records, seen = phase.init(jax.random.PRNGKey(0)), phase.records(), []
    for _ in range(num):
        params = jax.device_get(state.params)
        state, collected = phase.collect(state, records)
        for number, batch in enumerate(collected.batches):
            state, metrics = phase.step(state, batch)
            if number == 0:
                seen.append((batch, jax.device_get(metrics), params))
        state = state._replace(step=state.step + 1)
    return seen


LORA = {"lora": {"rank": 4, "alpha": 8.0}}


@pytest.mark.parametrize(
    "model",
    [LORA, pytest.param(LORA | {"quantize": "int8"}, marks=pytest.mark.slow)],
    ids=["lora", "int8"],
)
def test_updates_reach_the_sampler(world, monkeypatch, model):
    """Adapters, on a base of 32 and of 8 bits; whole models: test_grpo_runs.py. A sampler with the
    adapters of the iteration before would be found out: its log-probs are far off."""
    phase = make(world, monkeypatch, model=model)
    seen = iterations(phase, 3)
    for batch, metrics, params in seen:
        assert float(metrics["sampling/sampling_logp_difference/max"]) < 1e-5
        old = np.asarray(phase._logps(phase._policy.whole(params), batch))
        mask = np.asarray(batch["mask"])
        assert np.abs(old - np.asarray(batch["old_logps"]))[mask].max() < 1e-5
    for (batch, *_), (*_, stale) in zip(seen[1:], seen[:-1], strict=True):
        old = np.asarray(phase._logps(phase._policy.whole(stale), batch))
        mask = np.asarray(batch["mask"])
        assert np.abs(old - np.asarray(batch["old_logps"]))[mask].max() > 1e-2


@pytest.mark.slow
def test_int8_rollouts_are_of_what_was_trained_last(world, monkeypatch):
    """The codes are made anew from the weights of each iteration."""
    phase = make(world, monkeypatch, rollout={"int8_weights": True, "int8_kv": True})
    seen = iterations(phase, 3)

    def distance(batch, params):
        found = np.asarray(phase._logps(params, batch)) - np.asarray(batch["old_logps"])
        return float(np.abs(found)[np.asarray(batch["mask"])].mean())

    for batch, metrics, params in seen:
        mean = float(metrics["sampling/sampling_logp_difference/mean"])
        assert 1e-4 < mean < 0.05, "8 bits, and no more than that"
        assert distance(batch, params) == pytest.approx(mean, rel=1e-3)
    for (batch, *_), (*_, stale) in zip(seen[1:], seen[:-1], strict=True):
        assert distance(batch, stale) > 0.2


@pytest.mark.slow
def test_a_reference_that_is_the_base_is_computed_in_the_step(world, monkeypatch):
    """With the same result as before it."""
    seen = []
    for is_joint in (True, False):
        phase = make(world, monkeypatch, model=LORA, algorithm={"kl_coef": 0.1})
        assert phase._has_joint_reference
        phase._has_joint_reference = is_joint
        seen.append(iterations(phase, 2))
    for (batch, metrics, params), (batch_, metrics_, params_) in zip(*seen, strict=True):
        assert "ref_logps" not in batch and "ref_logps" in batch_
        for name in ("loss", "kl", "grad_norm"):
            assert float(metrics[name]) == pytest.approx(float(metrics_[name]), rel=1e-4, abs=1e-8)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, params_)
    assert float(seen[0][1][1]["kl"]) > 1e-4, "the adapters have moved"


def test_deterministic_runs_have_a_ratio_of_exactly_1(world, monkeypatch, compiled_as_for_users):
    """In each iteration, on the first minibatch, after updates have moved the weights."""
    phase = make(
        world, monkeypatch, deterministic=True, data={"num_sharing": "auto", "micro_batches": 2},
        rollout={"num_prompts": 8, "temperature": 0.7}, algorithm={"num_minibatches": 2},
    )  # fmt: skip
    seen = iterations(phase, 3)
    for _, metrics, _ in seen:
        assert float(metrics["sampling/sampling_logp_difference/max"]) == 0.0
        for name in ("min", "mean", "max"):
            assert float(metrics[f"sampling/importance_sampling_ratio/{name}"]) == 1.0
    lengths = np.concatenate([np.asarray(b["mask"]).sum(-1).ravel() for b, *_ in seen])
    assert len(set(lengths.tolist())) > 2, "ragged"
    assert not np.array_equal(*(p["embedding"] for *_, p in seen[:2])), "the weights have moved"


def test_scoring_early_changes_nothing(world, monkeypatch):
    seen = []
    for early in (False, True):
        phase = make(world, monkeypatch, rollout={"score_early": early})
        _, collected = phase.collect(phase.init(jax.random.PRNGKey(0)), phase.records())
        seen.append((collected.metrics, list(collected.samples), [*collected.batches]))
    (metrics, samples, batches), (metrics_, samples_, batches_) = jax.device_get(seen)
    assert metrics == metrics_ and samples == samples_ and metrics["reward"] > 0
    jax.tree.map(np.testing.assert_array_equal, batches, batches_)
    for changes, message in (
        ({"deterministic": True}, "samples all tokens first"),
        ({"rewards": {"models": {"rm": {"path": "x"}}}}, "for reward functions alone"),
    ):
        with pytest.raises(ValidationError, match=message):
            make(world, monkeypatch, rollout={"score_early": True}, **changes)


def test_it_draws_what_the_engine_draws(world):
    """The same keys: another sampler, not other samples. More rows than fit into one turn."""
    model = Model(ModelConfig(**SHAPE, vocab_size=17))
    params = model.init(jax.random.PRNGKey(0))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    rng = np.random.default_rng(0)
    prompts, lengths = rng.integers(1, 17, (5, 6)).astype(np.int32), np.array([6, 1, 3, 6, 2])
    exact = make_exact_generate(model, mesh, num_rows=8, row_len=16)
    for temperature in (0.0, 0.8):
        sampling = Sampling(
            temperature=temperature, max_tokens=7, stop_tokens=(3, 5), num_samples=3
        )
        key = jax.random.PRNGKey(4)
        expected = make_generate(model)(params, prompts, lengths, key, sampling)
        found = exact(params, prompts, lengths, key, sampling)
        for name in ("tokens", "lengths", "finish_reasons"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        np.testing.assert_allclose(found.logps, expected.logps, atol=1e-5)
    assert len(set(found.lengths.tolist())) > 2
    with pytest.raises(ValueError, match="temperature and stop tokens alone"):
        exact(params, prompts, lengths, key, Sampling(top_k=3))
    with pytest.raises(ValueError, match="max_tokens=11 exceed rows of 16"):
        exact(params, prompts, lengths, key, Sampling(max_tokens=11))
