"""GRPO and PPO in miniature: a world, a config, rewards without processes, and iterations."""

import jax
import numpy as np

from alignjax.core.types import Completions, Score
from alignjax.phases import rollouts, scoring
from alignjax.phases.disaggregated import InTurn
from alignjax.phases.registry import PHASES
from alignjax.recipes import chains
from alignjax.sharding import copied

WEIGHED = {"old_logps": "trainer", "importance_cap": 1.05}


def write_world(folder):
    chains.write(
        folder, seed=0, num_questions=1, num_drills=1, num_train=40, num_test=6, num_ops=(1, 2, 3)
    )
    return folder


def share_of_sevens(samples):
    """Dense, deterministic and not flat."""
    return [Score(s.completion.count("7") / max(1, s.num_tokens)) for s in samples]


def config(world, phase="grpo", **changes):
    rollout = {"num_prompts": 4, "group_size": 4, "max_prompt_tokens": 16, "max_tokens": 8}
    algorithm = {
        "grpo": {"kl_coef": 0.0}, "ppo": {"num_epochs": 1, "num_minibatches": 2},
        "online_preference": {},
    }[phase]  # fmt: skip
    data = {
        "train": str(world / "train.jsonl"), "eval": str(world / "test.jsonl"),
        "text": {"fields": {"prompt": "prompt", "reference": "reference"}},
    }  # fmt: skip
    if phase == "grpo":
        data["num_sharing"] = 1
    values = {
        "phase": phase, "name": "x", "tokenizer": str(world / "tokenizer"),
        "model": {"init": {
            "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32,
            "max_position_embeddings": 64, "initializer_range": 0.3,
        }},
        "data": data,
        "rollout": rollout | changes.pop("rollout", {}),
        "algorithm": algorithm | changes.pop("algorithm", {}),
        "rewards": {"functions": {"sevens": {"function": "verify.exact"}}},
        "evaluation": {"num_problems": 4},
        "optimizer": {"learning_rate": 0.03},
        **changes,
    }  # fmt: skip
    return PHASES[phase][0].model_validate(values)


def make(monkeypatch, world, phase="grpo", num_devices=2, **changes):
    """The phase, on the first few devices, or as the config says on these and those after them."""
    monkeypatch.setattr(scoring, "RewardPool", lambda config, **_: share_of_sevens)
    values = config(world, phase, **changes)
    mesh = values.training_mesh(jax.devices()[:num_devices])
    return PHASES[phase][1](values, mesh)


class FakeEngine:
    """Completions that are a function of weights and key, without a computation on a device; notes
    where the weights are."""

    def __init__(self):
        self.devices = []

    def __call__(self, params, prompts, lengths, key, sampling):
        leaves = jax.tree.leaves(params)
        self.devices.append({device.id for leaf in leaves for device in leaf.devices()})
        # Of copies: `Ahead.close` may delete what is read here, which NumPy does not survive.
        own = [np.asarray(leaf, np.float64) for leaf in copied(leaves)]
        digest = [int(np.abs(leaf).sum() * 1e6) for leaf in own]
        rng = np.random.default_rng([*digest, *np.asarray(key).tolist()])
        n, width = len(prompts) * sampling.num_samples, sampling.max_tokens
        sizes = rng.integers(1, width + 1, n).astype(np.int32)
        on = np.arange(width) < sizes[:, None]
        return Completions(
            tokens=np.where(on, rng.integers(7, 17, (n, width)), 0).astype(np.int32),
            lengths=sizes,
            logps=np.where(on, -rng.random((n, width)), 0).astype(np.float32),
            finish_reasons=(sizes == width).astype(np.int8),
        )

    def put_in(self, monkeypatch):
        monkeypatch.setattr(rollouts, "make_generate", lambda model, **_: self)
        return self


class Kept:
    """Takes the place of a phase's sampler, and keeps what it gives: in training, which goes by the
    schedule, and in evaluations.

    Attributes:
      found: the rollouts so far.
    """

    def __init__(self, phase):
        self._sampler, self.found = phase._sampler, []
        phase._sampler, phase._schedule = self, InTurn(self.one_round)

    def one_round(self, *args):
        rounds = self._sampler.one_round(*args)
        self.found += rounds
        return rounds

    def __call__(self, *args):
        self.found.append(self._sampler(*args))
        return self.found[-1]

    def __getattr__(self, name):
        return getattr(self._sampler, name)


def iterations(phase, num, *, state=None, records=None, before=lambda state, records: None):
    """What `num` iterations collected and measured, on the host, and the state after them."""
    if state is None:
        state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    seen = []
    for _ in range(num):
        before(state, records)
        state, collected = phase.collect(state, records)
        batches, updates = [], []
        for batch in collected.batches:
            batches.append(jax.device_get(batch))
            state, metrics = phase.step(state, batch)
            updates.append(jax.device_get(metrics))
        state = state._replace(step=state.step + 1)
        seen.append((dict(collected.metrics), batches, updates))
    return state, seen


def assert_equal(found, expected):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))
