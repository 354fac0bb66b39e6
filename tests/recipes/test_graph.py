"""Recipes: stages in order, handing directories on; finished ones skipped, changed ones refused."""

import json
import sys
import textwrap

import pytest

from alignjax.core.config import build, loads
from alignjax.core.errors import UserError
from alignjax.phases.registry import DATA_PHASES, PHASES
from alignjax.recipes import graph
from alignjax.recipes.graph import RecipeConfig, run_recipe
from alignjax.text import load_tokenizer

FUNCTIONS = """
    import json
    from pathlib import Path

    def write(directory, *, seed, word="hello", times=1):
        with open("calls.txt", "a") as file:
            file.write(f"{directory.name.strip('.').removesuffix('.tmp')} {seed}\\n")
        (directory / "words.jsonl").write_text(json.dumps({"text": word * times}) + "\\n")

    def stumble(directory, *, seed):
        (directory / "half").write_text("x")
        raise RuntimeError("the disk is full")
"""

STAGES = ["files", "tokenizer", "eval", *DATA_PHASES, *PHASES]
RECIPE = """\
name: r
seed: 3
stages:
  words: {phase: files, function: my_stages.write, args: {word: cat}}
  base:
    phase: sft
    tokenizer: ${words}/tokenizer
    seed: 5
    model: {init: {}}
    data:
      train: ["${words}/words.jsonl", "b${words}/more.jsonl"]
      text: {fields: {completion: text}}
  tuned:
    phase: sft
    model: {path: "${base}/model"}
    data:
      train: ${words}/words.jsonl
      text: {fields: {completion: text}}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a module of functions in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_stages", raising=False)
    (tmp_path / "my_stages.py").write_text(textwrap.dedent(FUNCTIONS))
    return tmp_path


def recipe(text, *overrides):
    return build(RecipeConfig, loads(text, overrides, name="r.yaml"))


@pytest.fixture
def trained(monkeypatch, here):
    """Makes training a note of what would have been trained, and a model directory."""
    calls = []

    def run_phase(config, *, command, title):
        calls.append((title, command, config))

    monkeypatch.setattr(graph, "run_phase", run_phase)
    return calls


def test_stages_get_directories_and_seeds_and_run_in_order(here, trained):
    config = recipe(RECIPE)
    assert [(s.name, s.output_dir, s.seed) for s in config.stages.values()] == [
        ("words", "runs/r", 3), ("base", "runs/r", 5), ("tuned", "runs/r", 3)
    ]  # fmt: skip
    base, tuned = config.stages["base"], config.stages["tuned"]
    assert base.tokenizer == "runs/r/words/tokenizer"
    assert base.data.train == ["runs/r/words/words.jsonl", "bruns/r/words/more.jsonl"]
    assert tuned.model.path == "runs/r/base/model"
    assert str(run_recipe(config, command="again")) == "runs/r"
    assert trained == [("base", "again", base), ("tuned", "again", tuned)]
    assert json.loads((here / "runs/r/words/words.jsonl").read_text()) == {"text": "cat"}
    elsewhere = recipe(RECIPE, "output_dir=out/a", "name=b", "seed=9")
    assert elsewhere.stages["tuned"].model.path == "out/a/b/base/model"
    assert [s.seed for s in elsewhere.stages.values()] == [9, 5, 9]


def test_a_finished_files_stage_is_skipped(here, trained, capsys):
    run_recipe(recipe(RECIPE), command="")
    run_recipe(recipe(RECIPE), command="")
    assert (here / "calls.txt").read_text() == "words 3\n"
    assert "words: runs/r/words is there already: nothing to do" in capsys.readouterr().err
    assert len(trained) == 4  # a phase decides for itself


def test_a_finished_files_stage_of_another_config_is_refused(here, trained):
    run_recipe(recipe(RECIPE), command="")
    for override, change in (
        ("stages.words.args.word=dog", "args.word: cat -> dog"),
        ("stages.words.args.times=2", "args.times: (not set) -> 2"),
        ("seed=4", "seed: 3 -> 4"),
    ):
        with pytest.raises(UserError) as caught:
            run_recipe(recipe(RECIPE, override), command="")
        first, second, _ = str(caught.value).splitlines()
        assert first == "runs/r/words holds a run of another config (there -> now):"
        assert second == f"  {change}"
    assert json.loads((here / "runs/r/words/words.jsonl").read_text()) == {"text": "cat"}
    run_recipe(recipe(RECIPE), command="")  # the refusals have changed nothing
    assert len(trained) == 4


def test_a_directory_that_no_stage_made_is_left_alone(here, trained):
    (here / "runs/r/words").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^runs/r/words is there, but no run made it"):
        run_recipe(recipe(RECIPE), command="")
    assert list((here / "runs/r/words").iterdir()) == [] and not trained


def test_a_function_that_raises_leaves_nothing(here, trained):
    text = RECIPE.replace("my_stages.write, args: {word: cat}", "my_stages.stumble")
    with pytest.raises(UserError) as caught:
        run_recipe(recipe(text), command="")
    assert str(caught.value) == (
        "stages.words: my_stages.stumble raised RuntimeError: the disk is full "
        "(--debug shows where)"
    )
    assert not (here / "runs/r/words").exists() and not list(here.rglob("half"))
    assert not trained
    run_recipe(recipe(RECIPE), command="")
    assert (here / "runs/r/words/words.jsonl").exists()


def test_what_a_killed_process_left_is_not_taken_for_a_stage(here, trained):
    half = here / "runs/r/.words.tmp"
    half.mkdir(parents=True)
    (half / "words.jsonl").write_text("{")
    (half / "stale").write_text("")
    run_recipe(recipe(RECIPE), command="")
    names = sorted(p.name for p in (here / "runs/r/words").iterdir())
    assert names == ["config.yaml", "inputs.json", "words.jsonl"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "my_stages.write",
            "my_stages.wriet",
            "stages.last.function: expected package.module.function",
        ),
        ("my_stages.write", "nowhere.write", "No module named 'nowhere'"),
        ("my_stages.write", "write", "stages.last.function: expected package.module.function"),
        ("word: cat", "wrod: cat", "got an unexpected keyword argument 'wrod'"),
    ],
)
def test_a_wrong_function_is_found_before_the_first_stage_runs(here, trained, old, new, message):
    last = "  last: {phase: files, function: my_stages.write, args: {word: cat}}\n"
    with pytest.raises(UserError) as caught:
        run_recipe(recipe(RECIPE + last.replace(old, new)), command="")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (here / "runs").exists() and not trained


def test_tokenizer_stage(here):
    words = "args: {word: 'ab ', times: 99}"
    text = RECIPE.split("  base:")[0].replace("args: {word: cat}", words)
    text += "  vocabulary: {phase: tokenizer, sources: '${words}/words.jsonl', fields: [FIELD],\n"
    text += "    vocab_size: 283, special_tokens: [<think>]}\n"
    with pytest.raises(UserError) as caught:
        run_recipe(recipe(text.replace("FIELD", "txt")), command="")
    assert str(caught.value) == "runs/r/words/words.jsonl:1: no field 'txt'; there are text"
    assert not (here / "runs/r/vocabulary").exists()
    run_recipe(recipe(text.replace("FIELD", "text")), command="")
    tokenizer = load_tokenizer(here / "runs/r/vocabulary")
    assert tokenizer.vocab_size == 283 and len(tokenizer.encode("<think>")) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"${base}/model"', '"${bsae}/model"',
         "r.yaml:15: stages.tuned.model.path: ${bsae} is no earlier stage; there are words, base"),
        ('"${base}/model"', '"${tuned}/model"',
         "r.yaml:15: stages.tuned.model.path: ${tuned} is no earlier stage; "
         "there are words, base"),
        ("{word: cat}", "{word: '${}'}",
         "r.yaml:4: stages.words.args.word: ${} is no earlier stage; there are none"),
        ('"b${words}', '"b${wor-ds}',
         "r.yaml:11: stages.base.data.train.1: ${wor-ds} is no earlier stage; there are words"),
        ("    seed: 5", "    name: five",
         "r.yaml:8: stages.base.name: a recipe places its stages itself; leave it out"),
        ("    seed: 5", "    output_dir: five",
         "r.yaml:8: stages.base.output_dir: a recipe places its stages itself; leave it out"),
        ("    seed: 5", "    sede: 5",
         "r.yaml:8: unknown key 'sede' in stages.base; did you mean 'seed'?"),
        ("    seed: 5", "    optimizer: {lerning_rate: 1}",
         "r.yaml:8: unknown key 'lerning_rate' in stages.base.optimizer; "
         "did you mean 'learning_rate'?"),
        ("    seed: 5", "    loop: {steps: many}",
         "r.yaml:8: stages.base.loop.steps: expected a whole number, got the text 'many'"),
        ("    seed: 5", "    rewards: {}",
         "r.yaml:8: unknown key 'rewards' in stages.base; "),
        ("  base:\n    phase: sft", "  base:\n    phase: stf",
         f"r.yaml:6: stages.base.phase: expected {' or '.join(map(repr, STAGES))}, "
         "got the text 'stf'; did you mean 'sft'?"),
        ("  base:\n    phase: sft\n", "  base:\n",
         "r.yaml:5: missing key 'phase' in stages.base"),
        ("seed: 3", "sead: 3", "r.yaml:2: unknown key 'sead'; did you mean 'seed'?"),
        ("  tuned:\n", "  more: yes\n  tuned:\n",
         "r.yaml:13: stages.more: expected a section of `key: value`, got the text 'yes'"),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_line(here, old, new, message):
    assert RECIPE.count(old) == 1
    with pytest.raises(UserError) as caught:
        recipe(RECIPE.replace(old, new))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_names_that_lead_elsewhere_are_refused(here):
    with pytest.raises(UserError, match=r"^r.yaml:1: name: '\.\.' names no directory"):
        recipe(RECIPE.replace("name: r", "name: .."))
    with pytest.raises(UserError, match=r"^r.yaml:4: stages.a/b: 'a/b' names no directory"):
        recipe(RECIPE.replace("  words:", "  a/b:"))


def test_no_stage_is_no_recipe():
    for stages in ("{}", "[1]", "3"):
        with pytest.raises(UserError, match=r"^r.yaml:2: stages: expected "):
            recipe(f"name: x\nstages: {stages}\n")
