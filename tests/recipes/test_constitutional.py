"""The recipes of Constitutional AI are sound, and run with their sizes turned down."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from alignjax.core.config import build, find_config, load
from alignjax.models import Model, ModelConfig, save
from alignjax.recipes.graph import RecipeConfig
from alignjax.text import vocab_tokenizer
from tests.flags import xla_flags

RECIPES = ("constitutional", "constitutional_qwen2_5_1_5b")
STAGES = ["revisions", "sl_cai", "labels", "reward", "rl_cai", "dpo"]


def recipe(name: str, *overrides: str) -> RecipeConfig:
    return build(RecipeConfig, load(find_config(f"recipes/{name}"), overrides))


@pytest.mark.parametrize("name", RECIPES)
def test_each_stage_reads_what_the_ones_before_wrote(name: str) -> None:
    stages = recipe(name).stages
    assert list(stages)[-6:] == STAGES
    at = f"runs/{name}"
    base = stages["revisions"].model.path
    assert base == stages["sl_cai"].model.path == stages["labels"].judge.model.path
    trained = stages["sl_cai"].data.train
    assert f"{at}/revisions/revisions.jsonl" in ([trained] if isinstance(trained, str) else trained)
    assert stages["labels"].sample.model.path == f"{at}/sl_cai/model"
    for stage in ("reward", "rl_cai", "dpo"):
        assert stages[stage].model.path == f"{at}/sl_cai/model"
    for stage in ("reward", "dpo"):
        assert stages[stage].data.train == f"{at}/labels/preferences.jsonl"
    assert stages["rl_cai"].rewards.models["learned"].path == f"{at}/reward/model"
    # Both halves go by one constitution, and RL is rewarded by nothing but the reward model.
    assert stages["labels"].constitution.path == stages["revisions"].constitution.path
    functions = stages["rl_cai"].rewards.functions.values()
    assert all(function.weight == 0 for function in functions)


SMALL = {
    "world": ["args={num_lines: 200}"],
    "base": ["data.rows=2", "loop.steps=2", "optimizer.warmup_steps=0",
             "model.init={hidden_size: 16, num_layers: 1, num_heads: 2, "
             "max_position_embeddings: 72}"],
    "prompts": ["args.num_test=8", "args.num_train=24"],
    "helpful": ["args.num_test=8", "args.num_train=24"],
    "revisions": ["data.num_prompts=6", "rollout.num_prompts=6", "num_rounds=2", "truncated=keep"],
    "sl_cai": ["data.rows=2", "loop.steps=2", "optimizer.warmup_steps=0"],
    # An untrained judge is not sure of anything: hardened, all its labels would be ties.
    "labels": ["sample.data.num_prompts=16", "sample.rollout.num_prompts=16", "judge.harden=null"],
    "reward": ["data.num_prompts=2", "data.micro_batches=1", "loop.steps=2",
               "optimizer.warmup_steps=0"],
    "rl_cai": ["rollout.num_prompts=2", "rollout.group_size=2", "data.micro_batches=1",
               "loop.steps=2", "optimizer.warmup_steps=0", "evaluation.num_problems=4"],
    "dpo": ["data.num_prompts=2", "data.micro_batches=1", "loop.steps=2",
            "optimizer.warmup_steps=0", "cache_dir=cache"],
}  # fmt: skip
SHORT = {  # For contexts of a few hundred letters.
    "revisions": ["rollout.max_prompt_tokens=128", "rollout.response.max_tokens=8",
                  "rollout.critique.max_tokens=8", "rollout.revision.max_tokens=8"],
    "sl_cai": ["data.row_len=256", "data.micro_batches=1"],
    "labels": ["sample.rollout.max_prompt_tokens=128", "sample.rollout.max_tokens=8"],
    "reward": ["data.row_len=320"],
    "rl_cai": ["rollout.max_prompt_tokens=128", "rollout.max_tokens=8"],
    "dpo": ["data.row_len=320"],
}  # fmt: skip


def run(folder: Path, name: str, *words: str) -> str:
    """Runs a recipe as a user does, on one device: of eight, two cores would be slow."""
    small = [
        f"stages.{stage}.{value}"
        for sizes in ((SMALL,) if name == "constitutional" else (SMALL, SHORT))
        for stage in recipe(name).stages
        for value in sizes.get(stage, [])
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "alignjax", "run", f"recipes/{name}", *small, *words],
        env=os.environ | {"XLA_FLAGS": xla_flags(), "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=folder,
        timeout=500,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def check(folder: Path, name: str) -> None:
    root = folder / "runs" / name
    for stage in ("sl_cai", "reward", "rl_cai", "dpo"):
        assert (root / stage / "model" / "config.json").is_file()
    labels = [json.loads(x) for x in (root / "labels/preferences.jsonl").read_text().splitlines()]
    assert labels and all(record["principle"] for record in labels)
    figures = json.loads((root / "revisions/critique.json").read_text())
    assert figures["num_critiques"] > 0 and figures["num_revisions"] > 0


@pytest.mark.slow
def test_the_world_runs_to_its_end_and_then_has_nothing_to_do(tmp_path: Path) -> None:
    run(tmp_path, "constitutional")
    check(tmp_path, "constitutional")
    assert run(tmp_path, "constitutional").count("nothing to do") == 8


def write_pairs(path: Path) -> Path:
    with path.open("w") as file:
        for i in range(40):
            before = f"\n\nHuman: is it {i} or {i // 2}?\n\nAssistant:"
            pair = {"chosen": before + f" yes it is {i}", "rejected": before + " no"}
            file.write(json.dumps(pair) + "\n")
    return path


def write_model(path: Path) -> Path:
    """A tiny random model of the family, of letters, which hardly ever stops by itself."""
    letters = [chr(i) for i in range(32, 127)] + ["\n", "’"]
    ends = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    tokenizer = vocab_tokenizer(
        [*ends, *letters], bos=None, eos="<|im_end|>", pad="<|endoftext|>"
    )  # fmt: skip
    model = Model(
        ModelConfig(family="qwen2", vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=1,
                    num_heads=2, max_position_embeddings=2048, attention_bias=True)
    )  # fmt: skip
    save(path, model, model.init(jax.random.PRNGKey(0)))
    tokenizer.save(str(path))
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return path


@pytest.mark.slow
def test_the_recipe_for_a_gpu_runs_with_a_tiny_model(tmp_path: Path) -> None:
    pairs, model = write_pairs(tmp_path / "pairs.jsonl"), write_model(tmp_path / "model")
    names = {"red_team": pairs, "demonstrations": pairs, "model": model}
    run(tmp_path, RECIPES[1], *(f"vars.{name}={path}" for name, path in names.items()))
    check(tmp_path, RECIPES[1])
