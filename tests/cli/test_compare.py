"""`alignjax compare`, and `alignjax eval` of a reward model, on tiny models."""

import json

import jax
import numpy as np
import pytest

from alignjax.cli.main import main
from alignjax.models import Model, ModelConfig, ScalarModel, load_reward, save, save_reward
from alignjax.text import vocab_tokenizer

TOKENS = ["<pad>", "<bos>", "<eos>", *"abcd"]
SHAPE = ModelConfig(
    vocab_size=len(TOKENS), hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32,
    max_position_embeddings=32, tie_embeddings=False,
)  # fmt: skip
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIG = """
data: {root}/prompts.jsonl
text: {{fields: {{prompt: q}}}}
max_prompt_tokens: 8
max_tokens: 6
num_samples: 2
"""
JUDGE = """
def longest(prompt, first, second, *, bias=0.0, **fields):
    assert fields["source"].startswith("s")
    return min(1.0, 0.5 * (1 + (len(first) > len(second)) - (len(first) < len(second))) + bias)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two policies, of which `a` mostly says a, and `short` nothing; a reward model."""
    folder = tmp_path_factory.mktemp("compare")
    tokenizer = vocab_tokenizer(TOKENS)
    model = Model(SHAPE)
    params = model.init(jax.random.key(0))
    one = np.ones((1, 1), np.int32)
    hidden = np.asarray(model.apply(params, one, one, one - 1)[0])[0, 0]
    for name, token in (("a", "a"), ("short", "<eos>")):
        # The one that the hidden state of the first token points at.
        likely = np.zeros((SHAPE.hidden_size, len(TOKENS)), np.float32)
        likely[:, TOKENS.index(token)] = hidden
        params_of = {**params, "unembedding": likely}
        save(folder / name / "model", model, params_of, extra_config=IDS)
        tokenizer.save(str(folder / name / "model"))
    scalar = ScalarModel(model)
    save_reward(folder / "rm", scalar, scalar.init(jax.random.key(1)), extra_config=IDS)
    tokenizer.save(str(folder / "rm"))
    (folder / "judges.py").write_text(JUDGE)
    with (folder / "prompts.jsonl").open("w") as file:
        for i, q in enumerate(["", "a", "b", "ab"]):
            print(json.dumps({"q": q, "source": f"s{i}"}), file=file)
    with (folder / "held_out.jsonl").open("w") as file:
        for i in range(6):
            record = {"prompt": "abcd"[i % 4], "responses": ["a" * (i + 1), "bc"], "ranks": [1, 2]}
            print(json.dumps(record), file=file)
    (folder / "compare.yaml").write_text(CONFIG.format(root=folder))
    return folder


def compare(root, *more):
    return main(["compare", str(root / "a"), str(root / "short" / "model"),
                 str(root / "compare.yaml"), *more])  # fmt: skip


def test_a_judge_in_both_orders(root, capsys):
    judge = f"judge.function={root}/judges.py:longest"
    assert compare(root, judge, "judge.args={bias: 0.25}", "--out", str(root / "out")) == 0
    out = capsys.readouterr().out
    figures = json.loads((root / "out" / "compare.json").read_text())
    lines = (root / "out" / "compare_samples.jsonl").read_text().splitlines()
    assert len(lines) == 4 * 2
    expected = []
    for line in lines:
        pair = json.loads(line)
        a, b = (len(pair[side]["completion"]) for side in "ab")
        # One order gives min(1, 1/2 + sign / 2 + 1/4), the other the same with the sign turned.
        p = {1: (1 + 1 - 0.25) / 2, 0: 0.5, -1: (0.25 + 1 - 1) / 2}[np.sign(a - b)]
        assert pair["a_is_better"] == pytest.approx(p)
        expected.append(p)
    assert figures["win_rate"]["mean"] == pytest.approx(np.mean(expected))
    assert figures["win_rate"]["mean"] > 0.6, "a speaks and the other one hardly does"
    assert figures["mean_length"]["a"] > figures["mean_length"]["b"]
    assert 0.6 < figures["first_is_preferred"]["mean"] < 0.8
    assert f"{100 * np.mean(expected):.1f}% [" in out and "the judge prefers the first one" in out


def test_a_reward_model_and_one_model_against_itself(root, capsys):
    reward = f"rewards={{models: {{rm: {{path: {root}/rm, mean: 0.0, std: 1.0}}}}}}"
    words = ["compare", str(root / "a"), str(root / "a"), str(root / "compare.yaml"), reward]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "a wins     50.0%" in out and "0 won, 8 tied, 0 lost" in out
    assert "places" not in out and "failed" not in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give either rewards or judge"),
        (["max_prompt_tokens=1", "judge.function=x.py:y"], "prompts.jsonl:2: 2 tokens, but only 1"),
        (["max_tokens=40", "judge.function=x.py:y"], "exceed the model's context of 32"),
        (["judge.function={root}/judges.py:nobody"], "has no function 'nobody'"),
    ],
)
def test_faults(root, capsys, more, message):
    assert compare(root, *(word.format(root=root) for word in more)) == 2
    assert message in capsys.readouterr().err


def test_print_config_and_a_directory_that_is_no_run(root, capsys):
    assert compare(root, "judge.function=x.py:y", "--print-config") == 0
    assert f"{root}/a/model" in capsys.readouterr().out, "the model of a run"
    assert main(["compare", "a", "b", str(root)]) == 2
    assert "no config.yaml; expected a run's directory" in capsys.readouterr().err


def test_accuracy_of_a_reward_model(root, capsys):
    (root / "eval.yaml").write_text(f"model: {root}/rm\npreferences: {root}/held_out.jsonl\n")
    assert main(["eval", str(root / "eval.yaml"), "--out", str(root / "accuracy")]) == 0
    out = capsys.readouterr().out
    lines = (root / "accuracy" / "eval_samples.jsonl").read_text().splitlines()
    right = [s["scores"][0] > s["scores"][1] for s in map(json.loads, lines)]
    assert len(right) == 6 and f"accuracy   {100 * np.mean(right):.1f}% [" in out
    # The scores are those of the exported model, read once more by itself.
    model, params = load_reward(root / "rm")
    first = json.loads(lines[1])
    ids = np.array([[1, *map(TOKENS.index, first["prompt"] + first["responses"][0]), 2]], np.int32)
    positions = np.arange(ids.size, dtype=np.int32)[None]
    values = model.apply(params, ids, np.ones_like(ids), positions)
    assert first["scores"][0] == pytest.approx(float(values[0, -1]), abs=1e-5)


def test_a_reward_run_is_evaluated_on_its_own_held_out_data(root, capsys):
    run = root / "reward"
    run.mkdir()
    (run / "config.yaml").write_text(
        "phase: reward\nmodel: {compute_dtype: auto}\n"
        f"data: {{eval: {root}/held_out.jsonl, layout: auto, annotators: null, faulty: error,\n"
        "  text: {}, row_len: 24, overlong: drop}\n"
    )
    assert main(["eval", str(run), "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert f"{run}/model" in shown and "held_out.jsonl" in shown and "max_len: 24" in shown
