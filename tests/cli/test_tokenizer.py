"""`alignjax tokenizer train` writes a vocabulary that reads its own text back."""

import itertools
import json

import pytest

from alignjax.cli.main import main
from alignjax.text import load_tokenizer


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "train.jsonl"
    words = ["".join(parts) for parts in itertools.product(("ba", "ko", "mu"), repeat=4)]
    lines = [
        {
            "question": f"How many {word} apples are {i} and {i + 1} apples?",
            "answer": f"{2 * i + 1}",
            "chat": [{"role": "sailor", "content": "sandwiches"}],
            "rank": i,
        }
        for i, word in enumerate(words)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_train(records, tmp_path, capsys):
    out = tmp_path / "vocabulary"
    words = ["tokenizer", "train", str(records), "--field", "question", "--field", "answer"]
    assert (
        main([*words, "--special-token", "<think>", "--vocab-size", "311", "--out", str(out)]) == 0
    )
    assert "81 records" in capsys.readouterr().out
    tokenizer = load_tokenizer(str(out))
    assert tokenizer.vocab_size == 311
    text = "How many <think> apples ☃"
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert len(tokenizer.encode("<think>")) == 1
    assert len(tokenizer.encode(" apples")) == 1 and len(tokenizer.encode(" sandwiches")) > 1


def test_all_text_without_a_field(records, tmp_path):
    out = tmp_path / "vocabulary"
    words = ["tokenizer", "train", str(records), "--model-type", "bpe", "--vocab-size", "350"]
    assert main([*words, "--out", str(out)]) == 0
    # Chat messages count; roles and numbers do not.
    assert len(load_tokenizer(str(out)).encode("sandwiches")) <= 3
    assert len(load_tokenizer(str(out)).encode("sailor")) >= 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--field", "topic"], "train.jsonl:1: no field 'topic'; there are question, answer, chat"),
        (["--field", "rank"], "train.jsonl:1: field 'rank' holds no text"),
        (["--vocab-size", "90000"], "vocab_size=90000"),
        (["--vocab-size", "-5"], "vocab_size=-5; expected more than 260"),
    ],
)
def test_faults(records, tmp_path, capsys, words, message):
    start = [
        "tokenizer",
        "train",
        str(records),
        "--vocab-size",
        "330",
        "--out",
        str(tmp_path / "v"),
    ]
    assert main([*start, *words]) == 2
    assert message in capsys.readouterr().err
    assert main(["tokenizer", "train", str(tmp_path / "no.jsonl"), *start[3:]]) == 2
    assert "no such file" in capsys.readouterr().err


def test_half_a_character(tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    path.write_text('{"q": "a b c"}\n{"q": "ab\\ud800"}\n')
    words = ["tokenizer", "train", str(path), "--vocab-size", "330", "--out", str(tmp_path / "v")]
    assert main(words) == 2
    said = "train.jsonl:2: field 'q': character 3 of the text is half a character (a surrogate)"
    assert said in capsys.readouterr().err
