"""R1-Distill: both recipes are sound; that for real models runs, in small, on real problems."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from alignjax.core.config import build, find_config, load
from alignjax.core.errors import UserError
from alignjax.data import open_source, texts
from alignjax.models import Model, ModelConfig, save
from alignjax.phases.teacher import check_vocabulary
from alignjax.recipes.graph import RecipeConfig
from alignjax.text import load_tokenizer, train_sentencepiece
from alignjax.train.metrics import read_metrics
from tests.flags import xla_flags

NAMES = ["r1_distill", "r1_distill_qwen3_1_7b"]


def recipe(name: str, *overrides: str) -> RecipeConfig:
    return build(RecipeConfig, load(find_config(f"recipes/{name}"), overrides))


@pytest.mark.parametrize("name", NAMES)
def test_students_learn_what_the_teacher_wrote(name: str) -> None:
    """By text from the same file; by distributions only where the vocabulary is the teacher's."""
    config = recipe(name, "vars.teacher=elsewhere")
    traces = config.stages.pop("traces")
    assert traces.model.path.startswith("elsewhere") and "accuracy" in traces.keep
    kept = f"runs/{name}/traces/kept.jsonl"
    by_text = [s for s in config.stages.values() if s.phase == "sft" and s.data.train == kept]
    assert len(by_text) == 2
    (logits,) = (s for s in config.stages.values() if s.phase == "distill")
    (online,) = (s for s in config.stages.values() if s.phase == "online_distill")
    assert logits.data.train == kept
    assert logits.teacher.path == online.teacher.path == traces.model.path
    assert logits.tokenizer is None and online.tokenizer is None
    limits = online.rollout
    room = 64 if name == "r1_distill" else 32_768
    assert limits.max_prompt_tokens + limits.max_tokens <= room
    assert online.data.train == traces.data.train


SHAPE = {
    "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1,
    "max_position_embeddings": 512,
}  # fmt: skip


def tiny(path: Path, family: str, tokenizer: Path, seed: int) -> Path:
    """A random model of a family, with a tokenizer."""
    vocab_size = load_tokenizer(tokenizer).vocab_size
    model = Model(ModelConfig(family=family, vocab_size=vocab_size, **SHAPE))
    save(path, model, model.init(jax.random.PRNGKey(seed)))
    load_tokenizer(tokenizer).save(str(path))
    return path


@pytest.mark.slow
def test_the_recipe_runs_on_real_problems(real_data: Path, tmp_path: Path) -> None:
    """Teacher and students are random models; a completion ends with one of six letters, and counts
    as right if it is long enough. The Llama-like student has another vocabulary."""
    for name, source, count in (("train", "train", 24), ("test", "test-660", 8)):
        lines = (real_data / "gsm8k" / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    for name, size in (("vocabulary", 380), ("other", 420)):
        records = texts(open_source(str(tmp_path / "train.jsonl")), ["question", "answer"])
        train_sentencepiece(records, tmp_path / name, size, special_tokens=["<stop>"])
    teacher = tiny(tmp_path / "teacher", "qwen3", tmp_path / "vocabulary", 0)
    qwen = tiny(tmp_path / "qwen", "qwen2", tmp_path / "vocabulary", 1)
    sibling = tiny(tmp_path / "sibling", "qwen3", tmp_path / "vocabulary", 2)
    llama = tiny(tmp_path / "llama", "llama", tmp_path / "other", 3)
    (tmp_path / "mine.py").write_text(
        "def long(completion, **fields):\n    return float(len(completion) > 8)\n"
    )
    measured = '{functions: {accuracy: {function: "mine.py:long"}}, num_workers: 1}'
    sizes = [
        "data.row_len=384", "data.rows=4", "data.micro_batches=1", "loop.steps=2",
        "model.compute_dtype=float32",
    ]  # fmt: skip
    overrides = [
        f"vars.teacher={teacher}", f"vars.qwen_base={qwen}", f"vars.sibling_base={sibling}",
        f"vars.llama_base={llama}", "vars.train=train.jsonl", "vars.test=test.jsonl",
        f"stages.traces.rewards={measured}", "stages.traces.keep={accuracy: {at_least: 1}}",
        "stages.traces.rollout={num_samples: 4, num_prompts: 8, max_prompt_tokens: 380, "
        "max_tokens: 60, stop_tokens: [e, a, t, o, n, s]}",
        *(f"stages.{s}.{x}" for s in ("llama", "qwen", "sibling_logits") for x in sizes),
        "stages.sibling_online.model.compute_dtype=float32",
        "stages.sibling_online.data.micro_batches=1", "stages.sibling_online.loop.steps=2",
        f"stages.sibling_online.rewards={measured}",
        "stages.sibling_online.rollout={num_prompts: 4, max_prompt_tokens: 380, max_tokens: 16}",
        "stages.sibling_online.evaluation.num_problems=4",
    ]  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "alignjax", "run", "recipes/r1_distill_qwen3_1_7b", *overrides],
        check=True,
        env=os.environ | {"XLA_FLAGS": xla_flags(), "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        timeout=500,
    )
    folder = tmp_path / "runs" / "r1_distill_qwen3_1_7b"
    kept = [json.loads(line) for line in (folder / "traces/kept.jsonl").read_text().splitlines()]
    figures = json.loads((folder / "traces/reject.json").read_text())
    assert figures["num_prompts"] + figures["num_dropped"] == 24
    assert figures["num_samples"] == 4 * figures["num_prompts"]
    assert len(kept) == figures["num_kept"] > 4
    assert all(r["messages"][0]["content"].endswith("within \\boxed{}.") for r in kept)
    assert {"qwen": teacher, "llama": llama}.keys() <= {p.name for p in folder.iterdir()}
    for name in ("llama", "qwen", "sibling_logits", "sibling_online"):
        *_, last = read_metrics(folder / name)
        assert last["step"] == 2 and last["num_skipped_updates"] == 0 and last["grad_norm"] > 0
    vocabularies = [load_tokenizer(folder / n / "model").vocab for n in ("llama", "qwen")]
    assert len(vocabularies[0]) == 420 and len(vocabularies[1]) == 380
    assert "eval/sampled/reverse_kl" in read_metrics(folder / "sibling_online")[0]
    with pytest.raises(UserError, match="another vocabulary than the student"):
        check_vocabulary(str(teacher), load_tokenizer(llama))
