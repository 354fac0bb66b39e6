"""Records -> examples, and the message for each fault of a record or of the config."""

import pytest
from pydantic import ValidationError

from alignjax.core.errors import UserError
from alignjax.data import Example, Examples, Fields

GSM8K = {"question": "2+2?", "answer": "Two and two.\n#### 1\nNo.\n#### 4 ", "id": 7}


class Listed:
    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]

    def where(self, index):
        return f"train.jsonl:{index + 1}"


def one(record, **fields) -> Example:
    return Examples(Listed([record]), Fields(**fields))[0]


def test_keys_templates_reference_and_what_is_left():
    example = one(
        GSM8K,
        prompt="Question: {question}\nAnswer {{n}} {id}:",
        completion="answer",
        reference="answer",
        reference_pattern="#### (.+)",
    )
    assert example.prompt == "Question: 2+2?\nAnswer {n} 7:"
    assert example.completion == GSM8K["answer"]
    assert example.reference == "4"
    assert example.fields == {}
    assert one(GSM8K, prompt="question").fields == {"answer": GSM8K["answer"], "id": 7}


def test_reference_by_key_keeps_its_type_and_no_field_hides_an_argument_of_a_reward():
    record = {"q": "x", "reference": [1, 2], "prompt": "y", "level": 3}
    example = one(record, prompt="q", reference="reference")
    assert example.reference == [1, 2]
    assert example.fields == {"level": 3}


def test_braces_in_the_data_are_text():
    assert one({"q": "{0} {q.x}", "a": "}"}, prompt="{q}|{a}").prompt == "{0} {q.x}|}"


def test_messages():
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    example = one({"talk": talk, "level": 1}, messages="talk")
    assert example.messages == talk
    assert (example.prompt, example.completion, example.fields) == (None, None, {"level": 1})


@pytest.mark.parametrize(
    ("record", "fields", "message"),
    [
        (
            {"questoin": "x", "n": 1},
            {"prompt": "question"},
            "train.jsonl:2: prompt: no field 'question'; did you mean 'questoin'? "
            "(fields there: 'questoin', 'n')",
        ),
        ({}, {"prompt": "{question}"}, "prompt: no field 'question' (fields there: none)"),
        ({"question": "x"}, {"prompt": "{question.__class__}"}, "no field 'question.__class__'"),
        (
            {"question": ["x"]},
            {"prompt": "question"},
            "prompt: field 'question': expected text or a number, came list ['x']",
        ),
        ({"question": None}, {"prompt": "question"}, "expected text or a number, came nothing"),
        ({"question": True}, {"prompt": "question"}, "came bool True"),
        (
            {"question": "q", "a": "none"},
            {"prompt": "question", "reference": "a", "reference_pattern": "#### (.+)"},
            "reference: '#### (.+)' matches nothing in 'none'",
        ),
        (
            {"question": "q", "a": "x" * 10_000},
            {"prompt": "question", "reference": "a", "reference_pattern": "#### (.+)"},
            f"matches nothing in '{'x' * 56}...",
        ),
        ({"m": "hello"}, {"messages": "m"}, "expected a list of messages, came str 'hello'"),
        ({"m": []}, {"messages": "m"}, "expected a list of messages"),
        ({"m": [{"content": "x"}]}, {"messages": "m"}, "field 'm'[0]: expected {"),
        ({"m": [{"role": "bot", "content": "x"}]}, {"messages": "m"}, "[0].role: expected one of"),
        ({"m": [{"role": "user"}]}, {"messages": "m"}, "[0].content: expected text, came nothing"),
    ],
)
def test_a_bad_record_is_found_before_anything_is_trained(record, fields, message):
    good = {
        "question": "q",
        "question.__class__": "q",
        "a": "#### 1",
        "m": [{"role": "user", "content": "x"}],
    }
    with pytest.raises(UserError) as error:
        Examples(Listed([good, record]), Fields(**fields))
    assert message in str(error.value)
    assert str(error.value).startswith("train.jsonl:2: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give prompt, completion or messages"),
        ({"prompt": "q", "messages": "m"}, "give either"),
        ({"prompt": "q", "reference_pattern": "(a)"}, "reference_pattern needs reference"),
        ({"prompt": "q", "reference": "a", "reference_pattern": "("}, "not a regular expression"),
        ({"prompt": "q", "reference": "a", "reference_pattern": "a"}, "one group"),
        ({"prompt": "{q!r}"}, "expected {key}"),
        ({"prompt": "{}"}, "expected {key}"),
        ({"prompt": "{q"}, "expected"),
        ({"prompt": ""}, "expected the name of a key"),
        ({"promt": "q"}, "promt"),
    ],
)
def test_a_bad_config_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message.replace("{", r"\{").replace("(", r"\(")):
        Fields(**fields)
