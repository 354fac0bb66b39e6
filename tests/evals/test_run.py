"""Which samples count as right, and how they become pass@1, pass@k and maj@k."""

import json

import numpy as np
import pytest

from alignjax.core.config import build, loads
from alignjax.core.errors import UserError
from alignjax.core.types import LENGTH, STOP, Completions, Sample, Score
from alignjax.evals.provenance import Provenance
from alignjax.evals.run import EvalConfig, report, write_report
from alignjax.rewards.rollout import Rollouts, Task


def rollouts(rows):
    """rows: for each problem a list of (completion, accuracy or None where the reward failed)."""
    flat = [cell for row in rows for cell in row]
    n = len(rows[0])
    samples = [
        Sample(f"p{i // n}", text, "7", {}, num_tokens=len(text), is_truncated=len(text) > 30)
        for i, (text, _) in enumerate(flat)
    ]
    scores = [
        Score(None, error="hangs") if right is None else Score(0.5 + right, {"accuracy": right})
        for _, right in flat
    ]
    lengths = np.array([s.num_tokens for s in samples], np.int32)
    reasons = np.array([LENGTH if s.is_truncated else STOP for s in samples], np.int8)
    empty = np.zeros((len(flat), 40))
    completions = Completions(empty.astype(np.int32), lengths, empty.astype(np.float32), reasons)
    return Rollouts([Task(np.array([1])) for _ in rows], completions, samples, scores)


def said(answer):
    return f"<answer>{answer}</answer>"


HAND = rollouts(
    [
        # 3 of 4 right; the majority says 7.
        [(said(7), 1.0), (said(7), 1.0), (said(3), 0.0), (said(7), 1.0)],
        # 1 of 4 right; two 4 against one 7 and one without an answer.
        [(said(4), 0.0), ("7", 0.0), (said(7), 1.0), (said(4), 0.0)],
        # None right.
        [(said(1), 0.0), (said(2), 0.0), (said(3), 0.0), (said(4), 0.0)],
    ]
)


def test_pass_at_k_and_majority_by_hand():
    estimates = report(HAND, "accuracy", "answer_tag").estimates
    assert set(estimates) == {"pass@1", "pass@2", "maj@2", "pass@4", "maj@4"}
    means = {name: estimate.mean for name, estimate in estimates.items()}
    assert means["pass@1"] == pytest.approx((3 / 4 + 1 / 4 + 0) / 3)
    # 1 - C(wrong, 2) / C(4, 2): one wrong gives 1, three wrong 1 - 3/6.
    assert means["pass@2"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert means["pass@4"] == pytest.approx((1 + 1 + 0) / 3)
    # In pairs. First problem: (7, 7) 1, (3, 7) a tie worth 1/2. Second: (4, none) 0, (7, 4) 1/2.
    assert means["maj@2"] == pytest.approx((3 / 4 + 1 / 4 + 0) / 3)
    assert means["maj@4"] == pytest.approx((1 + 0 + 0) / 3)
    assert all(e.num_problems == 3 and e.num_samples == 4 for e in estimates.values())


def test_what_the_thinking_says_has_no_vote():
    # As in `rewards.verify`: the last answer counts, but none that is thought.
    thoughts = [f"<think>{said(9)}</think>{said(7)}", f"{said(7)}<think>{said(9)}</think>"]
    out = rollouts([[(thoughts[0], 1.0), (thoughts[1], 1.0), (said(9), 0.0)]])
    assert report(out, "accuracy", "answer_tag").estimates["maj@3"].mean == 1.0


def test_the_answer_is_looked_for_where_the_config_says():
    out = rollouts([[("so 5 then 7", 1.0), ("it is 7", 1.0), ("5", 0.0)]])
    assert report(out, "accuracy", "last_number").estimates["maj@3"].mean == 1.0
    assert report(out, "accuracy", "answer_tag").estimates["maj@3"].mean == 0.0


@pytest.mark.parametrize(("n", "ks"), [(1, []), (2, [2]), (3, [2, 3]), (8, [2, 4, 8])])
def test_k_is_n_and_the_powers_of_two(n, ks):
    names = report(rollouts([[(said(7), 1.0)] * n]), "accuracy", "answer_tag").estimates
    assert list(names) == ["pass@1", *(f"{kind}@{k}" for k in ks for kind in ("pass", "maj"))]


def test_a_failed_reward_counts_as_wrong_and_is_counted():
    out = rollouts([[(said(7), 1.0), (said(7), None)], [(said(7), None), (said(7), None)]])
    result = report(out, "accuracy", "answer_tag")
    assert result.num_failed == 3
    assert result.estimates["pass@1"].mean == 0.25
    assert result.estimates["pass@2"].mean == 0.5
    assert result.reward.mean == 1.5  # of the one that has a reward
    none = report(rollouts([[(said(7), None)]]), "accuracy", "answer_tag")
    assert (none.num_failed, none.estimates["pass@1"].mean) == (1, 0.0)


def test_half_of_the_part_is_enough():
    out = rollouts([[(said(7), 0.5), (said(7), 0.49), (said(7), 0.0), (said(7), 2.0)]])
    assert report(out, "accuracy", "answer_tag").estimates["pass@1"].mean == 0.5


def test_files(tmp_path):
    out = rollouts([[(said(7), 1.0), ("x" * 31, None)]])
    write_report(report(out, "accuracy", "answer_tag"), tmp_path / "a" / "b")
    figures = json.loads((tmp_path / "a/b/eval.json").read_text())
    assert figures["pass@1"]["mean"] == 0.5 and figures["num_failed_rewards"] == 1
    assert (figures["num_problems"], figures["num_samples"]) == (1, 2)
    assert figures["mean_length"] == (len(said(7)) + 31) / 2
    assert figures["truncated_frac"] == 0.5 and figures["reward"] == 1.5
    lines = [json.loads(x) for x in (tmp_path / "a/b/eval_samples.jsonl").open()]
    assert [(x["completion"], x["reward"], x["error"]) for x in lines] == [
        (said(7), 1.5, None),
        ("x" * 31, None, "hangs"),
    ]


CONFIG = """\
model: m
data: d.jsonl
text: {fields: {prompt: q}}
rewards: {functions: {accuracy: {function: verify.exact}}}
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("answer=last_numbr", "answer: place='last_numbr'; expected one of answer_tag"),
        ("answer=regex:(", "answer: not a regular expression: missing )"),
        ("temperature=.inf", "temperature: expected a finite number"),
        ("temperature=.nan", "temperature: expected a finite number"),
        ("num_samples=0", "num_samples: expected a number greater than or equal to 1"),
    ],
)
def test_config_is_checked_before_anything_is_sampled(override, message):
    assert build(EvalConfig, loads(CONFIG, ["answer=regex:is (.*)"])).num_samples == 8
    with pytest.raises(UserError) as caught:
        build(EvalConfig, loads(CONFIG, [override]))
    assert str(caught.value).startswith(f"command line: {message}")


def test_problems_that_the_part_is_not_for_are_not_in_question():
    out = rollouts([[(said(7), 1.0), (said(3), 0.0)], [(said(4), 1.0)] * 2, [(said(7), None)] * 2])
    out.scores[2:4] = [Score(0.5, {"liked": 0.5})] * 2  # By its `where`: no such part.
    found = report(out, "accuracy", "answer_tag").estimates
    assert found["pass@1"].mean == pytest.approx((1 / 2 + 0) / 2)
    assert found["maj@2"].mean == pytest.approx((1 / 2 + 0) / 2)
    assert found["pass@1"].num_problems == 2


def test_problems_that_are_not_in_question_have_no_accuracy(tmp_path):
    """By the `where` of the reward: the figures of the others stay beside their own problems."""
    out = rollouts([[(said(7), 1.0)], [(said(3), 0.0)], [(said(7), 1.0)]])
    out.scores[0] = Score(0.25, {"other": 1.0})
    made_of = Provenance(["p0", "p1", "p2"], {})
    found = report(out, "accuracy", "answer_tag", made_of=made_of)
    assert found.estimates["pass@1"].mean == 0.5
    write_report(found, tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "eval_problems.jsonl").open()]
    assert [x["pass@1"] for x in lines] == [None, 0.0, 1.0]
    assert [x["reward"] for x in lines] == [0.25, 0.5, 1.5]
    assert [x["problem"] for x in lines] == ["p0", "p1", "p2"]
