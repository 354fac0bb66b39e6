"""A Python function as a judge: probabilities, scores, and what it may not say."""

import pytest

from alignjax.core.errors import UserError
from alignjax.rewards.judge import Item, Judge, Pair
from alignjax.rewards.judge_config import JudgeConfig, JudgingConfig
from alignjax.rewards.judge_function import FunctionAsk, source_digest

CODE = """
import time

def pair(prompt, first, second, *, bias=0.0, **fields):
    if "hang" in first:
        time.sleep(60)
    if "odd" in first:
        return 1.5
    if "raise" in first:
        raise ValueError("no opinion")
    return 0.5 + bias + 0.1 * (len(first) - len(second)) * fields.get("scale", 1)

def score(prompt, response):
    return float(response)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge") / "mine.py"
    path.write_text(CODE)
    return path


@pytest.fixture(scope="module")
def pairwise(file):
    ask = FunctionAsk(
        JudgeConfig(function=f"{file}:pair", args={"bias": 0.2}, timeout_s=1.0, num_workers=1)
    )
    yield Judge(ask, JudgingConfig(), None)
    ask.close()


def test_pairs(pairwise):
    found = pairwise.pairwise([
        Pair([{"role": "user", "content": "p"}], "xx", "y"), Pair("p", "xx", "y", {"scale": 2}),
        Pair("p", "raise", "y"), Pair("p", "hang", "y"), Pair("p", "x", "y"),
    ])  # fmt: skip
    assert [v.value for v in found[:2]] == pytest.approx([0.6, 0.7])
    assert found[0].places == pytest.approx((0.8, 0.6))
    assert found[2].is_failed and "ValueError: no opinion" in found[2].error
    assert found[3].is_failed and "no answer within 1 s" in found[3].error
    assert found[4].value == 0.5
    with pytest.raises(UserError, match=r"1\.5 is no probability; expected a number from 0 to 1"):
        pairwise.pairwise([Pair("p", "odd", "y")])


def test_scores(file):
    ask = FunctionAsk(JudgeConfig(function=f"{file}:score", num_workers=1))
    judge = Judge(ask, JudgingConfig(), None)
    values = [1.0, 2.25, 9.5, 10.0]
    found = judge.pointwise([Item("p", str(value)) for value in values])
    assert [v.value for v in found] == pytest.approx(values)
    for value in (0.5, 10.5):
        with pytest.raises(UserError, match=f"{value} is no score; expected a number from 1 to 10"):
            judge.pointwise([Item("p", str(value))])
    ask.close()


def test_a_function_is_known_by_its_file(file, monkeypatch, tmp_path):
    before = source_digest(f"{file}:pair")
    assert before and before == source_digest(f"{file}:score")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    assert source_digest("package.mine.pair") == source_digest("package.mine:pair") == before
    (tmp_path / "package" / "mine.py").write_text(CODE + "\n")
    assert source_digest("package.mine.pair") not in ("", before)
    assert source_digest("alignjax.recipes.manners.hidden")
    assert source_digest("no.such.module") == ""
    one, other = (
        FunctionAsk(JudgeConfig(function=f"{file}:pair", args={"bias": b}, num_workers=1))
        for b in (0.0, 0.1)
    )
    assert one.identity != other.identity
    one.close(), other.close()
    with pytest.raises(UserError, match="has no function 'par'"):
        FunctionAsk(JudgeConfig(function=f"{file}:par"))
