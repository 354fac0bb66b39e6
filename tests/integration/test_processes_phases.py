"""The phases that make records, distil or ask judges: two processes do what one does."""

import json

import pytest

from alignjax.core.config import dump
from alignjax.recipes import chains
from tests.integration.launched import Run, assert_same, metrics_of

MODEL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_position_embeddings": 128}
MESH = {"data": 2, "fsdp": 2}
REWARDS = {"functions": {"length": {"function": "lengths.py:score"}}}
PROMPTS = {"train": "world/train.jsonl", "text": {"fields": {"prompt": "prompt"}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    sizes = {"num_questions": 40, "num_drills": 20, "num_train": 8, "num_test": 4}
    chains.write(folder / "world", seed=0, **sizes)
    files = {
        "lengths.py": "def score(completion):\n    return len(completion) / 10\n",
        "judge.py": "def better(prompt, first, second):\n"
        "    return 0.5 + 0.3 * ((first > second) - (second > first))\n",
        "asked.jinja": "{{ prompt }}{{ first }};{{ second }}=",
        "written.yaml": 'chat: false\ncritique: "{{ response }}{{ principle.critique }}"\n'
        'revision: "{{ critique }}{{ principle.revision }}"\n',
        "constitution.yaml": "name: digits\nprinciples:\n"
        '  - {name: one, critique: "1=", revision: "2=", comparison: "3"}\n',
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    for name, stages in recipes().items():
        # By way of JSON: YAML would refer from one place to another to what is shared.
        recipe = json.loads(json.dumps({"name": name, "stages": stages}))
        (folder / f"{name}.yaml").write_text(dump(recipe))
    return folder


def recipes():
    """Recipes of every such phase, on what an untrained model says."""
    by_function = {"function": "judge.py:better"}
    by_model = {"model": {"path": "${base}/model", "chat": False}, "template": "asked.jinja",
                "options": ["1", "2"]}  # fmt: skip
    pairs = {"method": "pairwise"}
    judged = {"judges": {"judge": by_function | pairs, "model": by_model | pairs}, **REWARDS}
    made = {"model": {"path": "${base}/model"}, "mesh": MESH, "data": PROMPTS}
    rollout = {"num_samples": 4, "num_prompts": 4, "max_prompt_tokens": 20, "max_tokens": 8}
    trained = {
        "model": {"path": "${base}/model"},
        "mesh": MESH,
        "loop": {"steps": 2, "tensorboard": False},
        "optimizer": {"learning_rate": 1e-3},
    }
    sampled = {
        "data": PROMPTS | {"eval": "world/test.jsonl"},
        "rollout": {"num_prompts": 8, "group_size": 2, "max_prompt_tokens": 20, "max_tokens": 8},
        "evaluation": {"num_problems": 4, "num_samples": 2, "greedy": False},
    }
    texts = {"train": "world/corpus.jsonl", "text": {"fields": {"completion": "text"}},
             "row_len": 64, "overlong": "drop", "rows": 8}  # fmt: skip
    teacher = {"path": "${teacher}/model"}
    base = {"phase": "sft", "tokenizer": "world/tokenizer", "model": {"init": MODEL}, "data": texts}
    response = {"max_tokens": 6}
    models = {"base": trained | base}
    made_of_it = {
        "sample": made | {"phase": "sample", "rollout": rollout, "rewards": judged},
        "reject": made
        | {"phase": "reject", "rollout": rollout, "rewards": REWARDS}
        | {"keep": {"length": {"at_least": 0.0}}},
        "critique": made
        | {"phase": "critique", "constitution": {"path": "constitution.yaml"}}
        | {"template": "written.yaml", "num_rounds": 1, "truncated": "keep"}
        | {"rollout": {"num_prompts": 4, "max_prompt_tokens": 20, "response": response,
                       "critique": response, "revision": response}},
        "label": {"phase": "label", "responses": "${sample}/preferences.jsonl",
                  "judge": by_function},
        "label_by_model": {"phase": "label", "responses": "${sample}/preferences.jsonl",
                           "judge": by_model, "mesh": MESH},
        "eval": {"phase": "eval", "model": "${base}/model", "rewards": REWARDS,
                 "data": "world/test.jsonl", "text": PROMPTS["text"], "num_samples": 2,
                 "correct": None, "max_prompt_tokens": 20, "max_tokens": 8},
    }  # fmt: skip
    distilled = {
        "teacher": trained | base | {"seed": 1},
        "distill": trained
        | {"phase": "distill", "teacher": teacher | {"top_k": 4, "cache_dir": "teacher"}}
        | {"data": texts},
        "online_distill": trained | sampled | {"phase": "online_distill", "teacher": teacher},
    }
    online = {
        "online_preference": trained
        | sampled
        | {"phase": "online_preference", "losses": {"dpo": {}}, "rewards": judged},
    }
    return {
        "records": models | made_of_it,
        "distillation": models | distilled,
        "online": models | online,
    }


def both(folder, name):
    """The directories of a recipe that one process ran, and two did."""
    for number in (1, 2):
        run = Run(folder, number, name, f"name={name}_{number}")
        assert run.wait() == [0] * number, run.text()
    return [folder / "runs" / f"{name}_{number}" for number in (1, 2)]


def assert_close(found, expected, where):
    """JSON values, numbers but for rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_close(found[i], value, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), where
    else:
        assert found == expected, where


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_records_judgements_and_evaluations(folder):
    one, two = both(folder, "records")
    assert_same(metrics_of(folder, "records_2/base"), metrics_of(folder, "records_1/base"))
    names = [
        str(path.relative_to(one)) for path in one.rglob("*.jsonl") if "base" not in path.parts
    ]
    assert len(names) == len([path for path in two.rglob("*.jsonl") if "base" not in path.parts])
    assert {*names} >= {
        "sample/preferences.jsonl", "sample/best.jsonl", "reject/kept.jsonl",
        "critique/trace.jsonl", "critique/revisions.jsonl", "label/preferences.jsonl",
        "label_by_model/preferences.jsonl", "eval/eval_samples.jsonl", "eval/eval_problems.jsonl",
    }  # fmt: skip
    for name in names:
        texts = [(root / name).read_text().splitlines() for root in (two, one)]
        assert texts[1], name
        assert_close(*([json.loads(line) for line in lines] for lines in texts), name)
    for name in ("sample/sample.json", "critique/critique.json", "reject/reject.json"):
        assert_close(*(json.loads((root / name).read_text()) for root in (two, one)), name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("recipe", "phases"),
    [
        ("distillation", ["teacher", "distill", "online_distill"]),
        ("online", ["online_preference"]),
    ],
)
def test_training(folder, recipe, phases):
    """Distillation from a file of the teacher's and on the student's samples; online DPO by judges
    that are a function and a model."""
    both(folder, recipe)
    for phase in phases:
        found, expected = (metrics_of(folder, f"{recipe}_{n}/{phase}") for n in (2, 1))
        assert expected[-1]["loss"] > 0 and expected[-1]["grad_norm"] > 0
        assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("recipe", "phase"), [("distillation", "online_distill"), ("online", "online_preference")]
)
def test_another_process_samples_and_judges(folder, recipe, phase):
    for name, number, way in (("near", 1, "devices=2"), ("far", 2, "processes=1")):
        options = [f"stages.{phase}.{option}" for option in (f"rollout.{way}", "mesh={data: 2}")]
        run = Run(folder, number, recipe, f"name={recipe}_{name}", *options)
        assert run.wait() == [0] * number, run.text()
    near, far = (metrics_of(folder, f"{recipe}_{name}/{phase}") for name in ("near", "far"))
    assert near[-1]["rollout/staleness/max"] == 0 and near[-1]["grad_norm"] > 0
    assert_same(far, near)
