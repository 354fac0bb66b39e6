"""Who wins: by a reward, by a judge in both orders, with intervals over prompts."""

import json

import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.core.intervals import clustered_interval
from alignjax.core.types import STOP, Completions, Sample, Score
from alignjax.evals.win_rate import Compared, by_judge, by_reward, write_comparison
from alignjax.rewards.judge import Judge, Verdict
from alignjax.rewards.judge_answer import Answer
from alignjax.rewards.judge_config import JudgingConfig
from alignjax.rewards.rollout import Rollouts, Task, joined


def rollouts(texts, rewards=None):
    """texts: [P][n]."""
    flat = [(i, text) for i, row in enumerate(texts) for text in row]
    samples = [Sample(f"p{i}", text, num_tokens=len(text)) for i, text in flat]
    values = [None] * len(flat) if rewards is None else np.ravel(rewards).tolist()
    scores = [Score(None if v is None or np.isnan(v) else v) for v in values]
    lengths = np.array([len(text) for _, text in flat], np.int32)
    empty = np.zeros((len(flat), 9))
    out = Completions(
        empty.astype(np.int32), lengths, empty.astype(np.float32), np.full(len(flat), STOP, np.int8)
    )
    return Rollouts([Task(np.array([1])) for _ in texts], out, samples, scores)


A = rollouts([["aaa", "a"], ["aa", "aaaa"], ["a", "a"]], [[2, 1], [0, np.nan], [5, 3]])
B = rollouts([["b", "bb"], ["bb", "b"], ["bbb", "bbb"]], [[1, 1], [4, 2], [5, 4]])


def test_the_higher_reward_wins():
    compared = Compared(A, B, by_reward(A.rewards, B.rewards))
    np.testing.assert_array_equal(compared.verdicts.a_is_better, [[1, 0.5], [0, np.nan], [0.5, 0]])
    # Of prompts: 3/4, 0 and 1/4; the pair without a reward is left out.
    assert compared.win_rate.mean == pytest.approx((0.75 + 0 + 0.25) / 3)
    low, high = clustered_interval(np.array([0.75, 0.0, 0.25]), 2)
    assert (compared.win_rate.low, compared.win_rate.high) == (low, high)
    figures = compared.as_json()
    assert [figures[k] for k in ("wins", "ties", "losses", "num_failed")] == [1, 2, 2, 1]
    assert figures["mean_length"] == {"a": 12 / 6, "b": 12 / 6}
    # Longer ones: a wins (3 > 1), b ties (1 < 2), equal, left out, b ties (1 < 3) and wins.
    assert figures["longer_is_preferred"] == pytest.approx((1 + 0.5 + 0.5 + 1) / 4)
    assert "first_is_preferred" not in figures


def judge(p, **config):
    """A judge of which p(first, second) is the opinion."""

    def ask(questions):
        for place, question in enumerate(questions):
            value = p(question.fields["first"], question.fields["second"])
            if value is None:
                yield {place: Answer(error="broken")}
            else:
                with np.errstate(divide="ignore"):
                    yield {place: Answer("", tuple(np.log([value, 1 - value]).tolist()))}

    return Judge(ask, JudgingConfig(**config), None).pairwise


def test_a_judge_without_a_bias():
    verdicts = by_judge(A, B, judge(lambda first, second: float(len(first) > len(second))))
    # By length, strictly: 3 > 1, 1 < 2, 2 = 2, 4 > 1, 1 < 3 twice.
    np.testing.assert_array_equal(verdicts.a_is_better, [[1, 0], [0.5, 1], [0, 0]])
    np.testing.assert_array_equal(verdicts.first_is_better, [[0.5, 0.5], [0, 0.5], [0.5, 0.5]])
    np.testing.assert_array_equal(verdicts.orders_agree, [[1, 1], [0, 1], [1, 1]])


def test_a_judge_that_prefers_the_first_place_says_nothing_of_the_models():
    verdicts = by_judge(A, B, judge(lambda first, second: 0.9))
    np.testing.assert_allclose(verdicts.a_is_better, 0.5)
    figures = Compared(A, B, verdicts).as_json()
    assert figures["win_rate"]["mean"] == pytest.approx(0.5)
    assert figures["first_is_preferred"]["mean"] == pytest.approx(0.9)
    assert figures["orders_agree"]["mean"] == 0


def test_probabilities_are_averaged_over_both_orders():
    opinions = {("aaa", "b"): 0.8, ("b", "aaa"): 0.6}
    one, other = rollouts([["aaa"]]), rollouts([["b"]])
    verdicts = by_judge(one, other, judge(lambda *pair: opinions[pair]))
    assert verdicts.a_is_better.item() == pytest.approx((0.8 + (1 - 0.6)) / 2)
    assert verdicts.first_is_better.item() == pytest.approx((0.8 + 0.6) / 2)
    assert verdicts.orders_agree.item() == 0, "it is for the first one both times"


def test_a_judge_that_fails_in_one_order_gives_no_verdict():
    verdicts = by_judge(A, B, judge(lambda first, second: None if first == "aaa" else 1.0))
    assert np.isnan(verdicts.a_is_better[0, 0]) and np.isfinite(verdicts.a_is_better).sum() == 5
    assert np.isnan(verdicts.orders_agree[0, 0])
    with pytest.raises(UserError, match="every call failed: broken"):
        by_judge(A, B, judge(lambda *_: None))


def test_a_judge_that_is_asked_in_one_order():
    verdicts = by_judge(A, B, judge(lambda first, second: 0.9, both_orders=False))
    np.testing.assert_allclose(verdicts.a_is_better, 0.9)
    assert "first_is_preferred" not in Compared(A, B, verdicts).as_json()


def test_a_judge_sees_the_records():
    """A function may name their fields."""
    seen = []
    by_judge(A, B, lambda pairs: seen.extend(pairs) or [Verdict(0.5)] * len(pairs))
    assert [(p.prompt, p.first, p.second) for p in seen[:2]] == [
        ("p0", "aaa", "b"), ("p0", "a", "bb"),
    ]  # fmt: skip
    assert seen[0].record == {"reference": None} and seen[0].variables == {}


def test_files(tmp_path):
    write_comparison(Compared(A, B, by_reward(A.rewards, B.rewards)), tmp_path / "out")
    figures = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert figures["num_prompts"] == 3
    lines = (tmp_path / "out" / "compare_samples.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["a_is_better"] for r in records] == [1, 0.5, 0, None, 0.5, 0]
    assert (records[4]["prompt"], records[4]["b"]["completion"]) == ("p2", "bbb")
    assert records[4]["a"]["reward"] == 5


def test_rollouts_of_prompts_and_joined_again():
    parts = A.by_task()
    assert [[s.completion for s in part.samples] for part in parts] == [
        ["aaa", "a"], ["aa", "aaaa"], ["a", "a"],
    ]  # fmt: skip
    again = joined(parts)
    np.testing.assert_array_equal(again.rewards, A.rewards)
    np.testing.assert_array_equal(again.completions.lengths, A.completions.lengths)
