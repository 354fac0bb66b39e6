"""Named, weighted rewards (a config) and what each returned -> one score."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from alignjax.core.config import Config
from alignjax.core.types import Score
from alignjax.rewards.judge_config import JudgeConfig

MAX_REWARD = 3e38
"""Rewards are float32 from here on; what is above would be infinite there."""
Name = Annotated[str, Field(pattern=r"^[\w.-]+$")]


class Reward(Config):
    """What every reward has.

    Attributes:
      weight: what its value is multiplied by; 0 only logs it.
      where: the prompts that it is for: those whose record has these values in these fields, such
        as `{kind: arithmetic}`. Others get nothing from it and do not count in its metrics; to a
        record that lacks such a field no reward can be given. All prompts if empty.
    """

    weight: float = Field(default=1.0, allow_inf_nan=False)
    where: dict[str, JsonValue] = Field(default_factory=dict)


class FunctionConfig(Reward):
    """One reward function.

    Attributes:
      function: a built-in (`verify.math`, `verify.exact`, `verify.numeric`,
        `verify.calculations`, `format.tags`, `format.matches`, `format.script`, `format.length`,
        `format.reflects`), `package.module:function`, `package.module.function` or
        `path/to/file.py:function`.
      args: its options, by name.
    """

    function: str
    args: dict[str, JsonValue] = Field(default_factory=dict)


class RewardModelConfig(Reward):
    """One reward model, whose score counts as (score - mean) / std.

    Attributes:
      path: a directory that `phase: reward` wrote, or a classifier of transformers with one label
        and its tokenizer, which must be the policy's.
      mean, std: of its scores on reference responses; null: those of reward.json in the directory.
      squash: `sigmoid` maps what is normalised to 0..1, so that it stands beside rules that give 0
        or 1, and more and more of what the model likes pays less and less.
      compute_dtype: of its matrix products; auto: bfloat16 on TPU and GPU, float32 on CPU.
    """

    path: str
    mean: float | None = Field(default=None, allow_inf_nan=False)
    std: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    squash: Literal["sigmoid"] | None = None
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @model_validator(mode="after")
    def _is_both(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError(
                f"mean={self.mean}, std={self.std}: give both, or neither for those of reward.json"
            )
        return self


class JudgeRewardConfig(JudgeConfig, Reward):
    """A judge whose opinion is the reward (direct RLAIF, arXiv:2309.00267 sec. 2.2.2).

    Attributes:
      method: pointwise: the expected score, mapped from 1..best_score to -1..1, as in the paper;
        as it is, it is the part `score`. pairwise: the mean probability, 0 to 1, that a sample is
        better than another one of its prompt; the part `first_place` is how probable it was that
        what stood first is better, 1/2 without a bias.
    """

    method: Literal["pointwise", "pairwise"] = "pointwise"


class RewardConfig(Config):
    """The reward: the weighted sum of functions, of reward models and of judges.

    Attributes:
      functions: by the name that the metrics use (`rewards/NAME/mean`).
      models, judges: likewise.
      timeout_s: limit on one call of one function, in seconds of wall clock.
      num_workers: processes that score.
      max_memory_mb: limit on the address space of a worker, in MiB; none if null.
      max_failure_frac: the share of failed samples, in [0, 1], above which the run stops.
    """

    functions: dict[Name, FunctionConfig] = {}
    models: dict[Name, RewardModelConfig] = {}
    judges: dict[Name, JudgeRewardConfig] = {}
    timeout_s: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    num_workers: int = Field(default=2, ge=1)
    max_memory_mb: int | None = Field(default=None, ge=64)
    max_failure_frac: float = Field(default=0.2, ge=0, le=1)

    @model_validator(mode="after")
    def _is_there(self) -> Self:
        kinds = {"functions": self.functions, "models": self.models, "judges": self.judges}
        if not any(kinds.values()):
            raise ValueError("expected at least one of functions, models and judges, came none")
        for one, other in itertools.combinations(kinds, 2):
            if twice := sorted(kinds[one].keys() & kinds[other].keys()):
                raise ValueError(
                    f"{twice[0]!r} stands in {one} and in {other}, and metrics could not tell them "
                    "apart: rename one"
                )
        return self

    @property
    def by_name(self) -> dict[str, Reward]:
        """Functions, models and judges, by their names."""
        return {**self.functions, **self.models, **self.judges}

    @property
    def weights(self) -> dict[str, float]:
        """Of each reward, by its name."""
        return {name: reward.weight for name, reward in self.by_name.items()}


def names_for(rewards: Mapping[str, Reward], fields: Mapping[str, Any]) -> list[str]:
    """The rewards that a prompt gets, by their `where`, in order.

    Args:
      rewards: by name.
      fields: of the prompt's record, as of `Sample`.
    Raises:
      ValueError: if the record lacks a field that a `where` names.
    """
    for name, reward in rewards.items():
        if missing := sorted(reward.where.keys() - fields.keys()):
            raise ValueError(
                f"reward {name!r}: where: the record has no field {missing[0]!r} (fields there: "
                f"{', '.join(map(repr, fields)) or 'none'})"
            )
    return [
        name
        for name, reward in rewards.items()
        if all(fields[key] == value for key, value in reward.where.items())
    ]


def combine(config: RewardConfig, parts: Mapping[str, Mapping[str, float]]) -> Score:
    """Sum over functions of weight x value.

    Args:
      config: weights.
      parts: for each function that the prompt gets (`names_for`) what `functions.named_parts` made
        of its result.
    Returns:
      The score. Its parts are unweighted: the value of each function under its name, and the named
      parts of a function that returned a dict under `name/part`.
    """
    value = math.fsum(config.functions[name].weight * named[""] for name, named in parts.items())
    flat = {
        f"{name}/{part}" if part else name: number
        for name, named in parts.items()
        for part, number in named.items()
    }
    return _finite(value, flat)


def add_models(config: RewardConfig, score: Score, models: Mapping[str, Score]) -> Score:
    """The score of the functions, plus weight x value of each reward model and judge.

    Args:
      score: what `combine` gave; of value 0 where there are no functions.
      models: by name what each model and judge that the prompt gets gave. One without a value
        leaves the sample without.
    """
    known = {name: one.value for name, one in models.items() if one.value is not None}
    of_parts = {f"{n}/{part}": v for n, one in models.items() for part, v in one.parts.items()}
    parts = {**score.parts, **known, **of_parts}
    for one in (score, *models.values()):
        if one.value is None:
            return Score(None, parts, one.error)
    assert score.value is not None
    added = (config.weights[name] * value for name, value in known.items())
    return _finite(math.fsum((score.value, *added)), parts)


def _finite(value: float, parts: Mapping[str, float]) -> Score:
    if not abs(value) <= MAX_REWARD:
        why = f"the weighted sum of the rewards {dict(parts)} is {value}, which no float32 holds"
        return Score(None, parts, why)
    return Score(value, parts)


def too_many_failures(scores: Sequence[Score], max_failure_frac: float) -> str | None:
    """Why a run must stop, if more than a share of its samples has no score; else None."""
    errors = [score.error for score in scores if score.value is None]
    if len(errors) <= max_failure_frac * len(scores):
        return None
    return (
        f"{len(errors)} of {len(scores)} samples have no reward, more than max_failure_frac="
        f"{max_failure_frac:g} allows. The first: {errors[0]}"
    )
