"""What can be set of the RL phase, and the presets that name a paper."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from alignjax.core.config import Config
from alignjax.data import TextConfig
from alignjax.phases.common import PhaseConfig
from alignjax.rewards.combine import RewardConfig

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"advantage": "zscore", "reduction": "sequence_mean", "kl_coef": 0.04},
    "dr_grpo": {"advantage": "center", "reduction": "fixed_length"},
    "dapo": {
        "advantage": "zscore",
        "reduction": "token_mean",
        "clip_high": 0.28,
        "dynamic_sampling": True,
        "overlong_frac": 0.2,
    },
}
"""GRPO arXiv:2402.03300 sec. 4.2, Dr. GRPO arXiv:2503.20783, DAPO arXiv:2503.14476 sec. 4.1."""


class AlgorithmConfig(Config):
    """A preset, any part of which may be set otherwise."""

    preset: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    advantage: Literal["zscore", "center"]
    """zscore divides by the standard deviation of the group, center does not."""
    reduction: Literal["sequence_mean", "token_mean", "fixed_length"]
    """Mean over sequences of token means; mean over all tokens; or over the longest possible."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    clip_high: float = Field(0.2, ge=0)
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL to the reference in the loss; 0 needs no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    reference_every: int = Field(0, ge=0)
    """Iterations after which the policy becomes the reference; 0 keeps the first one for good."""
    num_updates: int = Field(1, ge=1)
    """Passes over the rollouts of an iteration."""
    num_minibatches: int = Field(1, ge=1)
    """Parts that rollouts are split into, with one optimizer update each."""
    dynamic_sampling: bool = False
    """Leave out groups whose rewards are all equal, and sample other prompts instead."""
    max_rounds: int = Field(4, ge=1)
    """With dynamic sampling: rounds of sampling in one iteration, at most."""
    overlong_frac: float = Field(0.0, ge=0, le=1)
    """Share of max_tokens, before the limit, over which the reward falls by up to 1."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", "grpo")
        # Of an unknown one nothing follows, and nothing but that is to be complained about.
        known = preset if isinstance(preset, str) and preset in PRESETS else "grpo"
        return PRESETS[known] | values

    @model_validator(mode="after")
    def _has_reference(self) -> Self:
        if self.reference_every and not self.kl_coef:
            raise ValueError(
                f"reference_every={self.reference_every} without kl_coef, which is 0: there is no "
                "reference; give both, or neither"
            )
        return self


class RolloutConfig(Config):
    """How prompts are sampled in an iteration."""

    num_prompts: int = Field(32, ge=1)
    group_size: int = 8
    """Completions of each prompt; what each is compared with is the others."""
    max_prompt_tokens: int = Field(256, ge=1)
    max_tokens: int = Field(256, ge=1)
    """Limit on the tokens of a completion, EOS included."""
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    stop_tokens: list[str] = []
    """Tokens that end a completion, besides EOS and what the model's directory lists as such."""
    max_rows: int = Field(1024, ge=1)
    """Completions that are sampled at once, at most."""

    @field_validator("group_size")
    @classmethod
    def _is_group(cls, size: int) -> int:
        if size < 2:
            raise ValueError(f"group_size={size} gives no baseline; use at least 2")
        return size


class EvalConfig(Config):
    """How held-out problems are sampled in an evaluation."""

    num_problems: int = Field(256, ge=1)
    num_samples: int = Field(1, ge=0)
    """Samples of each problem at the temperature of the rollouts; 0 for none."""
    greedy: bool = True
    """Also one completion of each at temperature 0."""
    num_shown: int = Field(3, ge=0)
    """Samples written to samples.jsonl at each evaluation, always of the same problems."""


class RlData(Config):
    """Prompts to train on, and how rollouts become rows."""

    train: str | list[str]
    """As for sft."""
    eval: str | list[str] | None = None
    text: TextConfig
    overlong: Literal["error", "drop"] = "error"
    """What to do with a prompt longer than rollout.max_prompt_tokens. It is never cut."""
    micro_batches: int = Field(1, ge=1)
    """Micro-batches in an update; packed rows that fill fewer save the time of the others."""
    packed: bool = True


class GrpoConfig(PhaseConfig):
    """`phase: grpo`."""

    phase: Literal["grpo"]
    data: RlData
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = Field(default_factory=lambda: AlgorithmConfig(**{}))
    rewards: RewardConfig
    evaluation: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _divides(self) -> "GrpoConfig":
        rows, parts = self.rows_per_update, self.data.micro_batches
        total = self.rollout.num_prompts * self.rollout.group_size
        if total % self.algorithm.num_minibatches or rows % parts:
            raise ValueError(
                f"{total} completions (rollout.num_prompts x group_size) do not divide into "
                f"{self.algorithm.num_minibatches} minibatches of {parts} micro-batches"
            )
        return self

    @property
    def rows_per_update(self) -> int:
        return self.rollout.num_prompts * self.rollout.group_size // self.algorithm.num_minibatches
