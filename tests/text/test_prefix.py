"""Tokenizers that put a space in front of a text: ids as transformers and sentencepiece have them,
and a prompt with its completion is the text that they make."""

import itertools
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from alignjax.text import (
    ChatTemplate,
    encode_chat,
    encode_chat_prompt,
    encode_prompt,
    encode_prompt_completion,
    load_tokenizer,
    stop_ids,
)
from alignjax.text.prefix import is_even, spelled, without_prefix

LLAMA_2 = """{% for m in messages %}
{% if m.role == 'user' %}
{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}
{% else %}
{{ ' ' + m.content + ' ' + eos_token }}
{% endif %}
{% endfor %}"""
TALK = [
    {"role": "user", "content": "red pear"},
    {"role": "assistant", "content": "blue day"},
    {"role": "user", "content": "of  the\nday"},
    {"role": "assistant", "content": "pear"},
]
KINDS = ["prepend", "first", "always", "model", "model_first"]
TEXTS = [
    "red", "red pear", "red  pear", "the day of red ", "a\n\n b", "日本 é 🦜", "\n", "x" * 40,
    "1 2 3", "tab\tred",
]  # fmt: skip


def corpus() -> list[str]:
    rng = random.Random(1)
    words = ["red", "blue", "pear", "day", "of", "the", "12", "[INST]", "[/INST]"]
    return [" ".join(rng.choices(words, k=9)) for _ in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sentencepiece model with Llama 2's options, and the files made from it, one in each."""
    root = tmp_path_factory.mktemp("llama")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_prefix=str(root / "tokenizer"), vocab_size=320,
        model_type="bpe", byte_fallback=True, split_digits=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        allow_whitespace_only_pieces=True, minloglevel=2, user_defined_symbols=["<tool>"],
        hard_vocab_limit=False,
    )  # fmt: skip
    model = (root / "tokenizer.model").read_bytes()
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for name, more in (("model", {}), ("model_first", {"legacy": False})):
        (root / name).mkdir()
        (root / name / "tokenizer.model").write_bytes(model)
        (root / name / "tokenizer_config.json").write_text(json.dumps(config | more))
    inner = load_tokenizer(root / "model")._going_on
    for name in ("prepend", "first", "always"):
        # As the tokenizer.json files on the Hub are put together, not as ours are.
        made = tokenizers.Tokenizer(inner.model)
        if name == "prepend":
            made.normalizer = normalizers.Sequence(
                [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            )
        else:
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=name, split=False)
        made.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )  # fmt: skip
        made.add_special_tokens(["<unk>", "<s>", "</s>"])
        made.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
        (root / name).mkdir()
        made.save(str(root / name / "tokenizer.json"))
        written = config | {"tokenizer_class": "PreTrainedTokenizerFast"}
        (root / name / "tokenizer_config.json").write_text(json.dumps(written))
    return root


@pytest.fixture(scope="module", params=KINDS)
def ours(request, folder):
    return load_tokenizer(folder / request.param)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    """transformers, of what we save."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("saved")
    ours.save(str(path))
    return transformers.AutoTokenizer.from_pretrained(str(path))


def is_first(tokenizer) -> bool:
    return Path(tokenizer._name).parent.name in ("first", "model_first")


def test_ids_of_a_text_are_those_of_transformers_and_it_comes_back(ours, theirs):
    for text in [*TEXTS, " red", "  red", "a</s> b", "<s>red<tool>the</s><s> day", ""]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert ours.encode(text, []) == ids
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.decode(ids) == text == theirs.decode(ids)


@pytest.mark.parametrize("name", KINDS[:3])
def test_files_of_the_hub_give_the_same_ids_as_in_transformers(folder, name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder / name))
    for text in [*TEXTS, " red", "a</s> b", "<s>red<tool>the</s><s> day"]:
        ids = load_tokenizer(folder / name).encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("legacy", [True, False])
def test_plain_text_is_as_in_the_class_for_llama_of_transformers(folder, tmp_path, legacy):
    """It builds its own rules from tokenizer.json; they differ where a text begins with a space."""
    transformers = pytest.importorskip("transformers")
    name = "always" if legacy else "first"
    (tmp_path / "tokenizer.json").write_bytes((folder / name / "tokenizer.json").read_bytes())
    config = json.loads((folder / name / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert type(theirs).__name__ == "LlamaTokenizer"
    for text in [*TEXTS, " red", "a</s> b", "<s>red</s><s> day"]:
        ids = load_tokenizer(tmp_path).encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text


def test_what_is_saved_means_the_same_to_transformers_whatever_class_it_came_with(folder, tmp_path):
    """Its LlamaTokenizer would put no space after a special token, and none before a space."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_bytes((folder / "prepend/tokenizer.json").read_bytes())
    config = json.loads((folder / "prepend" / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    ours.save(str(tmp_path / "saved"))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    for text in (" red", "a</s>b", "red"):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text


def test_ids_of_the_model_file_are_those_of_sentencepiece(folder):
    library = sentencepiece.SentencePieceProcessor(str(folder / "model" / "tokenizer.model"))
    tokenizer = load_tokenizer(folder / "model")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (library.bos_id(), library.eos_id())
    for text in [*corpus()[:50], *TEXTS, " red", "   red "]:
        assert tokenizer.encode(text) == library.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_completion_gets_no_space_of_its_own(ours):
    red, pear = ours.encode("red"), ours.encode("pear")
    assert ours.decode(red + pear) == "red pear"  # What refusing them was about.
    for prompt, completion in (("red", " pear"), ("red", "pear"), ("of\n", "day"), ("a ", " b")):
        ids, mask = encode_prompt_completion(ours, prompt, completion)
        start = mask.index(True)
        assert ids[:start] == encode_prompt(ours, prompt)
        assert ours.decode(ids) == prompt + completion
        assert ours.decode(ids[start:], after=ids[:start]) == completion
        assert ids[-1] == ours.eos_id
    space_pear = ours.encode("red", [1, 5]) + ours.encode(" pear", [1, 5])
    assert space_pear[-len(pear) :] == pear


def test_a_document_starts_with_the_space_after_the_bos_that_is_put_there(ours, theirs):
    ids, mask = encode_prompt_completion(ours, "", "red pear")
    assert ids == [1, *theirs.encode("red pear", add_special_tokens=False), 2]
    assert mask == [False] + [True] * (len(ids) - 1)
    assert ours.decode(ids) == "red pear"


def test_special_tokens_within_a_text(ours):
    """Always: a space after each of them, as in Llama 2; first: none."""
    red, joined = ours.encode("red"), ours.encode("red", ours.encode("a"))
    assert red != joined
    after = joined if is_first(ours) else red
    assert ours.encode("<s>red") == [1, *after]
    assert ours.encode("red", [1]) == after
    assert ours.encode("red", [1, *red]) == joined
    assert ours.encode("red</s>red<tool>red", red) == [
        *joined, 2, *after, ours.encode("<tool>")[0], *after,
    ]  # fmt: skip
    text = "<s>red pear</s><s>the<tool>day</s>"
    assert ours.decode(ours.encode(text), skip_special=False) == text
    assert ours.decode(ours.encode(text)) == "red pearthe<tool>day"


def test_a_stop_token_is_one_token_as_it_is_sampled(ours):
    newline = ours.encode("\n", ours.encode("a"))
    assert len(newline) == 1
    assert stop_ids(ours, ["\n", "<tool>"]) == (2, *newline, *ours.encode("<tool>"))


def test_llama_2_chats_are_those_of_transformers_and_come_back(ours, theirs):
    template = ChatTemplate(ours, LLAMA_2)
    ids, mask = encode_chat(ours, template, TALK)
    assert ids == theirs.apply_chat_template(TALK, chat_template=LLAMA_2, return_dict=False)
    assert ours.decode(ids, skip_special=False) == template.render(TALK)
    spans = [list(run) for on, run in itertools.groupby(range(len(ids)), mask.__getitem__) if on]
    assert [
        ours.decode(ids[span[0] : span[-1] + 1], skip_special=False, after=ids[: span[0]])
        for span in spans
    ] == [" blue day </s>", " pear </s>"]
    for n in (1, 3):
        prompt = encode_chat_prompt(ours, template, TALK[:n])
        assert prompt == ids[: len(prompt)]
        assert prompt == theirs.apply_chat_template(
            TALK[:n], chat_template=LLAMA_2, add_generation_prompt=True, return_dict=False
        )
        assert mask[len(prompt)] and not mask[len(prompt) - 1]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(["a", "red", " ", "\n", "é", "🦜", "0"]), min_size=1).map("".join),
        min_size=1,
    )
)
def test_segments_are_the_text_that_they_make(ours, parts):
    text = "".join(parts)
    ids: list[int] = []
    for part in parts:
        ids += ours.encode(part, ids)
    # A Metaspace takes one space from the start of a text that begins with some, here and there.
    is_lossy = ours._tokenizer.normalizer is None and text.startswith(" ")
    assert ours.decode(ids) == (text[1:] if is_lossy else text)


def test_what_is_added_beside_the_model_file(folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((folder / "model/tokenizer.model").read_bytes())
    size = load_tokenizer(folder / "model").vocab_size
    config = {
        "eos_token": "<|end|>", "pad_token": {"content": "<|end|>"}, "chat_template": "{{ 1 }}",
        "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True},
            str(size): {"content": "<|end|>", "special": True, "rstrip": True},
            str(size + 1): {"content": "<call>", "special": False},
        },
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, size, size)
    assert tokenizer.chat_template == "{{ 1 }}"
    assert tokenizer.encode("<call><|end|> \n") == [size + 1, size]
    assert tokenizer.decode([size + 1, size]) == "<call>"
    config["added_tokens_decoder"][str(size + 5)] = {"content": "<far>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=rf"'<far>' as {size + 5}, but here it is {size + 2}"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_a_space_in_front_has_no_other():
    tokenizer = tokenizers.Tokenizer(models.BPE({"x": 0}, []))
    assert is_even(tokenizer) and without_prefix(tokenizer) is None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first", split=False)]
    )
    assert not is_even(tokenizer)
    inner, scheme = without_prefix(tokenizer)
    assert scheme == "first"
    assert spelled(inner, "x y") == "x\u2581y" and is_even(inner)
