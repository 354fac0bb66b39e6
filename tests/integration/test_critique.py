"""`phase: critique` on real prompts, and in real processes that SIGKILL ends at any moment."""

import gzip
import json

import jax
import pytest

from alignjax.cli.main import main
from alignjax.core.config import build, loads
from alignjax.data import Examples, Fields, open_source
from alignjax.models import Model, ModelConfig, save
from alignjax.phases.registry import DATA_PHASES
from alignjax.recipes.stage import run_data_phase
from alignjax.text import train_sentencepiece, vocab_tokenizer
from tests.integration.killed import kill_and_continue

CONFIG = """
name: r
stages:
  revisions:
    phase: critique
    model: {path: model}
    data: {train: prompts.jsonl, text: {fields: {prompt: q}}}
    constitution: {path: constitution.yaml}
    template: template.yaml
    num_rounds: 2
    truncated: keep
    rollout:
      num_prompts: 2
      max_prompt_tokens: 8
      response: {max_tokens: 6}
      critique: {max_tokens: 4}
      revision: {max_tokens: 6}
  tuned:
    phase: sft
    model: {path: model}
    data:
      train: ["${revisions}/revisions.jsonl", helpful.jsonl]
      text: {fields: {prompt: prompt, completion: completion}}
      row_len: 16
      rows: 2
    loop: {steps: 1, tensorboard: false}
"""
CONSTITUTION = """
name: two
principles:
  - {name: a, critique: a, revision: b, comparison: c}
  - {name: b, critique: b, revision: c, comparison: d}
"""
TEMPLATE = """
chat: false
critique: "{{ prompt }}{{ response }}{{ principle.critique }}"
revision: "{{ prompt }}{{ response }}{{ critique }}{{ principle.revision }}"
"""


@pytest.mark.slow
def test_killed_and_continued_in_a_recipe(tmp_path):
    tokens = ["<pad>", "<bos>", "<eos>", *"abcdefgh"]
    model = Model(
        ModelConfig(vocab_size=len(tokens), hidden_size=16, num_layers=1, num_heads=2,
                    max_position_embeddings=48, initializer_range=0.3)
    )  # fmt: skip
    params = model.init(jax.random.key(0))
    files = {"r.yaml": CONFIG, "constitution.yaml": CONSTITUTION, "template.yaml": TEMPLATE}
    for folder in ("whole", "cut"):
        here = tmp_path / folder
        save(here / "model", model, params, extra_config={"eos_token_id": 2})
        vocab_tokenizer(tokens).save(str(here / "model"))
        for name, text in files.items():
            (here / name).write_text(text)
        lines = [json.dumps({"q": "abcdefgh"[i % 8], "number": i}) for i in range(60)]
        (here / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        helpful = json.dumps({"prompt": "a", "completion": "b"}) + "\n"
        (here / "helpful.jsonl").write_text(helpful * 10)
    names = ("revisions/trace.jsonl", "revisions/revisions.jsonl", "revisions/critique.json",
             "tuned/model/model.safetensors")  # fmt: skip
    kill_and_continue(tmp_path, "revisions", "trace.jsonl", (2, 20), names)
    trace = (tmp_path / "cut" / "runs" / "r" / "revisions" / "trace.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in trace] == list(range(60))


REAL = """
phase: critique
name: real
output_dir: {root}/runs
model: {{path: {root}/model}}
data:
  train: {root}/prompts.jsonl
  text: {{fields: {{messages: messages}}}}
  overlong: drop
template: critique_chat
num_rounds: 1
truncated: keep
rollout:
  num_prompts: 24
  max_prompt_tokens: 96
  response: {{max_tokens: 8}}
  critique: {{max_tokens: 8}}
  revision: {{max_tokens: 8}}
"""


def test_real_prompts_and_the_constitution_that_ships(real_data, tmp_path):
    """Mechanics, with a random model: red-team prompts of hh-rlhf go through, and become a page."""
    messages = []
    with gzip.open(real_data / "hh-rlhf" / "harmless-base-1600.jsonl.gz", "rt") as lines:
        for line, _ in zip(lines, range(24), strict=False):
            human = json.loads(line)["chosen"].split("\n\nHuman: ")[1].split("\n\nAssistant:")[0]
            messages.append([{"role": "user", "content": human}])
    with (tmp_path / "prompts.jsonl").open("w") as file:
        file.writelines(json.dumps({"messages": m}) + "\n" for m in messages)
    texts = [m["content"] for (m,) in messages]
    train_sentencepiece(texts, tmp_path / "model", 350)
    model = Model(
        ModelConfig(vocab_size=350, hidden_size=16, num_layers=1, num_heads=2,
                    max_position_embeddings=512, initializer_range=0.1)
    )  # fmt: skip
    save(tmp_path / "model", model, model.init(jax.random.key(0)))
    config = build(DATA_PHASES["critique"][0], loads(REAL.format(root=tmp_path)))
    run = run_data_phase(config, command="again").parent
    figures = json.loads((run / "critique.json").read_text())
    trace = [json.loads(line) for line in (run / "trace.jsonl").read_text().splitlines()]
    assert figures["num_prompts"] + figures["num_dropped"] == 24
    assert figures["num_prompts"] == len(trace) >= 12
    assert [r["prompt"] for r in trace] == [
        m for m in messages if m in [r["prompt"] for r in trace]
    ]
    assert figures["num_critiques"] > 0 and figures["num_revisions"] > 0
    assert len(figures["by_principle"]) >= 4, "of 14 principles"
    revised = [r for r in trace if r["revision"] is not None]
    source = Examples(open_source(str(run / "revisions.jsonl")), Fields(messages="messages"))
    assert len(source) == len(revised) > 0
    assert source[0].messages[-1] == {"role": "assistant", "content": revised[0]["revision"]}
    assert main(["report", str(run)]) == 0
    assert (run / "critiques.html").read_text().count("<article>") == len(trace)
