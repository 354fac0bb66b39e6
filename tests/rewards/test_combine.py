"""Weights, parts, and the share of failures."""

import pytest
from pydantic import ValidationError

from alignjax.core.types import Score
from alignjax.rewards.combine import (
    FunctionConfig,
    RewardConfig,
    add_models,
    combine,
    names_for,
    too_many_failures,
)

CONFIG = RewardConfig(
    functions={
        "accuracy": FunctionConfig(function="verify.exact", weight=0.9),
        "format": FunctionConfig(function="format.tags", weight=0.1),
        "seen": FunctionConfig(function="format.tags", weight=0),
    }
)


def test_weighted_sum() -> None:
    score = combine(
        CONFIG, {"accuracy": {"": 1.0}, "format": {"": -2.0, "x": 3.0}, "seen": {"": 5.0}}
    )
    assert score.value == pytest.approx(0.9 * 1 - 0.1 * 2, abs=1e-15)
    assert score.parts == {"accuracy": 1.0, "format": -2.0, "format/x": 3.0, "seen": 5.0}
    assert score.error is None


def test_overflow_is_a_failure() -> None:
    config = RewardConfig(functions={"a": FunctionConfig(function="verify.exact", weight=1e200)})
    score = combine(config, {"a": {"": 1e200}})
    assert score.value is None and "is inf" in score.error
    assert combine(config, {"a": {"": float("nan")}}).value is None
    for value, is_valid in ((3e38, True), (1e39, False), (-1e39, False)):
        config = RewardConfig(functions={"a": FunctionConfig(function="verify.exact")})
        assert (combine(config, {"a": {"": value}}).value is not None) == is_valid


@pytest.mark.parametrize(
    "bad",
    [
        {"functions": {}},
        {"functions": {"a b": {"function": "verify.exact"}}},
        {"functions": {"a": {"function": "verify.exact", "weigth": 1.0}}},
        {"functions": {"a": {"function": "verify.exact", "weight": float("nan")}}},
        {"functions": {"a": {"function": "verify.exact"}}, "timeout_s": 0.0},
        {"functions": {"a": {"function": "verify.exact"}}, "max_failure_frac": 1.5},
    ],
)
def test_bad_configs(bad: dict) -> None:
    with pytest.raises(ValidationError):
        RewardConfig(**bad)


def test_too_many_failures() -> None:
    good, bad = Score(0.0), Score(None, error="reward 'a': it hung")
    assert too_many_failures([good, good, good, bad], 0.25) is None
    assert too_many_failures([], 0.0) is None
    message = too_many_failures([good, bad, bad, good], 0.25)
    assert message == (
        "2 of 4 samples have no reward, more than max_failure_frac=0.25 allows. "
        "The first: reward 'a': it hung"
    )


def test_a_reward_is_for_the_prompts_that_its_where_names() -> None:
    config = RewardConfig.model_validate(
        {
            "functions": {
                "sums": {"function": "verify.exact", "weight": 0.9, "where": {"kind": "sum"}},
                "hard": {"function": "x.y", "where": {"kind": "sum", "level": 3}},
                "format": {"function": "format.tags", "weight": 0.1},
            },
            "models": {"liked": {"path": "x", "weight": 2.0, "where": {"kind": "other"}}},
        }
    )
    rewards = config.by_name
    assert names_for(rewards, {"kind": "sum", "level": 3}) == ["sums", "hard", "format"]
    assert names_for(rewards, {"kind": "sum", "level": "3"}) == ["sums", "format"]
    assert names_for(rewards, {"kind": "other", "level": 3}) == ["format", "liked"]
    with pytest.raises(
        ValueError, match=r"^reward 'sums': where: the record has no field 'kind' .*'level'\)$"
    ):
        names_for(rewards, {"level": 3})
    # Who does not get a reward gets nothing from it, and has no such part.
    score = combine(config, {"format": {"": 1.0}})
    assert score.value == pytest.approx(0.1) and score.parts == {"format": 1.0}
    both = add_models(config, score, {"liked": Score(0.25)})
    assert both.value == pytest.approx(0.6) and both.parts == {"format": 1.0, "liked": 0.25}
