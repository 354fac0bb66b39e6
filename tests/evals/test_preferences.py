"""How often the scores of a model order two responses as people did."""

import json

import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.core.intervals import clustered_interval
from alignjax.evals.preferences import (
    PreferenceEvalConfig,
    agreement,
    open_held_out,
    write_agreement,
)
from alignjax.text import vocab_tokenizer

TOKENIZER = vocab_tokenizer(["<pad>", "<bos>", "<eos>", *"abcd"])
BOS, EOS, A = 1, 2, 3
RECORDS = [
    {"prompt": "d", "responses": ["a", "b", "ab"], "ranks": [1, 2, 2]},  # a over b, a over ab
    {"prompt": "dd", "responses": ["b", "aa"], "choices": [[1, 0]]},  # aa over b
    {"prompt": "d", "responses": ["b", "a"], "scores": [2.0, 1.0]},  # b over a
    {"prompt": "d", "responses": ["c", "cc"], "ranks": [1, 2]},  # A tie of scores: 1/2
    {"prompt": "d", "responses": ["c", "cc"], "ranks": [1, 1]},  # No opinion
    {"prompt": "dddd", "responses": ["aaaa", "b"], "ranks": [1, 2]},  # 10 tokens with BOS and EOS
]


def config(tmp_path, **more):
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return PreferenceEvalConfig(model="rm", preferences=str(path), max_len=9, **more)


def count_a(texts):
    """Scores: how many a there are."""
    for ids in texts:
        assert ids[0] == BOS and ids[-1] == EOS, "as the policy writes them"
    return np.array([(ids == A).sum() for ids in texts], np.float32)


def run(tmp_path, score=count_a, **more):
    chosen = config(tmp_path, **more)
    return agreement(chosen, open_held_out(chosen), TOKENIZER, score)


def test_by_hand(tmp_path):
    found = run(tmp_path)
    # First: a over b right (1 > 0), a over ab a tie (1 = 1): 3/4. Then 1, 0 and 1/2.
    values = np.array([0.75, 1.0, 0.0, 0.5])
    assert [r["accuracy"] for r in found.records] == values.tolist()
    assert found.accuracy.mean == pytest.approx(values.mean())
    assert (found.accuracy.low, found.accuracy.high) == clustered_interval(values, 2)
    assert (found.num_pairs, found.num_left_out, found.num_dropped) == (5, 1, 1)
    assert found.margin == pytest.approx((1 + 0 + 2 - 1 + 0) / 5)
    assert found.records[0]["scores"] == [1, 0, 1]


def test_a_model_that_is_the_other_way_round(tmp_path):
    found = run(tmp_path, lambda texts: -count_a(texts))
    assert found.accuracy.mean == pytest.approx(1 - run(tmp_path).accuracy.mean)


def test_what_is_too_long(tmp_path):
    with pytest.raises(UserError, match=r"held_out.jsonl:6: 10 tokens, but only 9 fit"):
        run(tmp_path, overlong="error")
    chosen = config(tmp_path).model_copy(update={"max_len": 2})
    with pytest.raises(UserError, match="of 6 nothing is left to compare: 5 are longer"):
        agreement(chosen, open_held_out(chosen), TOKENIZER, count_a)


def test_files(tmp_path):
    write_agreement(run(tmp_path), tmp_path / "eval")
    figures = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert figures["accuracy"]["mean"] == pytest.approx(2.25 / 4)
    assert figures["num_preferences"] == 4
    lines = (tmp_path / "eval" / "eval_samples.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["responses"] == ["aa", "b"]
