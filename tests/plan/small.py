"""Small configs of all phases, and the files that they name."""

import json

import jax

from alignjax.models import Model, ModelConfig, ScalarModel, save, save_reward
from alignjax.phases.registry import PHASES
from alignjax.recipes import chains
from alignjax.text import load_tokenizer

SHAPE = {
    "hidden_size": 16, "num_layers": 2, "num_heads": 4, "intermediate_size": 32,
    "max_position_embeddings": 128,
}  # fmt: skip


def make_world(folder):
    """A base model, a reward model, problems and pairs."""
    chains.write(folder, seed=0, num_questions=40, num_drills=1, num_train=40, num_test=8)
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE))
    save(folder / "base", model, model.init(jax.random.key(1)))
    reward = ScalarModel(model)
    ids = {"pad_token_id": tokenizer.pad_id}
    save_reward(folder / "rm", reward, reward.init(jax.random.key(2)), extra_config=ids)
    for name in ("base", "rm"):
        tokenizer.save(str(folder / name))
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    pairs = [{"prompt": one["prompt"], "chosen": "1", "rejected": "2"} for one in lines]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def config_of(world, phase, **changes):
    rl = {
        "data": {
            "train": str(world / "train.jsonl"), "micro_batches": 2,
            "text": {"fields": {"prompt": "prompt", "reference": "reference"}},
        },
        "rollout": {"num_prompts": 8, "group_size": 4, "max_prompt_tokens": 20, "max_tokens": 70},
        "rewards": {"models": {"learned": {"path": str(world / "rm"), "mean": 0.0, "std": 1.0}}},
    }  # fmt: skip
    comparisons = {"train": str(world / "pairs.jsonl"), "row_len": 64, "num_prompts": 16,
                   "micro_batches": 2}  # fmt: skip
    own = {
        "sft": {"data": {
            "train": str(world / "corpus.jsonl"), "text": {"fields": {"completion": "text"}},
            "row_len": 64, "rows": 8, "micro_batches": 2, "overlong": "drop",
        }},
        "reward": {"data": comparisons},
        "preference": {"data": comparisons, "cache_dir": str(world / "cache")},
        "grpo": {**rl, "algorithm": {"kl_coef": 0.1}},
        "ppo": {**rl, "algorithm": {"num_epochs": 1}},
        "online_preference": rl,
        "online_distill": {**rl, "rewards": None, "teacher": {"path": str(world / "base")}},
    }  # fmt: skip
    own["distill"] = {**own["sft"], "teacher": {"path": str(world / "base")}}
    values = {
        "phase": phase,
        "name": "x",
        "output_dir": str(world / "runs"),
        "model": {"path": str(world / "base")},
        "loop": {"steps": 2},
        **own[phase],
    }
    for key, value in changes.items():
        section, _, last = key.rpartition("__")
        (values[section] if section else values)[last] = value
    return PHASES[phase][0].model_validate_json(json.dumps(values))
