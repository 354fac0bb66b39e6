"""Two evaluations: their differences by hand, and what keeps them from being compared."""

import json

import numpy as np
import pytest

from alignjax.core.config import build, loads
from alignjax.core.errors import UserError
from alignjax.evals.paired import compare_evaluations, paired, read_evaluation
from alignjax.evals.provenance import prompt_values, provenance, reward_values
from alignjax.evals.results import write_results
from alignjax.evals.run import EvalConfig
from alignjax.rewards.combine import RewardConfig

CONFIG = """
model: {root}/m
data: d.jsonl
text: {{fields: {{prompt: q}}}}
num_samples: 4
rewards: {{functions: {{accuracy: {{function: verify.exact}}}}}}
"""
PROBLEMS = ["p0", "p1", "p2", "p3"]


def write(folder, values, *overrides, problems=PROBLEMS, name="eval"):
    """The files of an evaluation with these values of the problems."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "m").mkdir(exist_ok=True)
    config = build(EvalConfig, loads(CONFIG.format(root=folder), overrides))
    made_of = provenance(
        task="t",
        models={"model": config.model},
        data=config.data,
        problems=problems,
        prompt=prompt_values(config.text),
        sampling=config,
        scoring={"rewards": config.rewards.model_dump(mode="json")},
    )
    values = {k: np.array(v, np.float64) for k, v in values.items()}
    write_results(folder, {"x": 1}, [], values, made_of, name=name)
    return folder


def compare(a, b):
    return compare_evaluations(read_evaluation(a), read_evaluation(b))


def test_by_hand(tmp_path):
    a = write(tmp_path / "a", {"pass@1": [1, 0.75, 0.5, 0.25], "reward": [1, 2, np.nan, 4]})
    b = write(tmp_path / "b", {"pass@1": [0.5, 0.25, 0.5, 0.5], "reward": [0.5, 2, 3, np.nan]})
    found = compare(a, b)
    assert list(found) == ["pass@1", "reward"]
    one = found["pass@1"]
    # In quarters the differences are 2, 2, 0, -1, of sum 3. Of the 8 signs of 2, 2, 1 the sums of
    # size 3 or more are +-(2 + 2 + 1) and +-(2 + 2 - 1): 4 of 8.
    assert (one.a, one.b, one.p_value, one.is_exact) == (0.625, 0.4375, 0.5, True)
    assert (one.num_problems, one.num_higher, one.num_lower) == (4, 2, 1)
    assert one.low < one.a - one.b < one.high
    assert str(one).startswith("0.625 against 0.4375: +0.1875 [") and "p = 0.5 (4 problems" in str(
        one
    )
    # The reward is of the two problems that have one from both.
    assert (found["reward"].a, found["reward"].b) == (1.5, 1.25)
    assert found["reward"].num_problems == 2
    flipped = compare(b, a)["pass@1"]
    assert (flipped.p_value, flipped.low) == (one.p_value, pytest.approx(-one.high))


def test_a_clear_difference_and_none():
    better = paired(np.ones(20), np.zeros(20), 1)
    assert better.p_value == pytest.approx(2 / 2**20) and (better.low, better.high) == (1, 1)
    same = paired(np.ones(20), np.ones(20), 1)
    assert (same.p_value, same.num_higher, same.num_lower) == (1.0, 0, 0)
    assert paired(np.full(3, np.nan), np.ones(3), 1) is None


def test_the_model_the_seed_and_where_the_data_lie_may_differ(tmp_path):
    a = write(tmp_path / "a", {"pass@1": [1, 1, 1, 1]})
    b = write(tmp_path / "b", {"pass@1": [1, 1, 1, 0]}, "seed=3", "data=other.jsonl", "max_rows=8")
    assert compare(a / "eval.json", b)["pass@1"].num_higher == 1


@pytest.mark.parametrize(
    ("overrides", "problems", "reason"),
    [
        (["temperature=0.5"], PROBLEMS, "sampling.temperature: 1.0 -> 0.5"),
        (["num_samples=8"], PROBLEMS, "sampling.num_samples: 4 -> 8"),
        (["until=[x]"], PROBLEMS, "sampling.until: [] -> [x]"),
        (["text.chat=true"], PROBLEMS, "prompt.text.chat: false -> true"),
        (["text.fields.prompt='{q}?'"], PROBLEMS, "prompt.text.fields.prompt: q -> \"{q}?\""),
        (["rewards.functions.accuracy.args={place: all}"], PROBLEMS,
         "scoring.rewards.functions.accuracy.args.place: (not set) -> all"),
        ([], ["p0", "p1", "x", "p3"], "data: 3 problems in common, of 4 and 4"),
        ([], ["p0", "p1", "p3", "p2"], "data: 4 problems in common, of 4 and 4: take the same"),
    ],
)  # fmt: skip
def test_what_does_not_compare_is_refused_with_the_reason(tmp_path, overrides, problems, reason):
    a = write(tmp_path / "a", {"pass@1": [1, 1, 1, 1]})
    b = write(tmp_path / "b", {"pass@1": [1, 1, 1, 1]}, *overrides, problems=problems)
    with pytest.raises(UserError) as caught:
        compare(a, b)
    first, *lines = str(caught.value).splitlines()
    assert first.endswith("do not compare; they differ in (first -> second):")
    assert any(line.strip().startswith(reason) for line in lines)


def test_a_reward_file_that_changed_is_another_scoring(tmp_path):
    rewards = tmp_path / "mine.py"
    override = f"rewards.functions.accuracy.function={rewards}:close"
    rewards.write_text("def close(completion): return 1.0")
    a = write(tmp_path / "a", {"pass@1": [1, 1, 1, 1]}, override)
    rewards.write_text("def close(completion): return 0.0")
    b = write(tmp_path / "b", {"pass@1": [1, 1, 1, 1]}, override)
    with pytest.raises(UserError, match="scoring: what its files hold"):
        compare(a, b)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no nowhere; expected what `alignjax eval`"):
        read_evaluation(tmp_path / "nowhere")
    (tmp_path / "eval.json").write_text('{"pass@1": 1}')
    with pytest.raises(UserError, match=r"eval\.json: expected a provenance in it and eval_prob"):
        read_evaluation(tmp_path)
    (tmp_path / "eval.json").write_text('{"pass@1": ')
    with pytest.raises(UserError, match=r"eval\.json: broken JSON: Expecting value \(line 1\)"):
        read_evaluation(tmp_path)
    folder = write(tmp_path / "run" / "eval", {"pass@1": [1, 1, 1, 1]})
    assert len(read_evaluation(tmp_path / "run").problems) == 4  # A run's directory.
    lines = (folder / "eval_problems.jsonl").read_text()
    (folder / "eval_problems.jsonl").write_text(lines.replace("1.0", "0.0", 1))
    with pytest.raises(UserError, match=r"eval_problems\.jsonl: not what was written with eval"):
        read_evaluation(folder)


def test_nothing_in_common(tmp_path):
    a = write(tmp_path / "a", {"pass@1": [1, 1, 1, 1]})
    b = write(tmp_path / "b", {"win_rate": [1, 1, 1, 1]})
    with pytest.raises(UserError, match="have no figure in common"):
        compare(a, b)


def test_digests_are_of_what_things_hold(tmp_path):
    def made_of(folder):
        return json.loads((folder / "eval.json").read_text())["provenance"]

    a = made_of(write(tmp_path / "a", {"x": [1, 1, 1, 1]}))
    b = made_of(write(tmp_path / "b", {"x": [1, 1, 1, 1]}))
    assert a["model"]["digest"] == b["model"]["digest"]  # Two empty directories.
    (tmp_path / "b/m/config.json").write_text("{}")
    c = made_of(write(tmp_path / "b", {"x": [1, 1, 1, 1]}))
    assert c["model"]["digest"] != b["model"]["digest"]
    assert {p: a[p]["digest"] for p in ("data", "prompt", "sampling", "scoring")} == {
        p: c[p]["digest"] for p in ("data", "prompt", "sampling", "scoring")
    }


def test_what_scores_depend_on():
    """Another judge is another scoring; another cache, or more processes, are not."""

    def values(function="mine:score", cache=None, num_workers=2):
        judge = {"name": "j", "function": function, "cache": cache}
        return reward_values(
            RewardConfig.model_validate({"judges": {"liked": judge}, "num_workers": num_workers})
        )

    assert values() == values(cache="answers.sqlite", num_workers=4)
    assert values() != values(function="mine:other")
