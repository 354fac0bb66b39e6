"""docs/metrics.md names what runs log: every name, and no other."""

import json
import re
from pathlib import Path

import pytest

from alignjax.core.config import build, loads
from alignjax.phases.registry import PHASES
from alignjax.recipes import sevens
from alignjax.recipes.chains import write
from alignjax.train.loop import train
from alignjax.train.metrics import read_metrics
from alignjax.train.progress import Progress

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"

SFT = """
phase: sft
name: sft
output_dir: {root}
model: {{init: {{hidden_size: 16, num_layers: 1, num_heads: 2, max_position_embeddings: 64}}}}
tokenizer: {root}/tokenizer
data:
  train: {root}/corpus.jsonl
  eval: {root}/corpus.jsonl
  text: {{fields: {{completion: text}}}}
  row_len: 64
  rows: 8
loop: {{steps: 1, tensorboard: false}}
"""

GRPO = """
phase: grpo
name: grpo
output_dir: {root}
model: {{path: {root}/model}}
data:
  train: {root}/train.jsonl
  eval: {root}/test.jsonl
  text: {{fields: {{prompt: prompt, reference: reference}}}}
rollout:
  {{num_prompts: 4, group_size: 2, max_prompt_tokens: 16, max_tokens: 8,
    devices: 4, max_staleness: 1}}
algorithm: {{preset: grpo, old_logps: trainer, importance_cap: 2.0}}
rewards:
  functions: {{mine: {{function: "{root}/mine.py:reward"}}}}
  num_workers: 1
evaluation: {{num_problems: 4}}
loop: {{steps: 1, tensorboard: false}}
"""

REWARD = """
phase: reward
name: reward
output_dir: {root}
model: {{init: {{hidden_size: 16, num_layers: 1, num_heads: 2, max_position_embeddings: 64}}}}
tokenizer: {root}/sevens/tokenizer
data:
  train: {root}/sevens/train.jsonl
  eval: {root}/sevens/test.jsonl
  row_len: 64
  num_prompts: 8
loop: {{steps: 1, tensorboard: false}}
"""

PREFERENCE = """
phase: preference
name: preference
output_dir: {root}
model: {{init: {{hidden_size: 16, num_layers: 1, num_heads: 2, max_position_embeddings: 64}}}}
tokenizer: {root}/sevens/tokenizer
losses: {{bco: {{}}}}
data:
  train: {root}/sevens/train.jsonl
  eval: {root}/sevens/test.jsonl
  row_len: 64
  num_prompts: 8
cache_dir: {root}/cache
loop: {{steps: 1, tensorboard: false}}
"""
KTO = PREFERENCE.replace("bco", "kto").replace("name: preference", "name: kto")

ONLINE = """
phase: online_preference
name: online
output_dir: {root}
model: {{path: {root}/model}}
data:
  train: {root}/train.jsonl
  text: {{fields: {{prompt: prompt, reference: reference}}}}
rollout: {{num_prompts: 8, group_size: 2, max_prompt_tokens: 16, max_tokens: 8}}
rewards:
  functions: {{mine: {{function: "{root}/mine.py:reward"}}}}
  num_workers: 1
loop: {{steps: 1, tensorboard: false}}
"""


PPO = """
phase: ppo
name: ppo
output_dir: {root}
model: {{path: {root}/model}}
data:
  train: {root}/train.jsonl
  eval: {root}/test.jsonl
  text: {{fields: {{prompt: prompt, reference: reference}}}}
rollout: {{num_prompts: 8, max_prompt_tokens: 16, max_tokens: 8}}
algorithm: {{num_epochs: 1, ptx_coef: 0.1}}
ptx:
  train: {root}/corpus.jsonl
  text: {{fields: {{completion: text}}}}
  rows: 8
  overlong: drop
rewards:
  functions: {{mine: {{function: "{root}/mine.py:reward"}}}}
  num_workers: 1
evaluation: {{num_problems: 4, best_of_n: 2}}
loop: {{steps: 1, tensorboard: false}}
"""


DISTILL = """
phase: distill
name: distill
output_dir: {root}
model: {{path: {root}/model}}
teacher: {{path: {root}/model}}
data:
  train: {root}/corpus.jsonl
  eval: {root}/corpus.jsonl
  text: {{fields: {{completion: text}}}}
  row_len: 64
  rows: 8
loop: {{steps: 1, tensorboard: false}}
"""

ONLINE_DISTILL = """
phase: online_distill
name: online_distill
output_dir: {root}
model: {{path: {root}/model}}
teacher: {{path: {root}/model}}
data:
  train: {root}/train.jsonl
  eval: {root}/test.jsonl
  text: {{fields: {{prompt: prompt}}}}
rollout: {{num_prompts: 8, max_prompt_tokens: 16, max_tokens: 8}}
evaluation: {{num_problems: 4}}
loop: {{steps: 1, tensorboard: false}}
"""


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The names in metrics.jsonl of a tiny run of each phase."""
    root = tmp_path_factory.mktemp("runs")
    write(root, seed=0, num_questions=24, num_drills=8, num_train=8, num_test=4)
    root.joinpath("mine.py").write_text(
        "def reward(completion, **fields):\n"
        "    return {'reward': len(completion) % 7, 'digits': sum(c.isdigit() for c in completion)}"
    )
    names = {}
    (root / "sevens").mkdir()
    sevens.write(root / "sevens", seed=0, num_train=16, num_test=8)
    for text in (REWARD, PREFERENCE, KTO, SFT, ONLINE, GRPO, PPO, DISTILL, ONLINE_DISTILL):
        tree = loads(text.format(root=root))
        schema, phase_class = PHASES[tree.values["phase"]]
        config = build(schema, tree)
        phase = phase_class(config, config.training_mesh())
        run_dir = root / config.name
        run_dir.mkdir(exist_ok=True)  # rewards.log may be in there already
        state = train(phase, config.loop, run_dir, seed=0, progress=Progress())
        if text == SFT:
            phase.export(state, root / "model")
        names[config.name] = {name for row in read_metrics(run_dir) for name in row}
        samples = (run_dir / "samples.jsonl").read_text().splitlines()
        names["samples"] = {name for line in samples for name in json.loads(line)}
    return names


def documented():
    """The first cell of each row of each table."""
    return re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def generic(name):
    """A name as the page has it: NAME for the function, PART for a part of its result."""
    return name.replace("mine/digits", "NAME/PART").replace("mine", "NAME")


@pytest.mark.slow
def test_every_name_that_a_run_logs_is_explained(logged):
    explained = set(documented())
    assert len(logged) == 10
    for phase in logged.keys() - {"samples"}:
        assert len(logged[phase]) > 10
        assert {generic(name) for name in logged[phase]} <= explained


@pytest.mark.slow
def test_every_name_that_is_explained_is_logged(logged):
    runs = (names for name, names in logged.items() if name != "samples")
    found = {generic(name) for name in set().union(*runs)}
    assert set(documented()) - found == {"aux_loss"}  # of models with experts: see test_sft.py


@pytest.mark.slow
def test_the_fields_of_samples_are_named(logged):
    text = PAGE.read_text(encoding="utf-8").partition("## samples.jsonl")[2]
    assert logged["samples"] == set(re.findall(r"`(\w+)`", text))
