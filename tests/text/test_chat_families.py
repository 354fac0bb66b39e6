"""Masks by hand for templates written as each family has them, and for the real Qwen3."""

import itertools
import unicodedata

import pytest

from alignjax.core.errors import UserError
from alignjax.data import Example, Examples, Fields, TextConfig, Turns, sequence_encoder
from alignjax.text import (
    ChatTemplate,
    encode_chat,
    encode_chat_prompt,
    load_tokenizer,
    turns,
    vocab_tokenizer,
)

SPECIAL = [
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
    "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
]  # fmt: skip
LETTERS = [*map(chr, range(32, 127)), "\n"]

LLAMA_3 = """{{ bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' -}}
{% endfor %}{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{% endif %}"""
LLAMA_2 = """{% set system = '' %}{% set rest = messages %}
{%- if messages[0].role == 'system' %}
{%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}
{%- set rest = messages[1:] %}
{%- endif %}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}
{%- endif %}
{%- if m.role == 'user' %}
{{- bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}
{%- else %}
{{- ' ' + m.content + ' ' + eos_token }}
{%- endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for m in messages %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '[INST] ' }}
{%- if loop.index0 == 1 and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}
{%- endif %}
{{- m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}
{{- ' ' + m.content + eos_token }}
{%- endif %}
{%- endfor %}"""
CHATML = """{% for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
PHI_3 = """{% for m in messages %}
{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}
{%- else %}{{ eos_token }}{% endif %}"""
ZEPHYR = """{% for m in messages %}
{{ '<|' + m.role + '|>\n' + m.content + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

TALK = [
    {"role": "system", "content": "S."},
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c d"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "f\n"},
    {"role": "user", "content": "g"},
    {"role": "assistant", "content": "h"},
]
# Each with what is trained in the three turns, and the whole text up to the first of them.
FAMILIES = {
    "llama_3": (
        LLAMA_3, True, ["c d<|eot_id|>", "f<|eot_id|>", "h<|eot_id|>"],
        "<s><|start_header_id|>system<|end_header_id|>\n\nS.<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\na b<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "llama_2": (
        LLAMA_2, True, [" c d </s>", " f\n </s>", " h </s>"],
        "<s>[INST] <<SYS>>\nS.\n<</SYS>>\n\na b [/INST]",
    ),
    "gemma": (
        GEMMA, False, ["c d<end_of_turn>", "f<end_of_turn>", "h<end_of_turn>"],
        "<s><start_of_turn>user\na b<end_of_turn>\n<start_of_turn>model\n",
    ),
    "mistral": (
        MISTRAL, True, [" c d</s>", " f\n</s>", " h</s>"], "<s>[INST] S.\n\na b [/INST]",
    ),
    "chatml": (
        CHATML, True, ["c d<|im_end|>", "f\n<|im_end|>", "h<|im_end|>"],
        "<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\na b<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "phi_3": (
        PHI_3, True, ["c d<|end|>", "f\n<|end|>", "h<|end|>\n</s>"],
        "<|system|>\nS.<|end|>\n<|user|>\na b<|end|>\n<|assistant|>\n",
    ),
    "zephyr": (
        ZEPHYR, True, ["c d</s>", "f\n</s>", "h</s>"],
        "<|system|>\nS.</s>\n<|user|>\na b</s>\n<|assistant|>\n",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def toy():
    tokens = ["<pad>", "<s>", "</s>", *SPECIAL, *LETTERS]
    tokenizer = vocab_tokenizer(tokens, bos="<s>", eos="</s>")
    tokenizer._tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def spans(tokenizer, ids, mask):
    """The text of each run of trained tokens."""
    assert len(ids) == len(mask)
    return [
        tokenizer.decode([i for i, _ in run], skip_special=False)
        for on, run in itertools.groupby(zip(ids, mask, strict=True), lambda pair: pair[1])
        if on
    ]


def each(tokenizer, messages, **config):
    """What `train_on="each"` makes of a conversation: (ids, mask) of each sequence."""
    config = TextConfig(fields=Fields(messages="m"), train_on="each", **config)

    class One:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return Example(messages=messages)

        def where(self, index):
            return "a.jsonl:1"

    source, encode = Turns(One()), sequence_encoder(config, tokenizer)
    return [
        (out["tokens"].tolist(), out["mask"].tolist())
        for out in (encode(source[i]) for i in range(len(source)))
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_turn_of_a_family_is_trained_with_its_end_and_nothing_else(toy, name):
    source, has_system, expected, start = FAMILIES[name]
    template = ChatTemplate(toy, source)
    talk = TALK if has_system else TALK[1:]
    ids, mask = encode_chat(toy, template, talk)
    assert toy.decode(ids, skip_special=False) == template.render(talk)
    assert spans(toy, ids, mask) == expected
    assert toy.decode(ids[: mask.index(True)], skip_special=False) == start
    assert ids[:2].count(toy.bos_id) <= 1
    places = turns(talk)
    starts = [n for n, on in enumerate(mask) if on and not mask[n - 1]]
    for place, at in zip(places, starts, strict=True):
        assert ids[:at] == encode_chat_prompt(toy, template, talk[:place])
    last_ids, last_mask = encode_chat(toy, template, talk, train_on="last")
    assert last_ids == ids and spans(toy, last_ids, last_mask) == expected[-1:]
    assert last_mask.index(True) == starts[-1]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_turn_of_a_family_as_a_sequence_of_its_own(toy, name, tmp_path):
    source, has_system, expected, _ = FAMILIES[name]
    talk = TALK if has_system else TALK[1:]
    path = tmp_path / "t.jinja"
    path.write_text(source)
    found = each(toy, talk, chat_template=str(path))
    assert len(found) == 3
    for (ids, mask), text, place in zip(found, expected, turns(talk), strict=True):
        closed = text if name != "phi_3" else text.removesuffix("\n</s>") + "\n</s>"
        assert spans(toy, ids, mask) == [closed]
        rendered = ChatTemplate(toy, source).render(talk[: place + 1])
        assert toy.decode(ids, skip_special=False) == rendered


def test_what_a_template_refuses_is_the_users_to_mend(toy):
    with pytest.raises(UserError, match=r"no system role \(roles: system user"):
        encode_chat(toy, ChatTemplate(toy, GEMMA), TALK)
    with pytest.raises(UserError, match=r"roles must alternate \(roles: user user"):
        encode_chat(toy, ChatTemplate(toy, LLAMA_2), [TALK[1], *TALK[1:3]])


def test_text_after_the_last_special_token_is_never_left_out_in_silence(toy):
    """A special token within the answer is not its end."""
    source = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    talk = [TALK[1], {"role": "assistant", "content": "<|im_start|>so</s>4"}]
    with pytest.raises(UserError, match=r"messages\[1\].*never learn to stop"):
        encode_chat(toy, ChatTemplate(toy, source), talk)


# --- the real Qwen3 -------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
PLAIN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Naïve 🦜?"},
    {"role": "assistant", "content": "Yes.\nIt is."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "  Quite  "},
]
THOUGHTS = ["one and one", "a bird\n\nis one", "hm"]
EMPTY = "<think>\n\n</think>\n\n"


def thinking(kind):
    """PLAIN, with a thought in each turn of the assistant, in a field of its own or in line."""
    thoughts = iter(THOUGHTS)
    talk = []
    for message in PLAIN:
        if message["role"] == "assistant" and kind == "field":
            message = message | {"reasoning_content": next(thoughts)}
        elif message["role"] == "assistant":
            content = f"<think>\n{next(thoughts)}\n</think>\n\n{message['content'].lstrip()}"
            message = message | {"content": content}
        talk.append(message)
    return talk


@pytest.fixture(scope="module")
def qwen3(real_data):
    return load_tokenizer(real_data / "tokenizers" / "qwen3")


@pytest.fixture(scope="module")
def theirs(real_data):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(real_data / "tokenizers" / "qwen3"))


def check_each(qwen3, theirs, talk, expected, **variables):
    found = each(qwen3, talk, template_variables=variables)
    template = ChatTemplate(qwen3)
    for (ids, mask), text, place in zip(found, expected, turns(talk), strict=True):
        assert spans(qwen3, ids, mask) == [text]
        start = mask.index(True)
        assert ids[:start] == encode_chat_prompt(qwen3, template, talk[:place], **variables)
        whole = theirs.apply_chat_template(talk[: place + 1], return_dict=False, **variables)
        assert ids == whole
        assert mask[start:] == [True] * (len(ids) - start - 1) + [False]  # The newline at the end.


def test_qwen3_trains_each_of_three_turns_without_thoughts(qwen3, theirs):
    with pytest.raises(UserError, match=r'messages\[2\].*train_on="each"'):
        encode_chat(qwen3, ChatTemplate(qwen3), PLAIN)
    expected = [
        f"{EMPTY}Two.<|im_end|>", f"{EMPTY}Yes.\nIt is.<|im_end|>", f"{EMPTY}  Quite  <|im_end|>",
    ]  # fmt: skip
    check_each(qwen3, theirs, PLAIN, expected)


@pytest.mark.parametrize("kind", ["field", "inline"])
def test_qwen3_trains_each_of_three_turns_with_its_thoughts(qwen3, theirs, kind):
    expected = [
        "<think>\none and one\n</think>\n\nTwo.<|im_end|>",
        "<think>\na bird\n\nis one\n</think>\n\nYes.\nIt is.<|im_end|>",
        "<think>\nhm\n</think>\n\nQuite  <|im_end|>",
    ]
    if kind == "field":
        # The template strips newlines only, and so keeps the spaces of the field.
        expected[2] = "<think>\nhm\n</think>\n\n  Quite  <|im_end|>"
    talk = thinking(kind)
    check_each(qwen3, theirs, talk, expected)
    last = each(qwen3, talk)[-1][0]
    text = qwen3.decode(last, skip_special=False)
    assert "one and one" not in text and "Two." in text  # Earlier thoughts are taken out.


def test_qwen3_without_thinking_trains_the_answer_alone(qwen3, theirs):
    """enable_thinking=False: the generation prompt has closed the thought already."""
    expected = ["Two.<|im_end|>", "Yes.\nIt is.<|im_end|>", "  Quite  <|im_end|>"]
    check_each(qwen3, theirs, PLAIN, expected, enable_thinking=False)


def test_qwen3_tool_calls_and_their_results(qwen3, theirs):
    calls = {"tool_calls": [CALL, CALL], "reasoning_content": "call"}
    talk = [
        PLAIN[0],
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "", **calls},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "3.", "reasoning_content": "so"},
        {"role": "user", "content": "More?"},
        {"role": "assistant", "content": "No."},
    ]  # fmt: skip
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    expected = [
        f"<think>\ncall\n</think>\n\n{call}\n{call}<|im_end|>",
        "<think>\nso\n</think>\n\n3.<|im_end|>",
        f"{EMPTY}No.<|im_end|>",
    ]
    check_each(qwen3, theirs, talk, expected, tools=TOOLS)
    # Up to the second question no turn is rewritten: all at once is the same.
    ids, mask = encode_chat(qwen3, ChatTemplate(qwen3), talk[:6], tools=TOOLS)
    assert spans(qwen3, ids, mask) == expected[:2]
    text = qwen3.decode(ids, skip_special=False)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    results = "\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response>"
    assert f"<|im_start|>user{results}<|im_end|>" in text


def test_tools_of_a_record_reach_the_template(qwen3):
    talk = PLAIN[:3]

    class Records:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {"talk": talk, "tools": [TOOLS, None][index]}

        def where(self, index):
            return f"a.jsonl:{index + 1}"

    fields = Fields(messages="talk", tools="tools")
    encode = sequence_encoder(TextConfig(fields=fields, train_on="each"), qwen3)
    with_tools, without = map(encode, Turns(Examples(Records(), fields)))
    expected = encode_chat(qwen3, ChatTemplate(qwen3), talk, tools=TOOLS)[0]
    assert with_tools["tokens"].tolist() == expected
    assert without["tokens"].tolist() == encode_chat(qwen3, ChatTemplate(qwen3), talk)[0]


NASTY = [
    "", " ", "  leading and trailing  ", "\n\n\n a\r\n\tb", "x" + " " * 60 + "y",
    "\u00a0\u2028\u200b|",
    "日本語 naïve e\u0301 \U0001f9d1\u200d\U0001f680 🦜🏽", "<|im_start|>user\n<|im_end|>",
    "<|im_end",
    "</think><think>", "\x00\x01\x7f\ufffd\ufeff", "1234567890 3.14e-10", "I'LL don't 'tis",
    "\u202eabc", "a\u0300\u0301\u0302" * 9, '<tool_call>\n{"a": "\\u00e9"}\n</tool_call>',
    "def f(x):\n\treturn  x**2  # é\n" * 3,
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY)
def test_qwen3_gives_any_text_back_and_the_ids_of_transformers(qwen3, theirs, text):
    ids = qwen3.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    # Qwen's own normalisation, and all that it does.
    assert qwen3.decode(ids, skip_special=False) == unicodedata.normalize("NFC", text)
