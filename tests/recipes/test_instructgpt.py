"""The recipes on rankings of people are sound, and run with their sizes turned down."""

import json
import os
import string
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from alignjax.core.config import build, find_config, load
from alignjax.models import Model, ModelConfig, save
from alignjax.recipes.graph import RecipeConfig
from alignjax.text import vocab_tokenizer
from alignjax.train.metrics import read_metrics
from tests.flags import xla_flags

RECIPES = [
    f"{recipe}_{where}"
    for recipe, others in (
        ("instructgpt", ("qwen2_5_0_5b", "llama3_8b_tpu")),
        ("dpo", ("qwen2_5_7b_lora", "llama3_8b_tpu")),
    )
    for where in ("laptop", *others)
]
STAGES = {"instructgpt": ["sft", "reward", "ppo"], "dpo": ["sft", "dpo"]}


def recipe(name: str, *overrides: str) -> RecipeConfig:
    return build(RecipeConfig, load(find_config(f"recipes/{name}"), overrides))


@pytest.mark.parametrize("name", RECIPES)
def test_each_stage_starts_from_the_one_before(name: str) -> None:
    config = recipe(name, "vars.pairs=mine.jsonl")
    assert config.stages["data"].args["source"] == "mine.jsonl"
    stages = STAGES[name.split("_")[0]]
    assert list(config.stages)[-len(stages) :] == stages
    for stage in stages[1:]:
        assert config.stages[stage].model.path == f"runs/{name}/sft/model"
        assert config.stages[stage].data.train.startswith(f"runs/{name}/data/")
        assert config.stages[stage].data.eval.startswith(f"runs/{name}/data/")
    if "ppo" in stages:
        (learned,) = config.stages["ppo"].rewards.models.values()
        assert learned.path == f"runs/{name}/reward/model"


WORDS = ("red", "blue", "old", "new", "big", "small", "near", "far")


def write_pairs(path: Path, count: int = 40) -> Path:
    """Transcripts in which the longer answer is the better one."""
    with path.open("w") as file:
        for i in range(count):
            before = f"\n\nHuman: is it {WORDS[i % 8]} or {WORDS[i // 8 + 1]} {i}?\n\nAssistant:"
            pair = {"chosen": before + f" yes it is {WORDS[i % 8]}", "rejected": before + " no"}
            file.write(json.dumps(pair) + "\n")
    return path


def write_model(path: Path, family: str, context: int = 512) -> Path:
    """A tiny random model with a tokenizer of letters, and a chat template for Qwen."""
    ends = ["<|im_start|>", "<|im_end|>", "<eos>", "<bos>"]
    tokenizer = vocab_tokenizer(
        [*ends, *string.printable], bos="<bos>", eos="<|im_end|>", pad="<eos>"
    )
    model = Model(
        ModelConfig(
            family=family, vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=1,
            num_heads=2, max_position_embeddings=context, attention_bias=family == "qwen2",
        )
    )  # fmt: skip
    save(path, model, model.init(jax.random.PRNGKey(0)))
    tokenizer.save(str(path))
    if family == "qwen2":
        (path / "chat_template.jinja").write_text(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    return path


SMALL = {
    "data": ["args.num_test=8", "args.num_train=24"],
    "tokenizer": ["vocab_size=308"],
    "base": ["data.rows=2", "loop.steps=2", "data.row_len=256", "optimizer.warmup_steps=0",
             "model.init={hidden_size: 32, num_layers: 1, num_heads: 2}"],
    "sft": ["data.rows=2", "data.micro_batches=1", "loop.steps=2", "data.row_len=256",
            "optimizer.warmup_steps=0"],
    "reward": ["data.num_prompts=4", "data.micro_batches=1", "loop.steps=2", "data.row_len=256",
               "optimizer.warmup_steps=0"],
    "dpo": ["data.num_prompts=4", "data.micro_batches=1", "loop.steps=2", "data.row_len=256",
            "optimizer.warmup_steps=0", "cache_dir=cache"],
    "ppo": ["rollout.num_prompts=4", "data.micro_batches=1", "loop.steps=2",
            "rollout.max_prompt_tokens=96", "rollout.max_tokens=8", "optimizer.warmup_steps=0",
            "evaluation.num_problems=4", "evaluation.best_of_n=2", "algorithm.num_minibatches=1"],
}  # fmt: skip


def run(folder: Path, name: str, *overrides: str) -> str:
    """Runs a recipe as a user does, on one device: of eight, two cores would be slow."""
    small = [
        f"stages.{stage}.{value}"
        for stage in recipe(name).stages
        for value in SMALL[stage]
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "alignjax", "run", f"recipes/{name}", *small, *overrides],
        env=os.environ | {"XLA_FLAGS": xla_flags(), "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=folder,
        timeout=500,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "name",
    [n if n.endswith("laptop") else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES],
)
def test_a_recipe_runs_to_its_end_and_then_has_nothing_to_do(tmp_path: Path, name: str) -> None:
    overrides = [f"vars.pairs={write_pairs(tmp_path / 'pairs.jsonl')}"]
    if not name.endswith("laptop"):
        family = "qwen2" if "qwen" in name else "llama"
        overrides.append(f"vars.model={write_model(tmp_path / 'model', family)}")
    run(tmp_path, name, *overrides)
    stages = STAGES[name.split("_")[0]]
    for stage in stages:
        folder = tmp_path / "runs" / name / stage
        assert (folder / "model" / "config.json").is_file()
        rows = read_metrics(folder)
        assert rows[-1]["step"] == 2
        assert {"inputs.json", "config.yaml", "report.png"} <= {p.name for p in folder.iterdir()}
    last = read_metrics(tmp_path / "runs" / name / stages[-1])[-1]
    wanted = "eval/sampled/kl" if stages[-1] == "ppo" else "eval/rewards/accuracies"
    assert wanted in last
    again = run(tmp_path, name, *overrides)
    assert again.count("nothing to do") == len(recipe(name).stages)
