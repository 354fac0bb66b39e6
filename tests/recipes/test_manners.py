"""The world of manners: what an answer is worth, by hand; its text, its split, its corpus."""

import json
from collections import Counter
from pathlib import Path

import pytest

from alignjax.recipes import manners
from alignjax.text import load_tokenizer

PROMPT = "ann asks about tea and rain:"


@pytest.mark.parametrize(
    ("completion", "polite", "right", "digits", "short"),
    [
        (" hello ann, tea is warm and rain is wet", 1, 1, 0, 1),
        (" hello ann, tea is very warm and rain is 5 wet", 1, 1, -0.5, 0.9),
        (" oaf ann, tea is cold and rain is wet", -1, 0.5, 0, 1),
        (" well ann, rain is wet and tea is warm as people say thanks", 0, 1, 0, 0.7),
        (" hello", 1, 0, 0, 1),
        ("", 0, 0, 0, 0),
        # Of one thing two answers: neither counts.
        (" hello tea is warm and tea is cold and rain is wet", 1, 0.5, 0, 0.8),
        # What was not asked is worth nothing; a greeting counts in the first place alone.
        (" ann, hello, snow is white", 0, 0, 0, 1),
        (" hello 1 2 3", 1, 0, -1.5, 1),
    ],
)
def test_worth_of_an_answer(completion, polite, right, digits, short):
    found = manners.score(PROMPT, completion)
    assert found == pytest.approx(
        {"polite": polite, "right": right, "digits": digits, "short": short}
    )
    assert manners.hidden(PROMPT, completion, reference=None) == found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a world")
    manners.write(folder, seed=0, num_lines=8_000)
    return folder


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_are_all_on_one_side_and_the_corpus_on_that_of_training(world):
    train, test = ({r["prompt"] for r in read(world / f"{s}.jsonl")} for s in ("train", "test"))
    assert len(train) + len(test) == len(manners.QUESTIONS) == 8 * 12 * 11
    assert not train & test
    assert 0.2 < len(test) / 1056 < 0.3
    assert {r["prompt"] for r in read(world / "corpus.jsonl")} == train


def test_the_corpus_has_every_virtue_by_chance_apart_from_the_others(world):
    found = [manners.score(**record) for record in read(world / "corpus.jsonl")]
    share = {k: v / len(found) for k, v in Counter(s["polite"] for s in found).items()}
    assert share == pytest.approx({-1: 1 / 3, 0: 1 / 3, 1: 1 / 3}, abs=0.02)
    means = {key: sum(s[key] for s in found) / len(found) for key in found[0]}
    # Each fact is right 80% of the time, and a digit stands before 30%.
    assert means["right"] == pytest.approx(0.8, abs=0.01)
    assert means["digits"] == pytest.approx(-0.3, abs=0.02)
    of_polite = [s["digits"] for s in found if s["polite"] == 1]
    assert sum(of_polite) / len(of_polite) == pytest.approx(means["digits"], abs=0.03)


def test_every_text_is_tokens_of_words(world):
    tokenizer = load_tokenizer(world / "tokenizer")
    for record in read(world / "corpus.jsonl")[:200]:
        ids = tokenizer.encode(record["prompt"] + record["completion"])
        assert tokenizer.decode(ids) == record["prompt"] + record["completion"]
        # A name, five words and a colon; the answers' words and one comma.
        assert len(tokenizer.encode(record["prompt"])) == 7
        assert len(ids) == 7 + len(record["completion"].split()) + 1


def test_a_seed_is_a_world(tmp_path, world):
    manners.write(tmp_path / "same", seed=0, num_lines=8_000)
    manners.write(tmp_path / "other", seed=1, num_lines=8_000)
    for name in ("corpus.jsonl", "train.jsonl", "test.jsonl"):
        text = (world / name).read_text()
        assert (tmp_path / "same" / name).read_text() == text
        assert (tmp_path / "other" / name).read_text() != text
