"""The tokenizer.json made from a sentencepiece model gives the ids of the sentencepiece library."""

import json
import random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from alignjax.core.errors import UserError
from alignjax.text import load_sentencepiece, load_tokenizer, train_sentencepiece

SPECIAL = ["<think>", "</think>"]
HARD = [
    "",
    "   ",
    "  a  b ",
    "\t\n\n x\r\n",
    "日本語 naïve 🦜🏽 é e\u0301",
    "Ünï\u00a0cödé",
    "<0x0A><0x41>",
    "<think>x</think> <thin",
    "12345 -3.50",
]


def corpus() -> list[str]:
    rng = random.Random(0)
    syllables = ["an", "bob", "ha", "buy", "sel", "red", "blu", "pear", "ing", "then", "of", "day"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(150)]
    return [
        " ".join(rng.choices(words, k=12)) + f" {rng.randint(0, 999)}.\n#### {rng.randint(0, 99)}"
        for _ in range(300)
    ]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = train_sentencepiece(
        corpus(), folder, 340, special_tokens=SPECIAL, model_type=request.param
    )
    library = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    return folder, tokenizer, library


def test_ids_are_those_of_sentencepiece(trained):
    _, tokenizer, library = trained
    assert tokenizer.vocab_size == library.vocab_size() == 340
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert (library.pad_id(), library.bos_id(), library.eos_id()) == (0, 1, 2)
    for text in [*corpus(), *HARD]:
        assert tokenizer.encode(text) == library.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(
    st.text(
        st.one_of(
            st.sampled_from("ABab 019.\n#"),
            # U+2581 is how sentencepiece itself spells a space; U+0000 ends its text.
            st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\0"),
        )
    )
)
def test_any_text_comes_back_and_any_prefix_decodes(trained, text):
    _, tokenizer, library = trained
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    if not any(token in text for token in ("<pad>", "<s>", "</s>", "<unk>")):
        assert ids == library.encode(text)
    for n in range(len(ids)):
        assert isinstance(tokenizer.decode(ids[:n]), str)


def test_digits_and_special_tokens_are_single(trained):
    _, tokenizer, library = trained
    think, slash_think = (library.piece_to_id(token) for token in SPECIAL)
    ids = tokenizer.encode("<think>407</think>")
    assert [ids[0], ids[-1]] == [think, slash_think]
    assert [tokenizer.decode([i]) for i in ids[1:-1]] == ["4", "0", "7"]
    assert tokenizer.decode(ids) == "<think>407</think>"
    assert tokenizer.encode("<s>a</s>")[0] == 1
    assert tokenizer.encode("<s>a</s>")[-1] == 2
    assert tokenizer.decode(tokenizer.encode("<s>a</s>")) == "a"


def test_the_sign_for_a_space_becomes_one(trained):
    _, tokenizer, _ = trained
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_training_again_gives_the_same_files(trained, tmp_path):
    folder, tokenizer, _ = trained
    kind = json.loads((folder / "tokenizer.json").read_text())["model"]["type"].lower()
    train_sentencepiece(corpus(), tmp_path, 340, special_tokens=SPECIAL, model_type=kind)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert load_sentencepiece(folder / "tokenizer.model").encode(HARD[4]) == tokenizer.encode(
        HARD[4]
    )


def test_loaded_from_either_file_and_by_transformers(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, tokenizer, _ = trained
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    from_model, from_json = load_tokenizer(tmp_path), load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    for text in [*corpus()[:20], *HARD, "<s>a<think></s>"]:
        ids = tokenizer.encode(text)
        assert from_model.encode(text) == from_json.encode(text) == ids
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == from_json.decode(ids, skip_special=False)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_models_of_others_with_normalisation_and_no_bytes(tmp_path, model_type):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=80,
        model_type=model_type,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    library = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    for text in [*corpus()[:50], "an  has", "  an has  ", "   ", "ａｂ", ""]:
        assert tokenizer.encode(text) == library.encode(text), text
    assert tokenizer.decode(tokenizer.encode(" an  has")) == " an  has"


def test_a_model_that_takes_spaces_away_is_refused(tmp_path):
    """A default of sentencepiece."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=80,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match=r"tokenizer\.model: it alters the spaces of a text"):
        load_tokenizer(tmp_path)


def test_errors_say_what_to_change(tmp_path):
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece([], tmp_path, 300)
    for size in (-5, 0, 262):
        with pytest.raises(UserError, match=rf"vocab_size={size}; expected more than 262: "):
            train_sentencepiece(["a b c"] * 9, tmp_path, size, special_tokens=SPECIAL)
    with pytest.raises(UserError, match=r"vocab_size=5000.*<= "):
        train_sentencepiece(["a b c"] * 9, tmp_path, 5000)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"tokenizer\.model: "):
        load_tokenizer(tmp_path)


def test_real_text(real_data, tmp_path):
    lines = (real_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = ["{question}\n{answer}".format(**json.loads(line)) for line in lines]
    tokenizer = train_sentencepiece(texts[:500], tmp_path, 1000)
    library = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    for text in texts[500:1500]:
        ids = tokenizer.encode(text)
        assert ids == library.encode(text)
        assert tokenizer.decode(ids) == text
