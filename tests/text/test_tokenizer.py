"""Round trips, unknown characters, and equality with the libraries that read the same files."""

import json
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from alignjax.core.errors import UserError
from alignjax.core.types import Tokenizer
from alignjax.text import HFTokenizer, load_tokenizer, vocab_tokenizer

TOKENS = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<think>",
    "</think>",
    "wait:",
    "w",
    *"0123456789+-*=; \n.|é🦜",
]


def ids_of(*tokens: str) -> list[int]:
    return [TOKENS.index(token) for token in tokens]


def test_vocab_ids_are_places_and_the_longest_token_wins():
    tokenizer = vocab_tokenizer(TOKENS)
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert tokenizer.vocab_size == len(TOKENS)
    assert tokenizer.encode("<think>1wait:w.|") == ids_of("<think>", "1", "wait:", "w", ".", "|")
    assert tokenizer.encode("") == []


@pytest.mark.parametrize(
    "text", ["12*3-9=", "  1  \n\n", "<think>wait:w é🦜</think>", "<bos>7<eos>"]
)
def test_vocab_round_trip(text):
    tokenizer = vocab_tokenizer(TOKENS)
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_decode_skips_special_tokens_but_never_the_tags_that_rewards_look_for():
    tokenizer = vocab_tokenizer(TOKENS)
    ids = tokenizer.encode("<bos><think>1</think>2<eos><pad>")
    assert tokenizer.decode(ids) == "<think>1</think>2"
    assert tokenizer.decode(ids, skip_special=False) == "<bos><think>1</think>2<eos><pad>"


@pytest.mark.parametrize(
    ("text", "character", "position"), [("12x3", "x", 2), ("é🦜ß", "ß", 2), ("1<thin", "<", 1)]
)
def test_vocab_unknown_character_is_named_with_its_position(text, character, position):
    with pytest.raises(UserError, match=f"'{character}' at position {position} of"):
        vocab_tokenizer(TOKENS).encode(text)


def test_long_texts_are_shown_around_the_fault():
    for text, shown in (
        ("1" * 9000 + "x" + "2" * 9000, f"of ...'{'1' * 40}x{'2' * 39}'...; the "),
        ("x" + "2" * 9000, f"position 0 of 'x{'2' * 39}'...; the "),
        ("1" * 9000 + "x", f"position 9000 of ...'{'1' * 40}x'; the "),
        ("1" * 9000 + "\ud800", f"position 9000 of ...'{'1' * 40}\\ud800' is half a"),
    ):
        with pytest.raises(UserError) as error:
            vocab_tokenizer(["1", "2", "<bos>", "<eos>", "<pad>"]).encode(text)
        assert shown in str(error.value) and len(str(error.value)) < 300


def llama_2():
    """How its tokenizer.json spells spaces."""
    model = models.BPE({"<s>": 0, "</s>": 1, "\u2581": 2, "x": 3, "\u2581x": 4}, [("\u2581", "x")])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return tokenizer


def in_front(pre_tokenizer):
    tokenizer = llama_2()
    tokenizer.normalizer, tokenizer.pre_tokenizer = None, pre_tokenizer
    return tokenizer


def stripped(**sides):
    tokenizer = llama_2()
    tokenizer.normalizer = normalizers.Strip(**sides)
    return tokenizer


def squeezed():
    tokenizer = llama_2()
    tokenizer.normalizer = normalizers.Replace(tokenizers.Regex(" +"), "\u2581")
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        in_front(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        stripped(left=True, right=False),
        stripped(left=False, right=True),
        squeezed(),
    ],
)
def test_a_tokenizer_that_alters_spaces_is_refused(tmp_path, tokenizer):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match=r"tokenizer\.json: it alters the spaces of a text"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_spells_spaces_otherwise_is_not(tmp_path):
    for tokenizer in (
        in_front(pre_tokenizers.Metaspace(prepend_scheme="never")),
        in_front(pre_tokenizers.ByteLevel(add_prefix_space=False)),
        in_front(None),
    ):
        assert HFTokenizer(tokenizer, {"eos_token": "</s>"}).encode("x")


def test_text_that_is_not_unicode_is_a_user_error():
    with pytest.raises(UserError, match=r"position 1 of .* surrogate"):
        vocab_tokenizer(TOKENS).encode("1\ud8002")


@pytest.mark.parametrize(
    ("tokens", "special", "message"),
    [
        (["a", "a", "<eos>"], {"bos": None, "pad": "<eos>"}, "'a'"),
        (["", "<eos>"], {"bos": None, "pad": "<eos>"}, "empty"),
        (["a", "<eos>"], {"bos": "<b>", "pad": "<eos>"}, "<b>"),
    ],
)
def test_vocab_refuses(tokens, special, message):
    with pytest.raises(UserError, match=message):
        vocab_tokenizer(tokens, eos="<eos>", **special)


def test_pad_may_be_eos_and_there_may_be_no_bos():
    tokenizer = vocab_tokenizer(["a", "<eos>"], bos=None, pad="<eos>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 1, 1)


def test_saved_vocab_is_the_same_here_and_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = vocab_tokenizer(TOKENS)
    tokenizer.save(str(tmp_path))
    again = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    assert len(theirs) == again.vocab_size == len(TOKENS)
    for text in ["<bos>12*3=<think>wait:1;</think> 7<eos>", "  1\n", "é🦜w"]:
        ids = tokenizer.encode(text)
        assert again.encode(text) == theirs.encode(text) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == again.decode(ids)


def test_decoding_a_prefix_never_raises_and_is_exact_when_complete(real_data):
    tokenizer = load_tokenizer(real_data / "tokenizers" / "qwen3")
    text = "naïve 🦜🏽 日本語 \u0301\n\t x"
    ids = tokenizer.encode(text)
    pieces = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    assert pieces[-1] == text
    assert any("\ufffd" in piece for piece in pieces)  # A character was indeed cut in its middle.
    assert tokenizer.decode([tokenizer.vocab_size + 100, ids[0]]) == tokenizer.decode(ids[:1])


def test_qwen3_special_tokens_and_ids_are_those_of_transformers(real_data):
    transformers = pytest.importorskip("transformers")
    folder = real_data / "tokenizers" / "qwen3"
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
    assert ours.bos_id is None
    assert (ours.eos_id, ours.pad_id) == (151645, 151643)  # <|im_end|> and <|endoftext|>.
    assert ours.vocab_size == len(theirs)
    for text in ["<|im_start|>user\nHi 123<|im_end|>", "<think>日本語</think>", " a  b\n\n c"]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text), skip_special=False) == text


def test_a_post_processor_that_adds_bos_is_not_asked_and_nothing_is_cut(tmp_path):
    """Llama 3's tokenizer.json adds BOS; some files carry the truncation of their training."""
    inner = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    inner.enable_truncation(4)
    inner.enable_padding(length=8)
    inner.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>", "special": True}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a a a a a a") == [2] * 6
    assert (tokenizer.bos_id, tokenizer.pad_id) == (0, 1)


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"no tokenizer.*notes\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)
    vocab_tokenizer(["a", "<eos>"], bos=None, pad="<eos>").save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="broken JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="no eos_token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match="'</s>' is not in the vocabulary"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"without tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_chat_template_file_is_preferred_and_saved_along(tmp_path):
    tokenizer = vocab_tokenizer(["a", "<eos>"], bos=None, pad="<eos>")
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    tokenizer.config["chat_template"] = named
    assert tokenizer.chat_template == "D"
    tokenizer.save(str(tmp_path / "one"))
    (tmp_path / "one" / "chat_template.jinja").write_text("{{ 1 }}")
    loaded = load_tokenizer(tmp_path / "one")
    assert isinstance(loaded, HFTokenizer)
    assert loaded.chat_template == "{{ 1 }}"
    loaded.save(str(tmp_path / "two"))
    assert load_tokenizer(tmp_path / "two").chat_template == "{{ 1 }}"


def test_importing_text_and_data_does_not_import_jax():
    code = "import sys, alignjax.text, alignjax.data; print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
