"""Ids of a file of ranks are those of tiktoken, for a vocabulary that is made here."""

import base64
import json
import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from alignjax.core.errors import UserError
from alignjax.text import load_tokenizer
from alignjax.text.tiktoken import PATTERN

HARD = [
    "", "  ", "a  b\n\n  c\r\n", "I'll we'VE don't", "1234567 12 3",
    "naïve 日本語 🦜🏽 e\u0301", "x = {1:2}//",
    "aaaaaaaaaaaaaaaaaaa", "\t\x00\x7f\u00ad\u2028", "hahahahaha the thethe",
]  # fmt: skip
DIGITS_ALONE = PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
SPECIAL = ["<|begin|>", "<|end|>", "<|pad|>"]


def ranks() -> dict[bytes, int]:
    """256 bytes, then 400 tokens that byte-level BPE finds in made-up text."""
    rng = random.Random(0)
    words = [
        "the",
        "thethe",
        "haha",
        "don't",
        "naïve",
        "日本",
        "aaa",
        "12",
        "  ",
        "\n\n",
        "x=",
        "🦜",
    ]
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator((" ".join(rng.choices(words, k=9)) for _ in range(300)), trainer)
    spelled = sorted(made.get_vocab().items(), key=lambda item: item[1])
    byte_of = {}  # GPT-2's letters, by what they decode to.
    decoder = tokenizers.decoders.ByteLevel()
    for letter in pre_tokenizers.ByteLevel.alphabet():
        if len(decoder.decode([letter])) == 1 and decoder.decode([letter]) != "\ufffd":
            byte_of[letter] = ord(decoder.decode([letter]))
    others = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c not in byte_of]
    byte_of |= dict(zip(others, sorted(set(range(256)) - set(byte_of.values())), strict=True))
    tokens = [bytes(byte_of[c] for c in token) for token, _ in spelled]
    # As in published files, bytes first.
    tokens = [bytes([b]) for b in range(256)] + [t for t in tokens if len(t) > 1]
    # A whole word that no merge reaches, and tokens of one letter.
    tokens += [b"zqzq", b"aaaa", b"aaaaa", b"aaaaaaaa"]
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


RANKS = ranks()


def write(folder, config, name="tokenizer.model", vocab=RANKS):
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in vocab.items())
    (folder / name).write_bytes(b"".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def listed(tokens):
    return {
        str(len(RANKS) + n): {"content": token, "special": not token.startswith("<call")}
        for n, token in enumerate(tokens)
    }


CONFIGS = {
    "llama": {
        "bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>",
        "added_tokens_decoder": listed([*SPECIAL, "<call>"]),
    },
    "qwen": {
        "eos_token": {"__type": "AddedToken", "content": "<|end|>"}, "pat_str": DIGITS_ALONE,
        "additional_special_tokens": ["<|pad|>"],
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "qwen"])
def both(request, tmp_path_factory):
    tiktoken = pytest.importorskip("tiktoken")
    folder = tmp_path_factory.mktemp(request.param)
    name = "tokenizer.model" if request.param == "llama" else "qwen.tiktoken"
    write(folder, CONFIGS[request.param], name)
    special = [*SPECIAL, "<call>"] if request.param == "llama" else ["<|end|>", "<|pad|>"]
    library = tiktoken.Encoding(
        "made", mergeable_ranks=RANKS,
        pat_str=PATTERN if request.param == "llama" else DIGITS_ALONE,
        special_tokens={token: len(RANKS) + n for n, token in enumerate(special)},
    )  # fmt: skip
    return load_tokenizer(folder), library


def test_ids_are_those_of_tiktoken(both):
    ours, library = both
    assert ours.vocab_size == library.n_vocab
    assert ours.eos_id == library.encode("<|end|>", allowed_special="all")[0]
    for text in [*HARD, "<|end|>a<|pad|> <call>b", "zqzq zqzqz"]:
        assert ours.encode(text) == library.encode(text, allowed_special="all"), text
        assert ours.decode(ours.encode(text), skip_special=False) == text
    assert len(ours.encode("zqzq")) == 1


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(["the", "ha", "a", "aa", " ", "\n", "'ll", "12", "日", "🦜", "zq"]),
            st.characters(exclude_categories=["Cs"]),
        )
    ).map("".join)
)
def test_any_text(both, text):
    ours, library = both
    ids = ours.encode(text)
    assert ids == library.encode(text, disallowed_special=())
    assert ours.decode(ids) == text


def test_it_is_saved_as_a_file_that_transformers_reads(both, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, _ = both
    ours.save(str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in HARD:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
        assert load_tokenizer(tmp_path).encode(text) == ours.encode(text)
    assert theirs.eos_token_id == ours.eos_id


def test_special_tokens_are_special_and_others_are_not(tmp_path):
    write(tmp_path, CONFIGS["llama"])
    tokenizer = load_tokenizer(tmp_path)
    n = len(RANKS)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (n, n + 1, n + 2)
    assert tokenizer.decode(tokenizer.encode("<|begin|>a<call><|end|>")) == "a<call>"


def without(key):
    return {k: v for k, v in CONFIGS["llama"].items() if k != key}


@pytest.mark.parametrize(
    ("config", "vocab", "message"),
    [
        (without("eos_token"), RANKS, "no eos_token"),
        (CONFIGS["llama"] | {"pat_str": "("}, RANKS, r"tokenizer_config\.json: pat_str: not a"),
        (CONFIGS["llama"], {b"a": 0}, r"tokenizer\.model: no token for byte 0"),
        (CONFIGS["llama"], RANKS | {b"ab,": 3}, "two tokens have the same rank"),
        (
            CONFIGS["llama"] | {"added_tokens_decoder": {"97": {"content": "<|end|>"}}},
            RANKS,
            r"id 97 is that of 'a' in tokenizer\.model",
        ),
    ],
)
def test_errors_name_the_file(tmp_path, config, vocab, message):
    write(tmp_path, config, vocab=vocab)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_a_broken_line_is_named(tmp_path):
    write(tmp_path, CONFIGS["llama"])
    with (tmp_path / "tokenizer.model").open("ab") as file:
        file.write(b"not!base64 9\n")
    with pytest.raises(UserError, match=rf"tokenizer\.model:{len(RANKS) + 1}: expected a token"):
        load_tokenizer(tmp_path)


def test_of_several_files_none_is_guessed(tmp_path):
    write(tmp_path, CONFIGS["llama"], "a.tiktoken")
    (tmp_path / "b.tiktoken").write_bytes((tmp_path / "a.tiktoken").read_bytes())
    with pytest.raises(UserError, match=r"one \*\.tiktoken \(found a\.tiktoken, b\.tiktoken"):
        load_tokenizer(tmp_path)
