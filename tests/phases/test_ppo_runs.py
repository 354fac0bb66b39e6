"""PPO with its real sampler: it learns, and what must not change it does not."""

import json
import math

import jax
import numpy as np
import pytest

from alignjax.core.types import Score
from alignjax.models import (
    Model,
    ModelConfig,
    ScalarModel,
    load,
    load_reward,
    load_value_head,
    save,
    save_reward,
)
from alignjax.phases import scoring
from alignjax.phases.ppo import Ppo
from alignjax.phases.ppo_config import PpoConfig
from alignjax.recipes import chains
from alignjax.recipes.stage import digests, export_checkpoint, run_phase
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.text import load_tokenizer
from tests.phases.compiled import compilations

SHAPE = {
    "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Prompts of 7, 10 and 13 tokens, a base model, and a reward model of other weights."""
    folder = tmp_path_factory.mktemp("world")
    chains.write(
        folder, seed=0, num_questions=40, num_drills=1, num_train=60, num_test=8, num_ops=(1, 2, 3)
    )
    tokenizer = load_tokenizer(folder / "tokenizer")
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE)
    for name in ("base", "rm"):
        tokenizer.save(str(folder / name))
    save(folder / "base", Model(shape), Model(shape).init(jax.random.key(1)))
    reward = ScalarModel(Model(shape))
    ids = {"pad_token_id": tokenizer.pad_id}
    save_reward(folder / "rm", reward, reward.init(jax.random.key(2)), extra_config=ids)
    (folder / "rm/reward.json").write_text(json.dumps({"mean": 0.1, "std": 0.5, "num": 9}))
    return folder


def share_of_sevens(samples):
    """Dense, deterministic and not flat: a random policy gets about 0.04."""
    return [Score(s.completion.count("7") / max(1, s.num_tokens)) for s in samples]


def values_of(world, **changes):
    return {
        "phase": "ppo", "name": "x", "tokenizer": str(world / "tokenizer"),
        "model": {"init": SHAPE},
        "data": {
            "train": str(world / "train.jsonl"), "eval": str(world / "test.jsonl"),
            "text": {"fields": {"prompt": "prompt", "reference": "reference"}},
            **changes.pop("data", {}),
        },
        "rollout": {
            "num_prompts": 16, "group_size": 2, "max_prompt_tokens": 16, "max_tokens": 8,
            **changes.pop("rollout", {}),
        },
        # Weights that have moved since sampling, and everything on that there is.
        "algorithm": {
            "kl_coef": 0.1, "kl_control": "adaptive", "kl_target": 0.2, "kl_horizon": 100,
            "num_epochs": 2, "num_minibatches": 2, "value_coef": 0.5, "ptx_coef": 0.3,
            "missing_eos_penalty": 0.1, "scale_scores": True, "whiten_rewards": True, "dual": 3.0,
            **changes.pop("algorithm", {}),
        },
        "ptx": {
            "train": str(world / "corpus.jsonl"), "text": {"fields": {"completion": "text"}},
            "overlong": "drop", "rows": 8,
        },
        "critic": {"learning_rate_scale": 2.0, **changes.pop("critic", {})},
        "rewards": {"functions": {"sevens": {"function": "verify.exact"}}},
        "evaluation": {"num_problems": 8, "best_of_n": 4},
        "optimizer": {"learning_rate": 3e-3},
        **changes,
    }  # fmt: skip


@pytest.fixture
def make(world, monkeypatch):
    def build(sizes=(1, 1, 1), score=share_of_sevens, **changes):
        monkeypatch.setattr(scoring, "RewardPool", lambda config, **_: score)
        mesh = make_mesh(
            MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))),
            jax.devices()[: math.prod(sizes)],
        )
        return Ppo(PpoConfig.model_validate(values_of(world, **changes)), mesh)

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


PLAIN = {
    "kl_control": "fixed", "kl_target": None, "ptx_coef": 0.0, "missing_eos_penalty": 0.0,
    "scale_scores": False, "whiten_rewards": False, "dual": None,
}  # fmt: skip


@pytest.mark.parametrize("trunk", ["separate", "shared"])
def test_it_learns_to_say_seven(make, trunk):
    phase = make(
        algorithm={**PLAIN, "kl_coef": 0.005, "num_epochs": 4}, ptx=None, critic={"trunk": trunk},
        optimizer={"learning_rate": 1e-2}, rollout={"num_prompts": 32},
    )  # fmt: skip
    before = phase.evaluate(phase.init(jax.random.PRNGKey(0))).metrics
    state, seen = run(phase, 10)
    after = phase.evaluate(state).metrics
    assert before["eval/sampled/reward"] < 0.15 and before["eval/sampled/kl"] == pytest.approx(
        0, abs=1e-4
    )
    assert after["eval/sampled/reward"] > 0.6 > 2 * after["eval/best_of_n/reward"]
    assert 1 < after["eval/sampled/kl"] < 40
    assert after["eval/best_of_n/reward"] == before["eval/best_of_n/reward"]
    assert seen[0][0].metrics["val/explained_variance"] <= 0.0, "zeros explain nothing"
    assert max(c.metrics["val/explained_variance"] for c, _ in seen) > 0.05


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_nothing_is_compiled_after_the_first_iteration(make, world, sizes):
    """On ragged completions, failed rewards and a reward model, with everything on."""

    def some_fail(samples):
        scores = share_of_sevens(samples)
        for i in np.flatnonzero([s.num_tokens % 5 == 0 for s in samples]):
            scores[i] = Score(None, error="five")
        return scores

    rewards = {
        "functions": {"sevens": {"function": "verify.exact"}},
        "models": {"rm": {"path": str(world / "rm"), "weight": 0.1}}, "max_failure_frac": 0.9,
    }  # fmt: skip
    phase = make(sizes, some_fail, data={"micro_batches": 2}, rewards=rewards)
    per_step = []
    with compilations() as names:

        def after(state):
            phase.evaluate(state)
            per_step.append(list(names))
            names.clear()

        _, seen = run(phase, 4, after=after)
    assert len(per_step[0]) > 5, "counting works"
    assert per_step[1:] == [[]] * 3
    assert len({c.metrics["num_failed_rewards"] for c, _ in seen}) > 1
    assert len({c.metrics["kl_coef"] for c, _ in seen}) == 4


TOLERANCES = {
    "loss": 1e-4, "grad_norm": 1e-3, "entropy": 1e-5, "loss/policy_avg": 1e-4,
    "loss/value_avg": 1e-4, "loss/ptx_avg": 1e-5, "val/ratio": 1e-5,
}  # fmt: skip


@pytest.fixture(scope="module")
def reference():
    return {}


@pytest.fixture
def four_steps(make, reference):
    """On one device, one micro-batch, packed."""
    if not reference:
        state, seen = run(make(), 4)
        reference["result"] = jax.device_get((state.params, state.extra)), seen
    return reference["result"]


def assert_same(result, expected):
    (state, got), ((params, extra), want) = result, expected
    for (collected, updates), (collected_, updates_) in zip(got, want, strict=True):
        assert len(updates) == len(updates_) == 4
        assert collected.metrics == pytest.approx(collected_.metrics, rel=1e-4, abs=1e-6)
        for a, b in zip(updates, updates_, strict=True):
            for name, rel in TOLERANCES.items():
                assert float(a[name]) == pytest.approx(float(b[name]), rel=rel, abs=1e-5), name
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5)  # noqa: E731
    jax.tree.map(close, jax.device_get(state.params), params)
    jax.tree.map(close, jax.device_get(state.extra), extra)


def test_the_sampler_is_the_trainer(four_steps):
    for _, updates in four_steps[1]:
        assert float(updates[0]["sampling/sampling_logp_difference/max"]) < 1e-5
        assert float(updates[-1]["sampling/sampling_logp_difference/max"]) > 1e-3
        assert float(updates[0]["policy/clipfrac_avg"]) == 0


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_8_devices_change_nothing(make, four_steps, sizes):
    assert_same(run(make(sizes), 4), four_steps)


def test_2_micro_batches_change_nothing(make, four_steps, world):
    """Half the rows of texts in each."""
    ptx = values_of(world)["ptx"] | {"rows": 4}
    assert_same(run(make(data={"micro_batches": 2}, ptx=ptx), 4), four_steps)


def test_packing_changes_nothing(make, four_steps):
    assert_same(run(make(data={"packed": False}), 4), four_steps)


def test_the_temperature_is_that_of_sampler_trainer_and_reference(make):
    """Before the first update all three are the same weights, whatever the temperature."""
    ((collected, updates),) = run(make(rollout={"temperature": 0.6}), 1)[1]
    assert abs(collected.metrics["objective/kl"]) < 1e-4
    assert float(updates[0]["sampling/sampling_logp_difference/max"]) < 1e-5


# --- what a run keeps, and what it leaves ---------------------------------------------------------


def config_of(world, folder, **changes):
    return PpoConfig.model_validate(
        values_of(
            world, output_dir=str(folder),
            loop={"steps": 4, "checkpoint_every": 1, "tensorboard": False}, **changes,
        )
    )  # fmt: skip


LORA = {"path": "base", "lora": {"rank": 4}}


@pytest.mark.parametrize("kind", ["all", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_run_that_was_killed_goes_on_bit_for_bit(world, tmp_path, monkeypatch, kind):
    """Critic, coefficient of the KL, moments and the place in the texts included."""
    monkeypatch.setattr(scoring, "RewardPool", lambda config, **_: share_of_sevens)
    changes = {"critic": {"path": str(world / "rm")}}
    if kind == "lora":
        changes = {
            "model": {"path": str(world / "base"), "lora": {"rank": 4}},
            "critic": {"trunk": "shared"},
        }
    whole = run_phase(config_of(world, tmp_path / "a", **changes), command="again").parent
    step = Ppo.step

    def die(self, state, batch):
        if int(state.step) == 2:
            raise MemoryError
        return step(self, state, batch)

    monkeypatch.setattr(Ppo, "step", die)
    with pytest.raises(MemoryError):
        run_phase(config_of(world, tmp_path / "b", **changes), command="again")
    monkeypatch.setattr(Ppo, "step", step)
    again = run_phase(config_of(world, tmp_path / "b", **changes), command="again").parent
    names = ["model/model.safetensors", "samples.jsonl"]
    names.append("critic/model.safetensors" if kind == "all" else "critic/value_head.safetensors")
    for name in names:
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (again, whole)
    ]
    assert len({row["kl_coef"] for row in rows[0] if "kl_coef" in row}) == 4
    for one, other in zip(*rows, strict=True):
        for name in one.keys() - {"step_time", "tokens_per_second"}:
            assert one[name] == other[name], name
    # The exported policy is the one of the last checkpoint, found beside its critic.
    assert export_checkpoint(again, tmp_path / "out") == 4
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        again / "model/model.safetensors"
    ).read_bytes()
    if kind == "all":
        _, params = load_reward(again / "critic")
        assert load_tokenizer(again / "critic").vocab == load_tokenizer(world / "base").vocab
        before = load_reward(world / "rm")[1]
        assert np.abs(params["head"]["kernel"] - before["head"]["kernel"]).max() > 1e-3
        assert f"critic.path {world / 'rm'}" in digests(config_of(world, tmp_path, **changes))
    else:
        assert load_value_head(again / "critic")["kernel"].shape == (16,)
        assert load(again / "model")[0].config.hidden_size == 16


def test_under_lora_adapters_train_and_the_critic_whole(make, world):
    model = {"path": str(world / "base"), "lora": {"rank": 4}, "quantize": "int8"}
    phase = make(model=model)
    before = jax.device_get(phase._policy.frozen)
    first = phase.init(jax.random.PRNGKey(0))
    kinds = {
        jax.tree_util.keystr(path).split("'")[1]: "lora" in jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(first.params)
    }
    assert kinds == {"policy": True, "critic": False}
    loaded = load(world / "base")[1]
    np.testing.assert_array_equal(first.params["critic"]["decoder"]["embedding"],
                                  loaded["embedding"])  # fmt: skip
    state, seen = run(phase, 2)
    assert abs(seen[0][0].metrics["objective/kl"]) < 1e-3
    assert abs(seen[1][0].metrics["objective/kl"]) > 1e-4
    jax.tree.map(np.testing.assert_array_equal, phase._policy.frozen, before)
    moved = jax.device_get(state.params["critic"]["decoder"]["embedding"])
    assert np.abs(moved - loaded["embedding"]).max() > 1e-4
