"""Preferences become files for stages: nothing is lost, no prompt is on both sides."""

import json

import pytest

from alignjax.core.errors import UserError
from alignjax.recipes.preferences import split


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def source(tmp_path):
    # Each prompt twice; what is better is longer. One record is wrong: its responses are equal.
    records = [
        {"prompt": f"p{i // 2}", "chosen": f"yes indeed {i}", "rejected": f"no {i}"}
        for i in range(40)
    ]
    records.append({"prompt": "wrong", "chosen": "same", "rejected": "same"})
    return write(tmp_path / "pairs.jsonl", records)


def test_all_but_the_wrong_record_are_on_one_side(tmp_path, source):
    split(tmp_path / "out", seed=0, source=source, num_test=9)
    train, test = (read(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "test"))
    assert len(test) == 10 and len(train) == 30  # The last prompt of the nine brings its twin.
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    found = {tuple(r["responses"]) for r in (*train, *test)}
    assert found == {(f"yes indeed {i}", f"no {i}") for i in range(40)}
    assert all(r["ranks"] == [1, 2] for r in (*train, *test))


def test_demonstrations_are_the_best_responses(tmp_path, source):
    split(tmp_path / "out", seed=0, source=source, num_test=9, num_train=5)
    for name, num in (("train", 5), ("test", 10)):
        preferences = read(tmp_path / "out" / f"{name}.jsonl")
        assert len(preferences) == num
        assert read(tmp_path / "out" / f"{name}_sft.jsonl") == [
            {"prompt": r["prompt"], "completion": r["responses"][0]} for r in preferences
        ]


def test_the_best_of_a_ranking_and_of_labels(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    records = [
        {"prompt": messages, "responses": ["c", "a", "b"], "ranks": [3, 1, 2]},
        {"prompt": "q", "responses": ["bad", "good"], "labels": [False, True]},
        {"prompt": "r", "responses": ["bad"], "labels": [False]},
    ]
    split(tmp_path, seed=0, source=write(tmp_path / "all.jsonl", records), num_test=0)
    found = sorted(read(tmp_path / "train_sft.jsonl"), key=str)
    assert found == [
        {"messages": [*messages, {"role": "assistant", "content": "a"}]},
        {"prompt": "q", "completion": "good"},
    ]
    assert len(read(tmp_path / "train.jsonl")) == 3


def test_a_seed_is_a_split(tmp_path, source):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        split(tmp_path / name, seed=seed, source=source, num_test=10)
    a, b, c = ((tmp_path / name / "test.jsonl").read_text() for name in "abc")
    assert a == b != c


def test_a_split_without_training_data_is_an_error(tmp_path, source):
    with pytest.raises(UserError, match="num_test=40 leaves nothing to train on: there are 40"):
        split(tmp_path / "out", seed=0, source=source, num_test=40)
