"""What can be set of rejection sampling."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from alignjax.core.config import Config
from alignjax.phases.sample_config import ResponsesConfig
from alignjax.rewards.combine import RewardConfig


class Threshold(Config):
    """What a part of the reward must be, for a completion to be kept."""

    at_least: float | None = Field(None, allow_inf_nan=False)
    at_most: float | None = Field(None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _is_bound(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise ValueError("give at_least, at_most or both: this keeps everything")
        low, high = self.at_least, self.at_most
        if low is not None and high is not None and low > high:
            raise ValueError(f"at_least={low} is above at_most={high}: nothing can be kept")
        return self

    def holds(self, value: float) -> bool:
        """Whether the value is within the bounds, which are part of what is allowed."""
        low = self.at_least is None or value >= self.at_least
        return low and (self.at_most is None or value <= self.at_most)


class RejectConfig(ResponsesConfig):
    """`phase: reject`."""

    phase: Literal["reject"]
    rewards: RewardConfig
    """What the completions are judged by. A weight matters only where max_per_prompt chooses."""
    keep: dict[str, Threshold] = Field(min_length=1)
    """By the name of a reward, or NAME/PART for a part of one, what a completion must reach, such
    as `{accuracy: {at_least: 1.0}}`. One that fails several is counted under the first. That of a
    reward which is for some prompts alone (`where`) holds for these."""
    max_per_prompt: int | None = Field(None, ge=1)
    """Completions that are kept of each prompt, at most, those of the highest reward, so that easy
    prompts do not crowd out the others; null: all."""
    balance: str | None = None
    """A field of the records, such as their level: balanced.jsonl then has as many completions of
    each of its values, chosen at random, as of the value with the fewest."""

    @model_validator(mode="after")
    def _names_rewards(self) -> Self:
        for name in self.keep:
            if name.partition("/")[0] not in self.rewards.weights:
                raise ValueError(
                    f"keep: there is no reward {name!r}; there are "
                    f"{', '.join(self.rewards.weights)}"
                )
        return self
