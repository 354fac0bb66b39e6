"""Each phase that trains, on each kind of mesh: what it measures is what one device measures."""

import itertools

import jax
import numpy as np
import pytest

from alignjax.core.types import Score
from alignjax.phases import scoring
from alignjax.phases.registry import PHASES
from alignjax.recipes import sevens
from tests.models.test_parallel import MESHES
from tests.phases import distillation, rl

MODEL = {"init": {
    "family": "qwen3_moe", "hidden_size": 16, "intermediate_size": 16, "num_layers": 1,
    "num_heads": 8, "num_kv_heads": 8, "head_dim": 4, "num_experts": 4, "experts_per_token": 2,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}}  # fmt: skip
"""Heads for each device and experts for each of four."""
PROMPTS = {
    "train": "{root}/train.jsonl",
    "text": {"fields": {"prompt": "prompt", "reference": "reference"}},
}  # fmt: skip
PAIRS = {
    "train": "{root}/pairs.jsonl",
    "text": {"fields": {"prompt": "prompt", "completion": "completion"}},
    "row_len": 48, "rows": 8,
}  # fmt: skip
RANKED = {"train": "{root}/sevens/train.jsonl", "row_len": 96, "num_prompts": 8}
ROLLOUT = {"num_prompts": 8, "group_size": 2, "max_prompt_tokens": 16, "max_tokens": 8}
REWARDS = {"functions": {"sevens": {"function": "verify.exact"}}}
TEACHER = {"path": "{root}/teacher"}

VALUES = {
    "sft": {"data": PAIRS},
    "reward": {"data": RANKED, "tokenizer": "{root}/sevens/tokenizer"},
    "preference": {
        "data": RANKED, "tokenizer": "{root}/sevens/tokenizer", "losses": {"dpo": {"beta": 0.1}},
        "cache_dir": "{root}/cache",
    },
    "online_preference": {
        "data": PROMPTS, "rollout": ROLLOUT, "rewards": REWARDS, "losses": {"dpo": {"beta": 0.1}},
    },
    "grpo": {
        "data": PROMPTS, "rollout": ROLLOUT, "rewards": REWARDS,
        "algorithm": {"kl_coef": 0.1, "num_updates": 2},
    },
    "ppo": {
        "data": PROMPTS, "rollout": ROLLOUT, "rewards": REWARDS,
        "algorithm": {"num_epochs": 1, "num_minibatches": 2},
    },
    "distill": {"data": PAIRS, "teacher": TEACHER},
    "online_distill": {
        "data": PROMPTS, "rollout": ROLLOUT | {"group_size": 1}, "teacher": TEACHER,
    },
}  # fmt: skip
"""Of each phase, what it has besides the others."""


def filled(values, root):
    """With the folder put into the paths."""
    if isinstance(values, dict):
        return {name: filled(value, root) for name, value in values.items()}
    return values.format(root=root) if isinstance(values, str) else values


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = distillation.write_world(tmp_path_factory.mktemp("world"))
    (folder / "sevens").mkdir()
    sevens.write(folder / "sevens", seed=1)
    return folder


def five_steps(phase, mesh, num_devices, world):
    """What 5 iterations collected and measured, on the host."""
    values = {
        "phase": phase, "name": "x", "output_dir": str(world / "runs"), "model": MODEL,
        "tokenizer": "{root}/tokenizer", "mesh": mesh, "loop": {"steps": 5},
        "optimizer": {"learning_rate": 1e-3}, **VALUES[phase],
    }  # fmt: skip
    config = PHASES[phase][0].model_validate(filled(values, world))
    running = PHASES[phase][1](config, config.training_mesh(jax.devices()[:num_devices]))
    _, seen = rl.iterations(running, 5)
    texts = [batch["tokens"] for _, batches, _ in seen for batch in batches]
    return seen, texts


@pytest.fixture(scope="module")
def alone(world):
    """phase -> what one device finds, computed once."""
    found = {}

    def find(phase):
        if phase not in found:
            found[phase] = five_steps(phase, {}, 1, world)
        return found[phase]

    return find


def of_any_two_one_is_better(samples):
    return [Score(sum(map(ord, s.completion)) % 11 / 11) for s in samples]


QUICK = {("sft", "sequence 4"), ("grpo", "tensor 8")}


@pytest.mark.parametrize(
    ("phase", "mesh"),
    [
        pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)
        for pair in itertools.product(VALUES, MESHES)
    ],
)
def test_meshes_change_nothing(phase, mesh, world, alone, monkeypatch):
    monkeypatch.setattr(scoring, "RewardPool", lambda config, **_: of_any_two_one_is_better)
    expected, wanted = alone(phase)
    seen, texts = five_steps(phase, MESHES[mesh], 8, world)
    for found, one in zip(texts, wanted, strict=True):
        np.testing.assert_array_equal(found, one)
    losses = [float(update["loss"]) for _, _, updates in expected for update in updates]
    assert len(losses) >= 5 and len(set(losses)) > 1
    found = [float(update["loss"]) for _, _, updates in seen for update in updates]
    # Losses of RL are differences of numbers near 1, and cross 0.
    np.testing.assert_allclose(found, losses, rtol=1e-5, atol=1e-6)
