"""The rule by hand; every ranking follows it, and nothing is in both files."""

import pytest

from alignjax.data import open_preferences
from alignjax.recipes import sevens
from alignjax.text import load_tokenizer


def test_the_rule_by_hand():
    assert [sevens.score(text) for text in ("7707", "1", "97", "99")] == [3, 0, 0, -2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sevens")
    sevens.write(folder, seed=3, num_train=200, num_test=50)
    return folder


def test_rankings_follow_the_rule(world):
    read = {
        name: list(open_preferences(str(world / f"{name}.jsonl"))) for name in ("train", "test")
    }
    assert (len(read["train"]), len(read["test"])) == (200, 50)
    tokenizer = load_tokenizer(str(world / "tokenizer"))
    assert tokenizer.pad_id not in (tokenizer.eos_id, tokenizer.bos_id)
    prompts = [one.prompt for part in read.values() for one in part]
    assert len(set(prompts)) == 250
    for one in (one for part in read.values() for one in part):
        scores = [sevens.score(text) for text in one.responses]
        for a, first in zip(scores, one.ranks, strict=True):
            for b, second in zip(scores, one.ranks, strict=True):
                assert (a > b) == (first < second)
        assert min(one.ranks) == 1 < max(one.ranks)
        assert 2 <= len(one.responses) <= 4 and all(1 <= len(r) <= 8 for r in one.responses)
        tokenizer.encode(one.prompt + "".join(one.responses))
    assert {len(one.responses) for one in read["train"]} == {2, 3, 4}


def test_the_seed_alone_decides(world, tmp_path):
    (tmp_path / "again").mkdir()
    (tmp_path / "other").mkdir()
    sevens.write(tmp_path / "again", seed=3, num_train=200, num_test=50)
    sevens.write(tmp_path / "other", seed=4, num_train=200, num_test=50)
    text = (world / "train.jsonl").read_text()
    assert (tmp_path / "again" / "train.jsonl").read_text() == text
    assert (tmp_path / "other" / "train.jsonl").read_text() != text
