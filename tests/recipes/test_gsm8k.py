"""Real data: both GSM8K recipes are sound, and run with their sizes turned down."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from alignjax.core.config import build, find_config, load, loads
from alignjax.core.errors import UserError
from alignjax.models import Model, ModelConfig, save
from alignjax.recipes.graph import RecipeConfig
from alignjax.text import load_tokenizer
from alignjax.train.metrics import read_metrics
from tests.flags import xla_flags

RECIPES = ["gsm8k_laptop", "gsm8k_qwen3_0_6b"]


def recipe(name: str, *overrides: str) -> RecipeConfig:
    return build(RecipeConfig, load(find_config(f"recipes/{name}"), overrides))


@pytest.mark.parametrize("name", RECIPES)
def test_variables_reach_the_stages(name: str) -> None:
    """Without any data: where they are is said once."""
    config = recipe(name, "vars.train=tfds:gsm8k/train", "vars.test=elsewhere/test.jsonl")
    sft, grpo = config.stages["sft"], config.stages["grpo"]
    for stage in (sft, grpo):
        assert (stage.data.train, stage.data.eval) == ("tfds:gsm8k/train", "elsewhere/test.jsonl")
    assert grpo.model.path == f"runs/{name}/sft/model"
    if name == "gsm8k_laptop":
        assert config.stages["tokenizer"].sources == "tfds:gsm8k/train"
        assert sft.tokenizer == f"runs/{name}/tokenizer"
    else:
        assert recipe(name, "vars.model=a/b").stages["sft"].model.path == "a/b"


def test_what_is_trained_on_fits_the_context_on_a_laptop() -> None:
    config = recipe("gsm8k_laptop")
    sft, grpo = config.stages["sft"], config.stages["grpo"]
    context = sft.model.init.max_position_embeddings
    assert sft.data.row_len <= context
    assert grpo.rollout.max_prompt_tokens + grpo.rollout.max_tokens <= context


VARIABLES = """\
name: r
vars: {folder: data, size: 2048}
stages:
  folder:
    phase: tokenizer
    sources: ${folder}/a.jsonl
    fields: [text]
    vocab_size: 300
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (VARIABLES.replace("size: 2048", "size: ''"),
         "r.yaml:4: stages.folder: there is a variable of that name in vars"),
        (VARIABLES.replace("  folder:", "  words:"),
         "r.yaml:2: vars.size: expected text, got 2048"),
        (VARIABLES.replace("  folder:", "  words:").replace("folder}", "fodler}"),
         "r.yaml:6: stages.words.sources: ${fodler} is no earlier stage; there are folder, size"),
        (VARIABLES.replace("vars: {folder: data, size: 2048}", "vars: [folder]"),
         "r.yaml:6: stages.folder.sources: ${folder} is no earlier stage; there are none"),
    ],
)  # fmt: skip
def test_faults_of_variables(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(RecipeConfig, loads(text, name="r.yaml"))
    assert str(caught.value) == message


def head(source: Path, target: Path, count: int) -> Path:
    """The first records of a file."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)[:count]
    target.write_text("".join(lines), encoding="utf-8")
    return target


@pytest.fixture
def data(real_data: Path, tmp_path: Path) -> list[str]:
    """Overrides: a few problems."""
    gsm8k = real_data / "gsm8k"
    return [
        f"vars.train={head(gsm8k / 'train.jsonl', tmp_path / 'train.jsonl', 40)}",
        f"vars.test={head(gsm8k / 'test-660.jsonl', tmp_path / 'test.jsonl', 8)}",
    ]


GRPO = [
    "stages.grpo.loop.steps=2",
    "stages.grpo.rollout.num_prompts=4",
    "stages.grpo.rollout.group_size=2",
    "stages.grpo.rollout.max_tokens=16",
    "stages.grpo.data.micro_batches=1",
    "stages.grpo.evaluation.num_problems=4",
    # No two different completions get the same, so that there is a gradient.
    "stages.grpo.rewards.functions.codes={function: codes.reward}",
]


def run(tmp_path: Path, name: str, *overrides: str) -> Path:
    """Runs a recipe as a user does, on one device: of eight, two cores would be slow."""
    (tmp_path / "codes.py").write_text(
        "def reward(prompt, completion, reference, **fields):\n"
        "    return sum(i * ord(c) for i, c in enumerate(completion, 1)) / 1e5\n"
    )
    subprocess.run(
        [sys.executable, "-m", "alignjax", "run", f"recipes/{name}", *overrides],
        check=True,
        env=os.environ | {"XLA_FLAGS": xla_flags(), "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        timeout=300,
    )
    return tmp_path / "runs" / name


def test_laptop_recipe_runs(data: list[str], tmp_path: Path) -> None:
    folder = run(
        tmp_path, "gsm8k_laptop", *data, *GRPO,
        "stages.tokenizer.vocab_size=420",
        "stages.sft.model.init={hidden_size: 32, num_layers: 2, num_heads: 2}",
        "stages.sft.data.rows=8",
        "stages.sft.loop.steps=6",
        "stages.sft.optimizer.warmup_steps=0",
        "stages.grpo.rollout.max_prompt_tokens=192",
    )  # fmt: skip
    first, *_, last = (r for r in read_metrics(folder / "sft") if "eval/loss" in r)
    assert last["eval/loss"] < first["eval/loss"] - 0.1
    rows = read_metrics(folder / "grpo")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[1]["num_skipped_updates"] == 0 and rows[1]["grad_norm"] > 0
    assert {"eval/sampled/accuracy", "eval/sampled/calculations"} <= rows[0].keys()
    tokenizer = load_tokenizer(folder / "grpo" / "model")
    assert len(tokenizer.encode("<<48/2=24>>")) == 9  # digit by digit, the marks whole
    text = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])["answer"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_qwen3_recipe_runs(data: list[str], real_data: Path, tmp_path: Path) -> None:
    """A tiny random model with the vocabulary and the tokenizer of the real one."""
    path = tmp_path / "model"
    model = Model(
        ModelConfig(
            family="qwen3", vocab_size=151_936, hidden_size=32, num_layers=2, num_heads=4,
            num_kv_heads=2, head_dim=16, rope_theta=1e6, max_position_embeddings=1024,
        )
    )  # fmt: skip
    params = model.init(jax.random.PRNGKey(0))
    (embedding,) = (x for x in jax.tree.leaves(params) if x.shape == (151_936, 32))
    # The last 267 rows belong to no token. Made likely, they must do no harm when they are sampled.
    louder = embedding.at[151_669:].multiply(100)
    params = jax.tree.map(lambda x: louder if x is embedding else x, params)
    save(path, model, params)
    for file in (real_data / "tokenizers" / "qwen3").iterdir():
        shutil.copyfile(file, path / file.name)
    folder = run(
        tmp_path, "gsm8k_qwen3_0_6b", *data, *GRPO,
        f"vars.model={path}",
        "stages.sft.loop.steps=1",
        "stages.sft.data.row_len=512",
        "stages.sft.data.rows=8",
        "stages.grpo.algorithm.num_minibatches=1",
        "stages.grpo.algorithm.dynamic_sampling=false",
    )  # fmt: skip
    rows = read_metrics(folder / "grpo")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["num_failed_rewards"] == 0 for row in rows[1:])
    assert rows[1]["num_skipped_updates"] == 0 and rows[1]["completions/mean_length"] > 1
    samples = [json.loads(s) for s in (folder / "grpo" / "samples.jsonl").read_text().splitlines()]
    assert all("<think>\n\n</think>" in s["prompt"] for s in samples)
    # Fewer characters than tokens: some were none.
    assert any(len(s["completion"]) < s["num_tokens"] for s in samples)
    written = json.loads((folder / "grpo" / "model" / "config.json").read_text())
    assert (written["vocab_size"], written["eos_token_id"]) == (151_936, 151_645)
