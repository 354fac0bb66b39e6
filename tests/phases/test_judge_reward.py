"""A judge as the reward: scores by hand, samples of a prompt against each other, what fails."""

import numpy as np
import pytest
from pydantic import ValidationError

from alignjax.core.types import Sample
from alignjax.phases.judge_reward import JudgeReward
from alignjax.phases.scoring import Rewards
from alignjax.rewards.combine import JudgeRewardConfig, RewardConfig
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.text import vocab_tokenizer

CODE = """
calls = "{folder}/calls"

def longer(prompt, first, second, *, bias=0.1, **fields):
    with open(calls, "a") as file:
        file.write(f"{{first}}>{{second}} ")
    assert first != second
    if "raise" in (first, second):
        raise ValueError("no opinion")
    return min(max(0.5 + bias + 0.1 * (len(first) - len(second)), 0), 1)

def wanted(prompt, response, reference, level, **fields):
    return reference * level

def long(completion):
    return len(completion)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(CODE.format(folder=tmp_path))
    return tmp_path


def samples(texts, **fields):
    return [Sample(p, c, **fields) for p, c in texts]


def reward(folder, function, **values):
    config = JudgeRewardConfig(function=f"{folder}/mine.py:{function}", num_workers=1, **values)
    return JudgeReward("j", config, make_mesh(MeshConfig()), folder)


def test_a_score_is_mapped_as_in_the_paper(folder):
    judge = reward(folder, "wanted")
    given = [
        Sample("p", "c", reference=reference, fields={"level": 0.5})
        for reference in (2, 11, 20, 21)
    ]  # fmt: skip
    found = judge(given[:3])
    assert [s.value for s in found] == pytest.approx([-1, 0, 1])
    assert [s.parts["score"] for s in found] == pytest.approx([1, 5.5, 10])
    judge.close()
    judge = reward(folder, "wanted", best_score=5)
    assert judge([Sample("p", "c", reference=4, fields={"level": 1})])[0].value == pytest.approx(
        0.5
    )
    judge.close()


def test_samples_of_a_prompt_against_each_other(folder):
    judge = reward(folder, "longer", method="pairwise")
    texts = [("p", "x"), ("p", "xxx"), ("p", "xx"), ("q", "a"), ("q", "bbbb"), ("r", "c")]
    found = judge(samples(texts))
    # x loses to xxx by 0.2 and to xx by 0.1, whatever the bias.
    expected = [(0.3 + 0.4) / 2, (0.7 + 0.6) / 2, (0.6 + 0.4) / 2, 0.2, 0.8]
    assert [s.value for s in found[:5]] == pytest.approx(expected)
    assert [s.parts["first_place"] for s in found[:5]] == pytest.approx([0.6] * 5)
    assert found[5].value is None and "one sample of its prompt; prompt 'r'" in found[5].error
    judge.close()


def test_equal_samples_are_as_good_and_nobody_is_asked(folder):
    judge = reward(folder, "longer", method="pairwise")
    found = judge(samples([("p", "x"), ("p", "x"), ("p", "xx")]))
    assert [s.value for s in found] == pytest.approx([(0.5 + 0.4) / 2] * 2 + [0.6])
    asked = (folder / "calls").read_text().split()
    assert sorted(asked) == ["x>xx", "xx>x"], "both equal pairs are one question"
    judge(samples([("p", "xx"), ("p", "x")]))
    assert (folder / "calls").read_text().split() == asked, "from the cache"
    judge.close()


def test_what_has_no_verdict_does_not_count(folder):
    judge = reward(folder, "longer", method="pairwise")
    found = judge(samples([("p", "x"), ("p", "xx"), ("p", "raise")]))
    assert [s.value for s in found[:2]] == pytest.approx([0.4, 0.6])
    assert found[2].value is None and "ValueError: no opinion" in found[2].error
    judge.close()


def test_beside_other_rewards(folder):
    config = RewardConfig(
        functions={"long": {"function": f"{folder}/mine.py:long", "weight": 10.0}},
        judges={
            "better": {"function": f"{folder}/mine.py:longer", "method": "pairwise",
                       "weight": 2.0, "num_workers": 1, "where": {"kind": "a"}},
            "score": {"function": f"{folder}/mine.py:wanted", "weight": 0.0, "num_workers": 1},
        },
        num_workers=1,
    )  # fmt: skip
    tokenizer = vocab_tokenizer(["<bos>", "<eos>", "<pad>"])
    given = [
        Sample(p, c, reference=1, fields={"kind": kind, "level": 10})
        for p, c, kind in (("p", "x", "a"), ("p", "xx", "a"), ("q", "xxx", "b"))
    ]
    log_path = folder / "run" / "rewards.log"
    with Rewards(config, tokenizer, make_mesh(MeshConfig()), log_path=log_path) as rewards:
        found = rewards(given)
    values = [10 * 1 + 2 * 0.4, 10 * 2 + 2 * 0.6, 10 * 3]
    np.testing.assert_allclose([s.value for s in found], values)
    assert dict(found[0].parts) == pytest.approx(
        {"long": 1, "better": 0.4, "better/first_place": 0.6, "score": 1, "score/score": 10}
    )
    assert "better" not in found[2].parts
    kept = {p.relative_to(folder / "run").as_posix() for p in (folder / "run").rglob("*.sqlite")}
    assert kept == {"judges/better/judge.sqlite", "judges/score/judge.sqlite"}
    assert config.weights == {"long": 10.0, "better": 2.0, "score": 0.0}


def test_bad_configs():
    judge = {"function": "a.b"}
    with pytest.raises(ValidationError, match="'x' stands in functions and in judges"):
        RewardConfig(functions={"x": {"function": "verify.exact"}}, judges={"x": judge})
    with pytest.raises(ValidationError, match="at least one of functions, models and judges"):
        RewardConfig()
