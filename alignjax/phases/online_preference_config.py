"""What can be set of online DPO."""

from typing import Literal, Self

from pydantic import Field, model_validator

from alignjax.core.config import Config
from alignjax.phases.grpo_config import RlConfig, RlData
from alignjax.phases.preference_config import ObjectiveConfig
from alignjax.phases.preference_loss import K


class OnlineData(RlData):
    """Prompts, and how pairs of samples become rows."""

    shared_prompt: bool = True
    """Compute the prompt once for both completions."""


class UpdatesConfig(Config):
    """How often an iteration's pairs are learned from."""

    num_updates: int = Field(1, ge=1)
    """Passes over the pairs of an iteration."""
    num_minibatches: int = Field(1, ge=1)
    """Parts that they are split into, with one optimizer update each."""


class OnlineConfig(ObjectiveConfig, RlConfig):
    """`phase: online_preference`."""

    phase: Literal["online_preference"]
    data: OnlineData
    algorithm: UpdatesConfig = UpdatesConfig()

    @model_validator(mode="after")
    def _divides(self) -> Self:
        self.check_micro_batches(self.data.micro_batches)
        if "preference_prob" in self.objective.takes:
            raise ValueError("losses: soft_dpo takes probabilities, and a reward gives none")
        parts = self.num_minibatches * self.data.micro_batches
        if self.rollout.num_prompts % parts:
            raise ValueError(
                f"rollout.num_prompts={self.rollout.num_prompts} pairs do not divide into "
                f"{self.num_minibatches} minibatches of {self.data.micro_batches} micro-batches"
            )
        return self

    @property
    def num_minibatches(self) -> int:
        return self.algorithm.num_minibatches

    @property
    def rows_per_update(self) -> int:
        """One for each pair; of losses of single completions one for each of these."""
        pairs = self.rollout.num_prompts // self.num_minibatches
        return pairs * K if self.objective.is_unpaired else pairs

    @property
    def row_len(self) -> int:
        """Tokens of the longest pair."""
        prompt, completion = self.rollout.max_prompt_tokens, self.rollout.max_tokens
        if self.data.shared_prompt:
            return prompt - 1 + K * (1 + completion)
        return K * (prompt + completion)
