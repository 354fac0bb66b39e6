"""Problems that are read or made, the worked examples before them, and their digests."""

import json

import pytest

from alignjax.core.config import build, loads
from alignjax.core.errors import UserError
from alignjax.data import TextConfig
from alignjax.evals.arithmetic import Arithmetic, ArithmeticProblems, value
from alignjax.evals.problems import Problems, open_problems, shot_encoder
from alignjax.text import vocab_tokenizer
from tests.evals.bigram import TOKENS

TOKENIZER = vocab_tokenizer(TOKENS)
SHOTS = [{"q": "1+1", "a": "2"}, {"q": "2+2", "a": "4"}]


def text(**more):
    fields = {"prompt": "Q: {q}\nA:", "completion": " {a}", "reference": "a"}
    return TextConfig(fields={**fields, **more.pop("fields", {})}, **more)


def decoded(config, shots, record):
    problems = Problems(Records([record]), config.fields, None)
    encode = shot_encoder(config, shots, "\n\n", TOKENIZER)
    (task,) = problems.tasks(encode, max_tokens=500, overlong="error").values()
    return TOKENIZER.decode(task.tokens, skip_special=False)


class Records(list):
    def where(self, index):
        return f"here:{index + 1}"


def test_shots_as_plain_text():
    """Once BOS, and nothing between the last prompt and what the model says."""
    found = decoded(text(), SHOTS, {"q": "3+3", "a": "6"})
    assert found == "<bos>Q: 1+1\nA: 2\n\nQ: 2+2\nA: 4\n\nQ: 3+3\nA:"
    assert decoded(text(), [], {"q": "3+3", "a": "6"}) == "<bos>Q: 3+3\nA:"


def test_shots_as_turns_of_a_chat():
    found = decoded(text(chat=True, system="Add."), SHOTS[:1], {"q": "3+3", "a": "6"})
    assert found == (
        "<bos>System:\nAdd.\n\nUser:\nQ: 1+1\nA:\n\nAssistant:\n 2<eos>\n\nUser:\nQ: 3+3\nA:\n\n"
        "Assistant:\n"
    )


def test_a_problem_that_is_an_example_is_refused():
    with pytest.raises(UserError, match=r"here:1: the problem is shots\.1 as well"):
        decoded(text(), SHOTS, {"q": "2+2", "a": "4"})


def test_faults_of_shots():
    with pytest.raises(UserError, match=r"shots\.1: completion: no field 'a'"):
        decoded(text(), [SHOTS[0], {"q": "x"}], {"q": "3+3", "a": "6"})
    with pytest.raises(UserError, match=r"worked examples need text\.fields"):
        decoded(text(fields={"completion": None}), SHOTS, {"q": "3+3", "a": "6"})


def test_problems_need_no_completion():
    fields = {"completion": "worked", "reference": "a"}
    assert decoded(text(fields=fields), [{"q": "1+1", "worked": " 2"}], {"q": "3", "a": "3"})


def test_the_first_records_count_and_long_ones_are_left_out():
    records = Records([{"q": "1", "a": "1"}, {"q": "1" * 50, "a": "1"}, {"q": "2", "a": "2"}])
    problems = Problems(records, text().fields, 2)
    encode = shot_encoder(text(), [], "", TOKENIZER)
    assert list(problems.tasks(encode, max_tokens=20, overlong="drop")) == [0]
    with pytest.raises(UserError, match="here:2: 57 tokens, but only 20 fit"):
        problems.tasks(encode, max_tokens=20, overlong="error")
    with pytest.raises(UserError, match="every one of 2 prompts is longer than"):
        problems.tasks(encode, max_tokens=3, overlong="drop")


def test_a_digest_is_of_the_problem_alone():
    def digest(record, **fields):
        return Problems(Records([record]), text(fields=fields).fields, None).digest(0)

    one = digest({"q": "3+3", "a": "6"})
    assert one == digest({"q": "3+3", "a": "6", "id": 7})  # Another file of the same problems.
    assert one == digest({"question": "3+3", "a": "6"}, prompt="{question} =")
    assert one != digest({"q": "3+4", "a": "6"})
    assert one != digest({"q": "3+3", "a": "7"})
    assert one != digest({"q": "3+3", "a": 6})


def test_arithmetic_is_right_and_a_function_of_its_seed():
    config = build(Arithmetic, loads("generate: arithmetic\ncount: 400\nnum_terms: [2, 3, 4]"))
    problems = open_problems(config)
    records = [problems[i] for i in range(len(problems))]
    assert len({r["expression"] for r in records}) == 400
    for record in records:
        assert set(record["expression"]) <= set("0123456789+-* ")
        assert eval(record["expression"]) == int(record["answer"])  # Python's own precedence.
    lengths = [len(r["expression"].split()) for r in records]
    assert all(100 < lengths.count(n) < 170 for n in (3, 5, 7))
    again = ArithmeticProblems(config)
    assert [again[i] for i in range(400)] == records
    other = ArithmeticProblems(config.model_copy(update={"seed": 1}))
    assert other[0] != records[0]
    assert value([1, 2, 3], ["-", "*"]) == -5
    assert problems.where(0) == "arithmetic:problem 1"


def test_more_problems_than_there_are():
    config = Arithmetic(generate="arithmetic", count=20, num_terms=[2], operators=["+"], largest=3)
    with pytest.raises(UserError, match=r"data\.count=20: found 16 different problems; ask for"):
        ArithmeticProblems(config)


def test_data_may_be_a_file(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"q": "1", "a": "1"}) + "\n")
    assert len(open_problems(str(tmp_path / "d.jsonl"))) == 1
