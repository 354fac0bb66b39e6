"""A judge is asked by a principle that each prompt draws, whatever batch it stands in."""

import json
from types import SimpleNamespace

import pytest

from alignjax.core.config import build, loads
from alignjax.core.errors import UserError
from alignjax.phases import label
from alignjax.phases.produce import produce
from alignjax.phases.registry import DATA_PHASES
from alignjax.recipes.graph import RecipeConfig
from alignjax.rewards.constitution import load_constitution
from alignjax.rewards.judge import Verdict
from alignjax.sharding import MeshConfig, make_mesh

CONSTITUTION = """
name: small
principles:
  - {name: kind, critique: c, revision: r, comparison: Which is kinder}
  - {name: short, critique: c, revision: r, comparison: Which is shorter, weight: 2.0}
"""
CONFIG = """
phase: label
name: l
output_dir: {root}/runs
seed: 5
responses: {root}/responses.jsonl
num_prompts: 4
constitution: {{path: {root}/constitution.yaml}}
judge: {{name: mine, function: mine.judge}}
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "constitution.yaml").write_text(CONSTITUTION)
    with (tmp_path / "responses.jsonl").open("w") as file:
        for i in range(30):
            print(json.dumps({"prompt": f"p{i}", "responses": ["long", "no", "maybe"]}), file=file)
    return tmp_path


def run(root, monkeypatch, *overrides):
    """Records and figures, by a judge that likes what is short, if that is asked, or else the
    later letter; and what it was asked."""
    asked = []

    def pairwise(pairs):
        asked.extend((p.prompt, p.variables) for p in pairs)
        key = {"Which is shorter": lambda text: -len(text), "Which is kinder": lambda text: text}
        of = [key[p.variables["question"]] for p in pairs]
        return [
            Verdict(float(f(p.first) > f(p.second)), (0.5, 0.5))
            for p, f in zip(pairs, of, strict=True)
        ]

    fake = SimpleNamespace(pairwise=pairwise, identity="", template_digests={}, close=lambda: None)
    monkeypatch.setattr(label, "open_judge", lambda *args: fake)
    config_class, phase_class = DATA_PHASES["label"]
    config = build(config_class, loads(CONFIG.format(root=root), [*overrides]))
    folder = root / f"run {len(overrides)}"
    folder.mkdir()
    produce(phase_class(config, make_mesh(MeshConfig())), folder, lambda _: None)
    lines = (folder / "preferences.jsonl").read_text().splitlines()
    return [*map(json.loads, lines)], json.loads((folder / "label.json").read_text()), asked


def test_each_prompt_draws_a_principle(root, monkeypatch):
    records, figures, asked = run(root, monkeypatch)
    drawn = load_constitution(str(root / "constitution.yaml"))
    expected = [drawn.ordered(f"5/{i}")[0] for i in range(30)]
    assert [r["principle"] for r in records] == [p.name for p in expected]
    assert {p.name for p in expected} == {"kind", "short"}
    # All pairs of a prompt by one question.
    assert asked == [(f"p{i}", {"question": p.comparison}) for i, p in enumerate(expected)
                     for _ in range(3)]  # fmt: skip
    ranks = {"short": [2, 1, 3], "kind": [3, 1, 2]}
    assert all(r["ranks"] == ranks[r["principle"]] for r in records)
    assert len(figures["constitution"]) == 64
    other, figures_of_other, _ = run(root, monkeypatch, "constitution.leave_out=[short]")
    assert {r["principle"] for r in other} == {"kind"}
    assert figures_of_other["constitution"] != figures["constitution"]


@pytest.mark.parametrize(
    ("override", "message"),
    [("judge.question=which", "give one of them"), ("method=pointwise", "goes with method: pair")],
)
def test_faults(root, override, message):
    with pytest.raises(UserError, match=message):
        build(DATA_PHASES["label"][0], loads(CONFIG.format(root=root), [override]))


def test_a_judge_in_a_recipe_takes_lists():
    """Below the validator that places stages, too."""
    judge = "{function: m.f, options: [' A', ' B'], clamp: [0.3, 0.7]}"
    text = f"name: r\nstages: {{l: {{phase: label, responses: r.jsonl, judge: {judge}}}}}"
    found = build(RecipeConfig, loads(text)).stages["l"].judge
    assert (found.options, found.clamp) == ((" A", " B"), (0.3, 0.7))
