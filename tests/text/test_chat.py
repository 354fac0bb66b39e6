"""Ids as transformers gives them; masks from hand and from its own `generation` blocks."""

import json

import pytest

from alignjax.core.errors import UserError
from alignjax.text import (
    ChatTemplate,
    encode_chat,
    encode_chat_prompt,
    encode_prompt,
    encode_prompt_completion,
    load_tokenizer,
    vocab_tokenizer,
)

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Naïve 🦜?"},
    {"role": "assistant", "content": "Yes.\nIt is."},
]
BOS_TEMPLATE = """{{ bos_token }}{% for message in messages %}
[{{ message['role'] }}]
{% if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}

{% else %}
{{ message['content'] }}
{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]
{% endif %}"""
TOY = ["<pad>", "<bos>", "<eos>", *map(chr, range(32, 127)), "ï", "\n", "\n\n"]


@pytest.fixture(scope="module")
def qwen3(real_data):
    return load_tokenizer(real_data / "tokenizers" / "qwen3")


@pytest.fixture(scope="module")
def theirs(real_data):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(real_data / "tokenizers" / "qwen3"))


@pytest.fixture(scope="module")
def toy():
    return vocab_tokenizer(TOY)


def trained_text(tokenizer, ids, mask):
    assert len(ids) == len(mask)
    trained = [i for i, on in zip(ids, mask, strict=True) if on]
    return tokenizer.decode(trained, skip_special=False)


@pytest.mark.parametrize("num_messages", [3, 5])
def test_qwen3_ids_are_those_of_transformers_and_the_last_turn_is_trained(
    qwen3, theirs, num_messages
):
    talk = TALK[:num_messages]
    ids, mask = encode_chat(qwen3, ChatTemplate(qwen3), talk, train_on="last")
    assert ids == theirs.apply_chat_template(talk, return_dict=False)
    expected = f"<think>\n\n</think>\n\n{talk[-1]['content']}<|im_end|>"
    assert trained_text(qwen3, ids, mask) == expected
    first = mask.index(True)
    assert ids[:first] == encode_chat_prompt(qwen3, ChatTemplate(qwen3), talk[:-1])
    assert mask[-1] is False  # The newline after <|im_end|> is never said by the model.


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_qwen3_prompt_is_that_of_transformers(qwen3, theirs, variables):
    ids = encode_chat_prompt(qwen3, ChatTemplate(qwen3), TALK[:2], **variables)
    assert ids == theirs.apply_chat_template(
        TALK[:2], add_generation_prompt=True, return_dict=False, **variables
    )


def test_qwen3_tools_are_rendered_as_transformers_does(qwen3, theirs):
    tools = [{"type": "function", "function": {"name": "f", "description": "a < b & é"}}]
    call = {"function": {"name": "f", "arguments": {"x": "é"}}}
    talk = [TALK[1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    ids, mask = encode_chat(qwen3, ChatTemplate(qwen3), talk, tools=tools)
    assert ids == theirs.apply_chat_template(talk, tools=tools, return_dict=False)
    assert trained_text(qwen3, ids, mask).endswith('"é"}}\n</tool_call><|im_end|>')


def test_a_template_that_rewrites_earlier_turns_cannot_train_them(qwen3):
    with pytest.raises(UserError, match=r'messages\[2\].*train_on="each".*train_on="last"'):
        encode_chat(qwen3, ChatTemplate(qwen3), TALK)


def test_template_with_bos_and_generation_blocks_agrees_with_transformers(qwen3, theirs):
    """transformers takes the mask from {% generation %} blocks, we from prefixes: the same mask."""
    ids, mask = encode_chat(qwen3, ChatTemplate(qwen3, BOS_TEMPLATE), TALK)
    other = theirs.apply_chat_template(
        TALK, chat_template=BOS_TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == other["input_ids"]
    assert [int(on) for on in mask] == other["assistant_masks"]
    assert trained_text(qwen3, ids, mask) == "It is 4.<|im_end|>Yes.\nIt is.<|im_end|>"


def test_one_bos_with_a_template_that_writes_it(toy, tmp_path):
    transformers = pytest.importorskip("transformers")
    toy.save(str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    talk = [{**message, "content": message["content"][:6]} for message in TALK[:3]]
    ids, mask = encode_chat(toy, ChatTemplate(toy, BOS_TEMPLATE), talk)
    assert ids == theirs.apply_chat_template(talk, chat_template=BOS_TEMPLATE, return_dict=False)
    assert ids.count(toy.bos_id) == 1
    assert ids[0] == toy.bos_id
    assert trained_text(toy, ids, mask) == "It is<eos>"
    with pytest.raises(UserError, match="two BOS"):
        encode_chat_prompt(toy, ChatTemplate(toy, "{{ bos_token }}" + BOS_TEMPLATE), talk)


def test_built_in_template_trains_every_turn_with_its_eos(toy):
    talk = [{**message, "content": message["content"][:4]} for message in TALK[1:]]
    ids, mask = encode_chat(toy, ChatTemplate(toy), talk)
    assert toy.decode(ids, skip_special=False) == (
        "<bos>User:\n2+2?\n\nAssistant:\nIt i<eos>\n\nUser:\nNaïv\n\nAssistant:\nYes.<eos>\n\n"
    )
    assert trained_text(toy, ids, mask) == "It i<eos>Yes.<eos>"
    assert encode_chat(toy, ChatTemplate(toy), talk, train_on="last")[1].count(True) == 5


def test_the_prompt_ends_exactly_where_the_assistant_begins_even_inside_a_token(toy):
    """A newline of the prompt and one of the answer would be one token if they stood together."""
    talk = [TALK[1], {"role": "assistant", "content": "\nx"}]
    ids, mask = encode_chat(toy, ChatTemplate(toy), talk)
    start = mask.index(True)
    assert ids[:start] == encode_chat_prompt(toy, ChatTemplate(toy), talk[:1])
    assert [TOY[i] for i in ids[start : start + 3]] == ["\n", "x", "<eos>"]


def test_a_template_that_closes_the_conversation_with_one_more_eos(toy):
    """As Phi-3's does: what follows a turn differs, the turn does not."""
    source = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% else %}{{ pad_token }}{% endif %}"
    )
    talk = [TALK[1], TALK[2], TALK[1], TALK[2]]
    ids, mask = encode_chat(toy, ChatTemplate(toy, source), talk)
    assert trained_text(toy, ids, mask) == "It is 4.<eos>It is 4.<eos>\n<pad>"


def test_a_template_without_an_end_of_turn_is_refused(toy):
    source = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(UserError, match="never learn to stop"):
        encode_chat(toy, ChatTemplate(toy, source), TALK[1:3])


def test_a_generation_prompt_that_is_no_prefix_is_refused(toy):
    source = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}>>{% endif %}"
    )
    with pytest.raises(UserError, match=r"messages\[1\].*no prefix"):
        encode_chat(toy, ChatTemplate(toy, source), TALK[1:3])


def test_nothing_to_train_on(toy):
    with pytest.raises(UserError, match="assistant"):
        encode_chat(toy, ChatTemplate(toy), TALK[:2])


def test_templates_are_sandboxed_and_their_errors_are_the_users(toy):
    talk = TALK[1:2]
    for source in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}"):
        with pytest.raises(UserError, match="chat template"):
            ChatTemplate(toy, source).render(talk)
    with pytest.raises(UserError, match=r"roles must alternate \(roles: user\)"):
        ChatTemplate(toy, "{{ raise_exception('roles must alternate') }}").render(talk)
    with pytest.raises(UserError, match="chat template, line 2"):
        ChatTemplate(toy, "\n{% for %}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ range(10**7) }}", "OverflowError: "),
        ("{{ 'x'.index('y') }}", "ValueError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
        ("{{ messages | tojson(default=range) }}", ""),
    ],
)
def test_whatever_a_template_does_is_the_templates_fault(toy, source, message):
    with pytest.raises(UserError, match=rf"^chat template: {message}.*\(roles: user\)$"):
        ChatTemplate(toy, source).render([{"role": "user", "content": {1, 2}}])


def test_a_tool_call_without_content(toy):
    talk = [TALK[1], {"role": "assistant", "content": None, "tool_calls": [{}]}]
    text = ChatTemplate(toy).render(talk)
    assert text == "<bos>User:\n2+2?\n\nAssistant:\n<eos>\n\n"


def test_two_bos_in_a_conversation_to_train_on(toy):
    template = ChatTemplate(toy, "{{ bos_token }}" + BOS_TEMPLATE)
    with pytest.raises(UserError, match="two BOS"):
        encode_chat(toy, template, TALK[1:3])


def test_where_bos_is_eos_a_text_may_begin_with_two():
    tokenizer = vocab_tokenizer(TOY, bos="<eos>")
    twice = [tokenizer.eos_id] * 2
    assert encode_prompt(tokenizer, "<eos><eos>1")[:2] == twice
    template = ChatTemplate(tokenizer, "{{ bos_token }}{{ eos_token }}1")
    assert encode_chat_prompt(tokenizer, template, TALK[1:2])[:2] == twice


def test_variables_that_do_not_fit_the_messages_are_named(qwen3):
    talk = [TALK[1], {"role": "assistant", "content": "<think>\nso\n</think>\n\n4"}]
    template = ChatTemplate(qwen3)
    encode_chat(qwen3, template, talk)
    with pytest.raises(UserError, match=r"leave out template_variables \(enable_thinking\)"):
        encode_chat(qwen3, template, talk, train_on="last", enable_thinking=False)


def test_functions_that_templates_of_the_hub_call(toy):
    render = ChatTemplate(
        toy,
        "{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}"
        "{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y') | length }}{{ tools is defined }}",
    ).render
    assert render([]) == "13" + json.dumps({"a": "<é>"}, ensure_ascii=False) + "4False"
    assert render([], tools=[]).endswith("True")


def test_prompt_and_completion(toy):
    ids, mask = encode_prompt_completion(toy, "1+1=", "2")
    assert [TOY[i] for i in ids] == ["<bos>", "1", "+", "1", "=", "2", "<eos>"]
    assert mask == [False] * 5 + [True, True]
    assert ids[:5] == encode_prompt(toy, "1+1=")


def test_prompt_and_completion_never_doubles_bos_or_eos(toy):
    expected = encode_prompt_completion(toy, "1+1=", "2")
    assert encode_prompt_completion(toy, "<bos>1+1=", "2<eos>") == expected
    document = encode_prompt_completion(toy, "", "2")
    assert [TOY[i] for i in document[0]] == ["<bos>", "2", "<eos>"]
    assert document[1] == [False, True, True]
    assert encode_prompt_completion(toy, "", "<bos>2<eos>") == document
    with pytest.raises(UserError, match="two BOS"):
        encode_prompt(toy, "<bos><bos>1")


def test_without_bos_the_first_token_of_a_document_is_no_target(toy):
    ids, mask = encode_prompt_completion(toy, "", "12", add_bos=False)
    assert [TOY[i] for i in ids] == ["1", "2", "<eos>"]
    assert mask == [False, True, True]
    assert encode_prompt_completion(toy, "1", "2", add_eos=False)[1] == [False, False, True]


def test_prompt_ids_do_not_depend_on_the_completion(toy):
    ids, mask = encode_prompt_completion(toy, "a\n", "\nb")
    assert ids[: mask.index(True)] == encode_prompt(toy, "a\n")
    assert TOY[ids[mask.index(True)]] == "\n"  # Not "\n\n".
