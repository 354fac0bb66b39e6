"""Examples -> tokens and masks: plain text, conversations, prompts, and nothing to train."""

import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.data import Example, Fields, TextConfig, prompt_encoder, sequence_encoder
from alignjax.text import vocab_tokenizer

TOKENS = ["<pad>", "<bos>", "<eos>", *map(chr, range(32, 127)), "\n"]
TOKENIZER = vocab_tokenizer(TOKENS)
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]
PLAIN = Fields(prompt="p", completion="c")


def text(ids):
    return "".join(TOKENS[i] for i in ids)


def sequence(example, **config):
    return sequence_encoder(TextConfig(**({"fields": PLAIN} | config)), TOKENIZER)(example)


def prompt(example, **config):
    return prompt_encoder(TextConfig(**({"fields": PLAIN} | config)), TOKENIZER)(example)


def test_prompt_and_completion():
    example = Example(prompt="1+1=", completion="2")
    out = sequence(example)
    assert {key: value.dtype for key, value in out.items()} == {"tokens": np.int32, "mask": bool}
    assert text(out["tokens"]) == "<bos>1+1=2<eos>"
    assert text(out["tokens"][out["mask"]]) == "2<eos>"
    assert prompt(example).dtype == np.int32
    assert text(prompt(example)) == "<bos>1+1="
    assert text(prompt(example, add_bos=False)) == "1+1="
    bare = sequence(example, add_bos=False, add_eos=False)
    assert text(bare["tokens"]) == "1+1=2"
    assert text(bare["tokens"][bare["mask"]]) == "2"


def test_document_trains_all_but_its_first_token():
    out = sequence(Example(completion="12"))
    assert text(out["tokens"]) == "<bos>12<eos>"
    assert out["mask"].tolist() == [False, True, True, True]


def test_conversation(tmp_path):
    example, fields = Example(messages=TALK), Fields(messages="m")
    for train_on, expected in (("all", "b<eos>d<eos>"), ("last", "d<eos>")):
        out = sequence(example, fields=fields, train_on=train_on)
        assert text(out["tokens"][out["mask"]]) == expected
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.content }};{% endfor %}")
    got = prompt(Example(messages=TALK), fields=fields, chat_template=str(template))
    assert text(got) == "a;b;c;", "the answer to come is not part of the prompt"


def test_template_variables_reach_the_template_for_training_and_for_prompts(tmp_path):
    template = tmp_path / "mood.jinja"
    template.write_text(
        "{{ mood }}:{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    options = {
        "fields": Fields(messages="m"), "chat_template": str(template),
        "template_variables": {"mood": "glad"},
    }  # fmt: skip
    example = Example(messages=TALK[:2])
    assert text(sequence(example, **options)["tokens"]) == "glad:a<eos>b<eos>"
    assert text(prompt(example, **options)) == "glad:a<eos>"


def test_a_prompt_ends_before_all_of_the_last_answers():
    two = [*TALK[:2], {"role": "assistant", "content": "more"}]
    got = prompt(Example(messages=two), fields=Fields(messages="m"))
    assert text(got) == "<bos>User:\na\n\nAssistant:\n"


def test_chat_wraps_prompt_and_completion_into_messages():
    example = Example(prompt="a", completion="b")
    wrapped = sequence(example, chat=True, system="s")
    start = "<bos>System:\ns\n\nUser:\na\n\nAssistant:\n"
    assert text(wrapped["tokens"]) == start + "b<eos>\n\n"
    assert text(wrapped["tokens"][wrapped["mask"]]) == "b<eos>"
    assert text(prompt(example, chat=True, system="s")) == start


def test_nothing_to_encode():
    with pytest.raises(UserError, match="no completion to train on"):
        sequence(Example(prompt="x"))
    with pytest.raises(UserError, match="no prompt"):
        prompt(Example(completion="x"))
    with pytest.raises(UserError, match=r"no such file: gone\.jinja"):
        prompt(Example(prompt="x"), chat=True, chat_template="gone.jinja")
