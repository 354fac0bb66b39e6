"""`phase: eval`: a stage of a recipe that measures a model, once."""

import json

import pytest

from alignjax.core.config import build, loads
from alignjax.core.errors import UserError
from alignjax.recipes.graph import RecipeConfig, run_recipe
from tests.evals import bigram

RECIPE = """
name: r
output_dir: {root}
vars: {{model: {root}/model}}
stages:
  measured:
    phase: eval
    model: ${{model}}
    data: {{generate: arithmetic, count: 25, largest: 4, num_terms: [2], operators: ["+"]}}
    text: {{fields: {{prompt: "{{expression}}=", reference: answer}}}}
    num_samples: 2
    max_prompt_tokens: 16
    max_tokens: 4
    rewards:
      functions:
        accuracy: {{function: verify.numeric, args: {{place: last_number}}}}
        reflects: {{function: format.reflects, weight: 0.0, args: {{words: ["3"]}}}}
      num_workers: 1
    answer: last_number
"""


def test_it_runs_once_and_belongs_to_its_model(tmp_path, capsys):
    bigram.write(tmp_path / "model", bigram.table({("=", "3"): 30, ("3", "<eos>"): 30}))
    config = build(RecipeConfig, loads(RECIPE.format(root=tmp_path)))
    folder = run_recipe(config, command="again") / "measured"
    figures = json.loads((folder / "eval.json").read_text())
    assert figures["pass@1"]["mean"] == figures["maj@2"]["mean"] == pytest.approx(4 / 25)
    assert figures["parts"]["reflects"]["mean"] == 1.0  # By the words of the config.
    assert figures["reward"] == pytest.approx(4 / 25)  # Which weigh nothing.
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "inputs.json", "eval.json", "eval_problems.jsonl", "eval_samples.jsonl",
    }  # fmt: skip
    before = (folder / "eval.json").stat().st_mtime_ns
    run_recipe(config, command="again")
    assert "is there already: nothing to do" in capsys.readouterr().err
    assert (folder / "eval.json").stat().st_mtime_ns == before
    bigram.write(tmp_path / "model", bigram.table({("=", "4"): 30}))
    with pytest.raises(UserError, match="was made from another model"):
        run_recipe(config, command="again")
