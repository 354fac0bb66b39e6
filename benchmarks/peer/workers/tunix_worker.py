"""The tasks of `benchmarks/peers.py` in Tunix: its trainers and learners, one step for each run.

The trainers take their batches from an iterator, which waits at the gate: when it is asked for a
batch, the step before is done. `options` of a variant go to the training config, as does
`cache_margin`, slots of the KV cache beyond those that are needed.
Sources: the documentation, examples and source of Tunix 0.1.7.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import protocol
from flax import nnx
from transformers import AutoTokenizer
from tunix.generate import sampler as sampling
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params as qwen3_params
from tunix.rl import rl_cluster as clusters
from tunix.rl import utils as rl_utils
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.sft import peft_trainer
from tunix.sft import utils as sft_utils
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig

Spec = dict[str, Any]
PAD, EOS = 0, 1
LOOP = {"eval_every_n_steps": 10**6, "max_steps": 1000}
MESH = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def model_config(spec: Spec) -> qwen3.ModelConfig:
    theirs = json.loads((Path(spec["model"]) / "config.json").read_text(encoding="utf-8"))
    return qwen3.ModelConfig(
        num_layers=theirs["num_hidden_layers"], vocab_size=theirs["vocab_size"],
        embed_dim=theirs["hidden_size"], hidden_dim=theirs["intermediate_size"],
        num_heads=theirs["num_attention_heads"], head_dim=theirs["head_dim"],
        num_kv_heads=theirs["num_key_value_heads"], rope_theta=int(theirs["rope_theta"]),
        norm_eps=theirs["rms_norm_eps"], use_tied_embedding=theirs["tie_word_embeddings"],
        dtype=jnp.dtype(spec["dtype"]), param_dtype=jnp.float32,
    )  # fmt: skip


def loaded(spec: Spec) -> nnx.Module:
    return qwen3_params.create_model_from_safe_tensors(
        spec["model"], model_config(spec), MESH, dtype=jnp.float32
    )


def records(spec: Spec) -> list[dict[str, str]]:
    lines = Path(spec["data"]).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))


def steps(
    gate: protocol.Gate, trainer: Any, batches: Iterator[Any], tokens: Callable[[Any], int]
) -> Iterator[Any]:
    """The batches, each when a run is asked for."""
    gate.next()
    for batch in batches:
        yield batch
        jax.block_until_ready(nnx.state(trainer.model))
        # Of the step that has just been; its own log is one step behind.
        buffered = trainer._prev_buffered_train_metrics
        loss = {} if buffered is None else {"loss": float(buffered.loss)}
        gate.next(tokens=tokens(batch), **loss)


def sft(spec: Spec, gate: protocol.Gate) -> None:
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    rows, row_len = spec["dims"]["rows"], spec["dims"]["row_len"]
    parts = [(r.get("prompt", ""), r.get("completion", r.get("text"))) for r in records(spec)]
    prompts = tokenizer([prompt for prompt, _ in parts])["input_ids"]
    completions = tokenizer([completion for _, completion in parts])["input_ids"]

    def batch(indices: np.ndarray) -> peft_trainer.TrainingInput:
        ids = np.zeros((rows, row_len), np.int32)
        is_target = np.zeros((rows, row_len), bool)
        for row, i in enumerate(indices):
            whole = [*prompts[i], *completions[i], EOS]
            ids[row, : len(whole)] = whole
            is_target[row, len(prompts[i]) : len(whole)] = True
        return peft_trainer.TrainingInput(input_tokens=ids, input_mask=is_target)

    def model_input(x: peft_trainer.TrainingInput) -> dict[str, Any]:
        is_real = x.input_tokens != PAD
        return {
            "input_tokens": x.input_tokens, "input_mask": x.input_mask,
            "positions": sft_utils.build_positions_from_mask(is_real),
            "attention_mask": sft_utils.make_causal_attn_mask(is_real),
        }  # fmt: skip

    config = peft_trainer.TrainingConfig(**LOOP, **spec["options"])
    trainer = peft_trainer.PeftTrainer(loaded(spec), optimizer(), config)
    trainer = trainer.with_gen_model_input_fn(model_input)
    order = np.random.default_rng(0)
    batches = (batch(order.permutation(len(parts))[:rows]) for _ in itertools.count())
    with MESH:
        trainer.train(
            steps(gate, trainer, batches, lambda x: int((np.asarray(x.input_tokens) != PAD).sum()))
        )


def dpo(spec: Spec, gate: protocol.Gate) -> None:
    dims, found = spec["dims"], records(spec)
    config = DPOTrainingConfig(
        **LOOP, beta=0.1, max_prompt_length=dims["prompt"], max_response_length=dims["completion"],
        **spec["options"],
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    trainer = DPOTrainer(loaded(spec), loaded(spec), optimizer(), config, tokenizer=tokenizer)
    batch = {
        "prompts": [record["prompt"] for record in found],
        "chosen_responses": [f"{record['chosen']} <eos>" for record in found],
        "rejected_responses": [f"{record['rejected']} <eos>" for record in found],
    }
    counts = {name: sum(map(len, tokenizer(texts)["input_ids"])) for name, texts in batch.items()}
    tokens = sum(counts.values()) + counts["prompts"]
    with MESH:
        trainer.train(steps(gate, trainer, itertools.repeat(batch), lambda x: tokens))


def cache_size(spec: Spec) -> int:
    margin = spec["options_of_worker"].get("cache_margin", 0)
    return spec["dims"]["prompt"] + spec["dims"]["completion"] + margin


def cluster(spec: Spec, **models: Any) -> clusters.RLCluster:
    dims = spec["dims"]
    training = clusters.RLTrainingConfig(
        **LOOP, actor_optimizer=optimizer(),
        critic_optimizer=optimizer() if "critic" in models else None, **spec["options"],
    )  # fmt: skip
    config = clusters.ClusterConfig(
        role_to_mesh=dict.fromkeys(clusters.Role, MESH),
        training_config=training,
        rollout_config=RolloutConfig(
            max_tokens_to_generate=dims["completion"], max_prompt_length=dims["prompt"],
            kv_cache_size=cache_size(spec), temperature=1.0, top_p=1.0, top_k=None,
            eos_tokens=[EOS],
        ),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    return clusters.RLCluster(
        actor=loaded(spec), tokenizer=tokenizer, cluster_config=config, **models
    )


class Rewards:
    """Has a reward function, and knows how many tokens that has seen since it was last asked."""

    def __init__(self) -> None:
        self._tokens = 0

    def score(self, prompts: Any, completions: list[str], **others: Any) -> list[float]:
        self._tokens += sum(len(text.split()) for text in completions)
        return [protocol.reward(text) for text in completions]

    def seen(self, batch: Any) -> int:
        tokens, self._tokens = self._tokens, 0
        return tokens


def learn(spec: Spec, gate: protocol.Gate, learner: Any, rewards: Rewards) -> None:
    trainer = learner.rl_cluster.actor_trainer
    prompts = np.array([record["prompt"] for record in records(spec)])
    batches = ({"prompts": prompts} for _ in itertools.count())
    with MESH:
        learner.train(steps(gate, trainer, batches, rewards.seen))


def grpo(spec: Spec, gate: protocol.Gate) -> None:
    rewards = Rewards()
    config = GRPOConfig(num_generations=spec["dims"]["group"], num_iterations=1, beta=0.0)
    learn(spec, gate, GRPOLearner(cluster(spec), config, rewards.score), rewards)


def ppo(spec: Spec, gate: protocol.Gate) -> None:
    rewards = Rewards()
    models = {"critic": rl_utils.create_critic_model(loaded(spec)), "reference": loaded(spec)}
    learner = PPOLearner(cluster(spec, **models), PPOConfig(num_iterations=1), rewards.score)
    learn(spec, gate, learner, rewards)


def generate(spec: Spec, gate: protocol.Gate) -> None:
    prompts, dims = [record["prompt"] for record in records(spec)], spec["dims"]
    config = model_config(spec)
    cache = sampling.CacheConfig(
        cache_size=cache_size(spec), num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    sampler = sampling.Sampler(loaded(spec), tokenizer, cache)
    rows = spec["options_of_worker"].get("rows", len(prompts))
    number = itertools.count()

    def run() -> dict[str, Any]:
        tokens = 0
        for first in range(0, len(prompts), rows):
            out = sampler(
                prompts[first : first + rows], dims["completion"], dims["prompt"],
                temperature=1.0, top_p=1.0, eos_tokens=[EOS], seed=next(number),
            )  # fmt: skip
            # EOS is sampled and not given back.
            tokens += sum(min(len(ids) + 1, dims["completion"]) for ids in out.tokens)
        return {"tokens": tokens}

    with MESH:
        gate.serve(run)


def logits(spec: Spec, gate: protocol.Gate) -> None:
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    ids = np.array(tokenizer([record["prompt"] for record in records(spec)])["input_ids"])
    is_real = jnp.ones(ids.shape, bool)
    with MESH:
        out, _ = nnx.jit(lambda model, *inputs: model(*inputs))(
            loaded(spec), ids, sft_utils.build_positions_from_mask(is_real), None,
            sft_utils.make_causal_attn_mask(is_real),
        )  # fmt: skip
    np.save(spec["out"], np.asarray(out, np.float32))
    names = ("google-tunix", "jax", "flax", "optax", "qwix", "numpy")
    gate.say(versions={name: version(name) for name in names})
    gate.next()


if __name__ == "__main__":
    protocol.main(
        {"sft": sft, "sft_ragged": sft, "dpo": dpo, "generate": generate, "grpo": grpo, "ppo": ppo,
         "logits": logits}
    )  # fmt: skip
