"""Named, weighted reward functions (a config) and what each returned -> one score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, JsonValue

from alignjax.core.config import Config
from alignjax.core.types import Score

MAX_REWARD = 3e38
"""Rewards are float32 from here on; what is above would be infinite there."""
Name = Annotated[str, Field(pattern=r"^[\w.-]+$")]


class FunctionConfig(Config):
    """One reward function.

    Attributes:
      function: a built-in (`verify.math`, `verify.exact`, `verify.numeric`,
        `verify.calculations`, `format.tags`, `format.matches`, `format.length`),
        `package.module:function`, `package.module.function` or `path/to/file.py:function`.
      weight: what its value is multiplied by; 0 only logs it.
      args: its options, by name.
    """

    function: str
    weight: float = Field(default=1.0, allow_inf_nan=False)
    args: dict[str, JsonValue] = Field(default_factory=dict)


class RewardConfig(Config):
    """The reward: the weighted sum of functions.

    Attributes:
      functions: by the name that the metrics use (`rewards/NAME/mean`).
      timeout_s: limit on one call of one function, in seconds of wall clock.
      num_workers: processes that score.
      max_memory_mb: limit on the address space of a worker, in MiB; none if null.
      max_failure_frac: the share of failed samples, in [0, 1], above which the run stops.
    """

    functions: dict[Name, FunctionConfig] = Field(min_length=1)
    timeout_s: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    num_workers: int = Field(default=2, ge=1)
    max_memory_mb: int | None = Field(default=None, ge=64)
    max_failure_frac: float = Field(default=0.2, ge=0, le=1)


def combine(config: RewardConfig, parts: Mapping[str, Mapping[str, float]]) -> Score:
    """Sum over functions of weight x value.

    Args:
      config: weights.
      parts: for each function what `functions.named_parts` made of its result.
    Returns:
      The score. Its parts are unweighted: the value of each function under its name, and the named
      parts of a function that returned a dict under `name/part`.
    """
    value = math.fsum(f.weight * parts[name][""] for name, f in config.functions.items())
    flat = {
        f"{name}/{part}" if part else name: number
        for name, named in parts.items()
        for part, number in named.items()
    }
    if not abs(value) <= MAX_REWARD:
        why = f"the weighted sum of the rewards {flat} is {value}, which no float32 holds"
        return Score(None, flat, why)
    return Score(value, flat)


def too_many_failures(scores: Sequence[Score], max_failure_frac: float) -> str | None:
    """Why a run must stop, if more than a share of its samples has no score; else None."""
    errors = [score.error for score in scores if score.value is None]
    if len(errors) <= max_failure_frac * len(scores):
        return None
    return (
        f"{len(errors)} of {len(scores)} samples have no reward, more than max_failure_frac="
        f"{max_failure_frac:g} allows. The first: {errors[0]}"
    )
