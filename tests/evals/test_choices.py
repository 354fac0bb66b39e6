"""Questions with options: log-probs and letters of a model that is known by hand."""

import json

import numpy as np
import pytest

from alignjax.core.config import build, loads
from alignjax.core.errors import UserError
from alignjax.evals.choices import (
    ChoiceConfig,
    chosen,
    evaluate_choices,
    with_choices,
    write_choices,
)
from tests.evals import bigram

CONFIG = """
kind: choices
model: {root}/model
data: {root}/questions.jsonl
text: {{fields: {{prompt: "{{question}}\\n{{listed}}\\n:", reference: letter}}}}
candidate: "{{letter}}"
max_prompt_tokens: 48
max_tokens: 2
num_samples: 2
temperature: 0.0
"""
QUESTIONS = [
    {"question": "q", "choices": ["xx", "y"], "answer": 1},
    {"question": "r", "choices": ["y", "xxx", "z"], "answer": "A"},
    {"question": "s", "choices": ["z", "y", "xx"], "answer": "A"},
]
# After ":" B is likeliest, then A, then C and the texts; a letter ends the answer.
LOGITS = bigram.table(
    {(":", "B"): 9, (":", "A"): 8, (":", "y"): 3, (":", "x"): 2.5, ("x", "x"): 8}
    | {(letter, "<eos>"): 20 for letter in "ABC"}
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choices")
    bigram.write(folder / "model", LOGITS)
    lines = "".join(json.dumps(q) + "\n" for q in QUESTIONS)
    (folder / "questions.jsonl").write_text(lines)
    return folder


def config(root, *overrides):
    return build(ChoiceConfig, loads(CONFIG.format(root=root), overrides))


@pytest.fixture(scope="module")
def letters(root):
    return evaluate_choices(config(root))


def test_letters_by_log_prob_and_by_what_is_said(letters):
    for found, question in zip(letters.logps, QUESTIONS, strict=True):
        expected = [bigram.logp(LOGITS, ":", "ABC"[i]) for i in range(len(question["choices"]))]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    figures = letters.as_json()
    # It always prefers B, and says so: right of the first question alone.
    assert figures["accuracy"]["mean"] == figures["pass@1"]["mean"] == pytest.approx(1 / 3)
    assert figures["accuracy_per_token"] == figures["accuracy"]
    assert [s.completion for s in letters.said.rollouts.samples] == ["B"] * 6
    assert figures["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 3) / 3)
    assert (figures["num_problems"], figures["num_samples"]) == (3, 2)
    assert figures["no_letter_frac"] == 0.0


def test_texts_by_log_prob_whole_and_per_token(root):
    found = evaluate_choices(config(root, "candidate='{option}'", "generate=false"))
    for logps, question in zip(found.logps, QUESTIONS, strict=True):
        expected = [bigram.logp(LOGITS, ":", text) for text in question["choices"]]
        np.testing.assert_allclose(logps, expected, atol=1e-5)
    # y beats xx as a whole; per token xx beats y, since an x after an x is cheap.
    assert chosen(found.logps, [1, 0, 0]).tolist() == [1, 1, 0]
    estimates = found.estimates
    assert estimates["accuracy"].values.tolist() == [1, 1, 0]
    assert estimates["accuracy_per_token"].values.tolist() == [0, 0, 0]
    assert set(estimates) == {"accuracy", "accuracy_per_token"}


def test_a_letter_that_is_no_option_is_wrong_and_counted(root):
    # The place finds the last letter before EOS: here always the "q" of nowhere.
    found = evaluate_choices(config(root, "answer=regex:(Q)"))
    assert found.as_json()["pass@1"]["mean"] == 0.0
    assert found.as_json()["no_letter_frac"] == 1.0


def test_worked_examples_stand_before_each(root):
    shots = "shots=[{question: t, choices: [u, v], answer: 0}]"
    fields = 'text.fields={prompt: "{question}\\n{listed}\\n:", completion: "{letter}!"}'
    found = evaluate_choices(config(root, shots, fields, "num_samples=1"))
    prompts = [s.prompt for s in found.said.rollouts.samples]
    assert prompts[0] == "t\nA. u\nB. v\n:A!\n\nq\nA. xx\nB. y\n:"
    with pytest.raises(UserError, match=r"shots\.0: options: no field 'choices'"):
        evaluate_choices(config(root, "shots=[{question: t, answer: 0}]"))
    same = "shots=[{question: q, choices: [xx, y], answer: 1}]"
    with pytest.raises(UserError, match=r"questions.jsonl:1: the problem is shots.0 as well"):
        evaluate_choices(config(root, same, fields))


def test_files(letters, tmp_path):
    write_choices(letters, tmp_path)
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert figures["provenance"]["data"]["num_problems"] == 3
    problems = [json.loads(x) for x in (tmp_path / "eval_problems.jsonl").open()]
    assert [p["accuracy"] for p in problems] == [1, 0, 0]
    samples = [json.loads(x) for x in (tmp_path / "eval_samples.jsonl").open()]
    assert samples[1]["letter"] == "A" and samples[1]["completions"] == ["B", "B"]
    assert len(samples[1]["logps"]) == 3


def test_options_of_equal_score_share_it():
    scores = [np.array([1.0, 2.0, 2.0]), np.array([3.0, 3.0]), np.array([0.0, -1.0])]
    assert chosen(scores, [1, 0, 1]).tolist() == [0.5, 0.5, 0.0]


def test_options_inside_a_section():
    record = {"question": "q", "choices": {"text": ["a", "b"]}, "key": 0}
    found = with_choices(record, "choices.text", "key")
    assert (found["listed"], found["letter"], found["option"]) == ("A. a\nB. b", "A", "a")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "q", "choices": ["a"], "answer": 0}, "1 of them; expected 2 to 26"),
        ({"question": "q", "choices": ["a", "a"], "answer": 0}, "'a' stands there twice"),
        ({"question": "q", "choices": "ab", "answer": 0}, "expected a list of texts, came str"),
        ({"question": "q", "choices": ["a", " "], "answer": 0}, "expected a list of texts"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2},
         "expected a number from 0 to 1 or a letter from A to B, came int 2"),
        ({"question": "q", "choices": ["a", "b"], "answer": "C"}, "a letter from A to B"),
        ({"question": "q", "choices": ["a", "b"], "answer": "1"}, "came str '1'"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "came bool True"),
        ({"question": "q", "choices": ["a", "b"]},
         "label: no field 'answer' (fields there: 'question', 'choices')"),
        ({"choices": ["a", "b"], "answer": 0}, "prompt: no field 'question'"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(root, tmp_path, line, message):
    lines = [QUESTIONS[0], line]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    with pytest.raises(UserError) as caught:
        evaluate_choices(config(root, f"data={tmp_path}/bad.jsonl"))
    assert str(caught.value).startswith(f"{tmp_path}/bad.jsonl:2: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("candidate=x", "candidate: 'x': expected {letter}, {option} or both"),
        ("candidate='{answer}'", "expected {letter}, {option} or both"),
        ("candidate='{'", "is no template"),
        ("answer=nope", "answer: place='nope'; expected one of"),
        ("kind=answers", "kind: expected 'choices'"),
    ],
)
def test_config_is_checked(root, override, message):
    with pytest.raises(UserError) as caught:
        config(root, override)
    assert message in str(caught.value)
