"""`alignjax eval MODEL --task ...` and `alignjax compare` of its files, on models known by hand."""

import json
import shutil

import jax
import numpy as np
import pytest

from alignjax.cli.eval import KINDS
from alignjax.cli.main import main
from alignjax.core.config import load, shipped_configs
from alignjax.models import Model, ModelConfig, ScalarModel, save_reward
from alignjax.text import vocab_tokenizer
from tests.evals import bigram

TASKS = {k: v for k, v in shipped_configs().items() if k.startswith("tasks/")}
GSM8K = [
    {"question": "One apple and two more?", "answer": "1 + 2 = <<1+2=3>>3\n#### 3"},
    {"question": "A thousand less one?", "answer": "It is 1000 - 1.\n#### 999"},
    {"question": "Half of 6?", "answer": "6 / 2 = 3\n#### 3"},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Models `three`, which says " 3" and then asks a question of its own, and `other`, which may
    say 3 or 4; a run whose model is `three`; a reward model."""
    folder = tmp_path_factory.mktemp("tasks")
    after = {(":", " "): 30, (" ", "3"): 30, ("3", "\n"): 30, ("\n", "Q"): 30, ("=", " "): 30}
    question = {(a, b): 30 for a, b in zip("Question", "uestion:", strict=True)}
    bigram.write(folder / "three", bigram.table(after | question), context=2048)
    other = after | question | {(" ", "4"): 30}
    bigram.write(folder / "other", bigram.table(other), context=2048)
    shutil.copytree(folder / "three", folder / "run" / "model")
    lines = "".join(json.dumps(record) + "\n" for record in GSM8K)
    (folder / "gsm8k.jsonl").write_text(lines)
    scalar = ScalarModel(
        Model(
            ModelConfig(
                vocab_size=len(bigram.TOKENS), hidden_size=16, num_layers=1, num_heads=2,
                intermediate_size=32, max_position_embeddings=64,
            )
        )
    )  # fmt: skip
    params = scalar.init(jax.random.key(1))
    save_reward(folder / "rm", scalar, params, extra_config=bigram.IDS)
    vocab_tokenizer(bigram.TOKENS).save(str(folder / "rm"))
    return folder


def evaluate(root, model, task, *words):
    return main(["eval", str(root / model), "--task", task, *words])


SMALL = ["max_tokens=16"]
SHORT = [*SMALL, "shots=[]", "max_prompt_tokens=48"]
"""Without the worked examples, which are long where a token is one character."""


def read(folder, name="eval.json"):
    lines = (folder / name).read_text().splitlines()
    return json.loads("".join(lines)) if name == "eval.json" else [json.loads(x) for x in lines]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_that_ships_says_what_it_is(name):
    tree = load(TASKS[name])
    assert tree.values["kind"] in KINDS and tree.values["task"] == TASKS[name].stem
    head = TASKS[name].read_text().split("\nkind:")[0]
    words = ["# hardware", "# time", "# expect", "# command", "# writes"]
    assert all(f"\n{word}" in head for word in words)
    assert f"--task {TASKS[name].stem}" in head


def test_gsm8k_of_a_run(root, capsys):
    """Right of the two whose answer is 3; what follows the answer is not read."""
    words = [f"data={root}/gsm8k.jsonl", "max_prompt_tokens=1900", *SMALL]
    assert evaluate(root, "run", "gsm8k", *words) == 0
    out = capsys.readouterr().out
    figures = read(root / "run/eval/gsm8k")
    assert figures["pass@1"]["mean"] == pytest.approx(2 / 3)
    # Of three problems, two right: the resampled mean is 0 in 1 of 27 cases, and 1 in 8.
    assert figures["pass@1"]["bootstrap"] == {"low": 0.0, "high": 1.0}
    assert figures["parts"]["strict"]["mean"] == figures["parts"]["reflects"]["mean"] == 0.0
    assert out.startswith("pass@1     66.7% [") and "bootstrap [0.0, 100.0]" in out
    samples = read(root / "run/eval/gsm8k", "eval_samples.jsonl")
    assert [s["completion"] for s in samples] == [" 3"] * 3
    assert samples[0]["prompt"].count("Question:") == 5  # Four worked examples.
    assert samples[0]["prompt"].endswith("#### 12\n\nQuestion: One apple and two more?\nAnswer:")
    made_of = figures["provenance"]
    assert made_of["task"] == "gsm8k" and made_of["data"]["num_problems"] == 3
    assert made_of["sampling"]["temperature"] == 0.0
    problems = read(root / "run/eval/gsm8k", "eval_problems.jsonl")
    assert [p["pass@1"] for p in problems] == [1, 0, 1]


def test_sampled_and_compared(root, tmp_path, capsys):
    words = [f"data={root}/gsm8k.jsonl", "num_samples=8", "temperature=1.0", *SHORT]
    for model in ("three", "other"):
        assert evaluate(root, model, "gsm8k", *words, "--out", str(tmp_path / model)) == 0
    three, other = (read(tmp_path / model) for model in ("three", "other"))
    assert three["pass@1"]["mean"] == three["maj@8"]["mean"] == pytest.approx(2 / 3)
    assert 0.1 < other["pass@1"]["mean"] < 0.57  # About a half of two thirds.
    capsys.readouterr()
    paths = [str(tmp_path / "three" / "eval.json"), str(tmp_path / "other")]
    assert main(["compare", *paths, "--out", str(tmp_path / "paired")]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "paired/compare.json").read_text())
    one = found["pass@1"]
    assert one["difference"]["mean"] == pytest.approx(
        three["pass@1"]["mean"] - other["pass@1"]["mean"]
    )
    # Two problems differ, both one way, and one does not: 2 of 4 assignments of signs.
    assert (one["p_value"], one["p_value_is_exact"]) == (0.5, True)
    assert (one["num_higher"], one["num_lower"]) == (2, 0)
    assert out.splitlines()[0].startswith("pass@1")
    # Greedy and sampled do not compare.
    greedy = [f"data={root}/gsm8k.jsonl", *SHORT, "--out", str(tmp_path / "greedy")]
    assert evaluate(root, "three", "gsm8k", *greedy) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "greedy"), paths[1]]) == 2
    err = capsys.readouterr().err
    assert "sampling.num_samples: 1 -> 8" in err and "sampling.temperature: 0.0 -> 1.0" in err


@pytest.mark.slow  # its workers import sympy
def test_math(root, tmp_path, capsys):
    """What is said has no box: wrong, and no failure."""
    problem = {"problem": "Find x.", "solution": "It is $\\boxed{\\frac{1}{2}}$."}
    (tmp_path / "math.jsonl").write_text(json.dumps(problem) + "\n")
    words = [f"data={tmp_path}/math.jsonl", *SHORT, "--out", str(tmp_path)]
    assert evaluate(root, "three", "math", *words) == 0
    figures = read(tmp_path)
    assert figures["pass@1"]["mean"] == 0.0 and figures["num_failed_rewards"] == 0
    assert figures["pass@1"]["bootstrap"] == {"low": None, "high": None}


def test_arithmetic_of_made_problems(root, tmp_path, capsys):
    words = ["data.count=20", "data.largest=3", "data.num_terms=[2]", "data.operators=['+']"]
    assert evaluate(root, "three", "arithmetic", *words, *SHORT) == 2
    assert "found 16 different problems" in capsys.readouterr().err
    words[0] = "data.count=16"
    assert evaluate(root, "three", "arithmetic", *words, *SHORT, "--out", str(tmp_path)) == 0
    # Of the 16 sums of two numbers from 0 to 3 there are 4 that give 3.
    assert read(tmp_path)["pass@1"]["mean"] == pytest.approx(4 / 16)


def test_mcq(root, tmp_path, capsys):
    lines = [
        {"question": "What is 1 + 2?", "choices": ["2", "3"], "answer": "B"},
        {"question": "What is 2 + 2?", "choices": ["4", "3"], "answer": 0},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    words = [f"data={tmp_path}/q.jsonl", "candidate=' {option}'", *SHORT, "--out", str(tmp_path)]
    assert evaluate(root, "three", "mcq", *words) == 0
    out = capsys.readouterr().out
    figures = read(tmp_path)
    assert figures["accuracy"]["mean"] == 0.5  # It always takes 3.
    assert (figures["pass@1"]["mean"], figures["no_letter_frac"]) == (0.0, 1.0)
    assert "likeliest  50.0% [" in out and "chance     50.0%" in out


def test_win_rate(root, tmp_path, capsys):
    (tmp_path / "judge.py").write_text(
        "def threes(prompt, first, second):\n"
        "    return 0.5 + (('3' in first) - ('3' in second)) / 2\n"
    )
    (tmp_path / "p.jsonl").write_text('{"prompt": "a="}\n{"prompt": "b="}\n')
    judge = f"judge.function={tmp_path}/judge.py:threes"
    words = [f"data={tmp_path}/p.jsonl", judge, "num_samples=8", *SHORT, "--out", str(tmp_path)]
    assert evaluate(root, "other", "win_rate", f"b={root}/run", *words) == 0
    figures = read(tmp_path)
    assert figures["losses"] + figures["ties"] == 16 and figures["losses"] > 2
    against = figures["provenance"]["scoring"]["against"]
    assert against["path"] == f"{root}/run/model" and len(against["digest"]) == 64
    assert f"against {root}/run/model" in capsys.readouterr().out


def test_preference(root, tmp_path, capsys):
    record = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    words = [f"preferences={tmp_path}/p.jsonl", "--out", str(tmp_path)]
    assert evaluate(root, "rm", "preference", *words) == 0
    figures = read(tmp_path)
    assert figures["accuracy"]["mean"] in (0.0, 1.0)
    assert figures["provenance"]["task"] == "preference"


def test_a_task_of_ones_own(root, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(
        "data: {generate: arithmetic, count: 16, largest: 3}\n"
        "text: {fields: {prompt: '{expression} =', reference: answer}}\n"
        "max_prompt_tokens: 48\nmax_tokens: 16\nnum_samples: 1\n"
        "rewards: {functions: {accuracy: {function: verify.numeric, args: {place: last_number}}}}\n"
        "answer: last_number\n"
    )
    assert evaluate(root, "three", str(tmp_path / "mine.yaml")) == 0
    assert "kept       nothing; --out DIR keeps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{root}/three", "--task", "gsm"], "--task gsm: no such task; did you mean gsm8k?"),
        (["{root}/three", "--task", "xyz"], "expected one of arc, arithmetic, gsm8k, math"),
        (["{root}/three", "--task", "no.yaml"], "no.yaml: No such file or directory"),
        (["{root}/three"], "no config.yaml; expected a run's directory or a YAML file; it is a "
         "model: say what to measure of it with --task"),
        (["{root}/three", "--task", "win_rate"], "win_rate.yaml: missing key 'data'"),
        (["{root}/three", "--task", "gsm8k", "kind=guess"],
         "command line: kind: expected one of answers, choices, preference, win_rate, got 'guess'"),
        (["{root}/nowhere", "--task", "arithmetic"], "nowhere"),
        (["{root}/bare", "--task", "arithmetic"], "bare"),
        (["{root}/three", "--task", "gsm8k", "data={root}/bad.jsonl"],
         "bad.jsonl:2: prompt: no field 'question'; did you mean 'qestion'?"),
        (["{root}/three", "--task", "gsm8k", "data={root}/empty.jsonl"], "empty.jsonl: no records"),
        (["{root}/three", "--task", "arithmetic", "data.sed=1"],
         "command line: unknown key 'sed' in data; did you mean 'seed'?"),
    ],
)  # fmt: skip
def test_faults(root, tmp_path, capsys, words, message):
    (root / "empty.jsonl").write_text("\n")
    bad = [GSM8K[0], {"qestion": "x", "answer": "#### 1"}]
    (root / "bad.jsonl").write_text("".join(json.dumps(x) + "\n" for x in bad))
    if not (root / "bare").exists():  # A model without a tokenizer.
        shutil.copytree(root / "three", root / "bare")
        for file in (root / "bare").glob("tokenizer*"):
            file.unlink()
    words = [word.format(root=root) for word in words]
    assert main(["eval", *words, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("alignjax: ") and message in err and "Traceback" not in err
    assert out == "" and not (tmp_path / "out").exists()


def test_real_problems(real_data, root, tmp_path):
    """GSM8K as it is, with the worked examples before it."""
    data = real_data / "gsm8k" / "test-660.jsonl"
    lines = data.read_text(encoding="utf-8").splitlines()[:40]
    plain = [x for x in lines if json.loads(x)["question"].isascii()][:5]
    (tmp_path / "few.jsonl").write_text("\n".join(plain) + "\n")
    words = [f"data={tmp_path}/few.jsonl", "max_prompt_tokens=1900", *SMALL]
    assert evaluate(root, "three", "gsm8k", *words, "--out", str(tmp_path)) == 0
    samples = read(tmp_path, "eval_samples.jsonl")
    expected = [float(json.loads(x)["answer"].endswith("#### 3")) for x in plain]
    assert [s["parts"]["accuracy"] for s in samples] == expected
    assert np.all([s["error"] is None for s in samples])
