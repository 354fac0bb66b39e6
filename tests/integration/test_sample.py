"""`phase: sample` in real processes: one that is killed with SIGKILL ends as one that is not."""

import json

import jax
import pytest

from alignjax.models import Model, ModelConfig, save
from alignjax.text import vocab_tokenizer
from tests.integration.killed import kill_and_continue, start

CONFIG = """
name: r
stages:
  drawn:
    phase: sample
    model: {path: model}
    data: {train: prompts.jsonl, text: {fields: {prompt: q}}}
    rollout: {num_samples: 3, num_prompts: 2, max_prompt_tokens: 8, max_tokens: 6}
    rewards: {functions: {long: {function: "mine.py:reward"}}, num_workers: 1}
  tuned:
    phase: sft
    model: {path: model}
    data:
      train: ${drawn}/best.jsonl
      text: {fields: {prompt: prompt, completion: completion}}
      row_len: 16
      rows: 2
    loop: {steps: 1, tensorboard: false}
"""
REWARD = """
import time

def reward(completion):
    time.sleep(0.15)
    return len(completion)
"""


@pytest.mark.slow
def test_killed_and_continued_in_a_recipe(tmp_path):
    tokens = ["<pad>", "<bos>", "<eos>", *"abcdefgh"]
    model = Model(
        ModelConfig(vocab_size=len(tokens), hidden_size=16, num_layers=1, num_heads=2,
                    max_position_embeddings=32, initializer_range=0.3)
    )  # fmt: skip
    params = model.init(jax.random.key(0))
    for folder in ("whole", "cut"):
        here = tmp_path / folder
        save(here / "model", model, params, extra_config={"eos_token_id": 2})
        vocab_tokenizer(tokens).save(str(here / "model"))
        (here / "r.yaml").write_text(CONFIG)
        (here / "mine.py").write_text(REWARD)
        lines = [json.dumps({"q": "abcdefgh"[i % 8], "number": i}) for i in range(30)]
        (here / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    names = ("drawn/preferences.jsonl", "drawn/best.jsonl", "drawn/sample.json",
             "tuned/model/model.safetensors")  # fmt: skip
    kill_and_continue(tmp_path, "drawn", "preferences.jsonl", (2, 10), names)
    records = (
        (tmp_path / "cut" / "runs" / "r" / "drawn" / "preferences.jsonl").read_text().splitlines()
    )
    assert [json.loads(line)["number"] for line in records] == sorted(
        {json.loads(line)["number"] for line in records}
    ), "in order, none twice"
    again = start(tmp_path / "cut")
    assert again.wait(timeout=300) == 0
    assert "preferences.jsonl is there already: nothing to do" in again.stderr.read()
