"""What can be set of PPO."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from alignjax import losses
from alignjax.core.config import Config
from alignjax.data import TextConfig
from alignjax.phases.grpo_config import (
    EvalConfig,
    RlConfig,
    check_importance_cap,
    check_staleness,
)
from alignjax.phases.rollout_config import RolloutConfig


class PpoAlgorithm(Config):
    """PPO for language models (arXiv:2203.02155), whose rewards hold the KL of each token."""

    kl_coef: float = Field(0.05, gt=0, allow_inf_nan=False)
    """What a nat of KL from the first policy costs; at first, where kl_control moves it."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    kl_control: Literal["fixed", "adaptive", "target"] = "fixed"
    """How kl_coef follows the KL that is measured: not at all, in proportion to how far it is from
    kl_target (arXiv:1909.08593), or by doubling and halving (arXiv:1707.06347 sec. 4)."""
    kl_target: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Nats for each completion; of adaptive and target alone."""
    kl_horizon: int = Field(10_000, ge=1)
    """Completions in which an adaptive kl_coef may change by a factor of about e^0.2."""
    gamma: float = Field(1.0, ge=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    clip_low: float = Field(0.2, ge=0, lt=1)
    clip_high: float = Field(0.2, ge=0, allow_inf_nan=False)
    dual: float | None = Field(None, gt=1, allow_inf_nan=False)
    """Limit of the ratio where the advantage is negative (dual clip); null for none."""
    value_coef: float = Field(0.1, ge=0, allow_inf_nan=False)
    """Weight of the critic's loss."""
    value_clip: float = Field(0.2, gt=0, allow_inf_nan=False)
    """Reward units that an iteration may move a value by for gain."""
    num_epochs: int = Field(4, ge=1)
    """Passes over the rollouts of an iteration, each in another order."""
    num_minibatches: int = Field(1, ge=1)
    """Parts that rollouts are split into, with one optimizer update each."""
    old_logps: Literal["sampler", "trainer"] = "sampler"
    """What ratios and the KL are taken from: the log-probs recorded while sampling, which cost
    nothing and are those that was sampled from; or those of a forward pass before the first update,
    for a sampler that computes with fewer bits than the trainer."""
    importance_cap: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Multiplies the policy's loss of a token by exp(old log-prob - that recorded while sampling),
    but by no more than this: where it was sampled by other weights, or with fewer bits, than are
    trained. Takes old_logps: trainer; 2 is usual. null: no weights. As of grpo."""
    whiten_advantages: bool = True
    """Over all tokens of the iteration."""
    whiten_rewards: bool = False
    """Divide the rewards of all tokens of the iteration by their standard deviation."""
    scale_scores: bool = False
    """Divide scores by their standard deviation over the run so far (arXiv:2307.04964)."""
    missing_eos_penalty: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Taken off the score of a completion that was cut at rollout.max_tokens."""
    ptx_coef: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the cross-entropy on the records of ptx (PPO-ptx)."""

    @model_validator(mode="after")
    def _has_target(self) -> Self:
        if (self.kl_target is None) != (self.kl_control == "fixed"):
            raise ValueError(
                f"kl_control={self.kl_control!r} with kl_target={self.kl_target}: adaptive and "
                "target need the KL that they aim at, in nats for each completion; fixed has none"
            )
        return self

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        check_importance_cap(self.old_logps, self.importance_cap)
        return self

    @property
    def algorithm(self) -> losses.Algorithm:
        """As `losses.policy_loss` takes it."""
        options = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        surrogate = "ppo_clip"
        if self.dual is not None:
            surrogate, options["dual"] = "dual_clip", self.dual
        return losses.Algorithm(
            "gae", surrogate, "token_mean", importance_cap=self.importance_cap, options=options
        )


class CriticConfig(Config):
    """What estimates the reward that is to come."""

    trunk: Literal["separate", "shared"] = "separate"
    """A model of its own, or a head on the policy's hidden states."""
    path: str | None = None
    """The reward model that a separate one starts as; null: the first of rewards.models, and where
    there is none the weights of the policy with a head of zeros."""
    from_policy: bool = False
    """Start from the weights of the policy in any case."""
    learning_rate_scale: float = Field(1.0, gt=0, allow_inf_nan=False)
    """The critic's learning rate is so many times optimizer.learning_rate."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if self.path is not None and (self.from_policy or self.trunk == "shared"):
            other = "from_policy" if self.from_policy else "trunk: shared"
            raise ValueError(
                f"path={self.path!r} and {other}: a critic that is read has a trunk of its own; "
                "leave one out"
            )
        return self


class PtxConfig(Config):
    """Texts whose cross-entropy is added to the loss, so that the policy does not forget them."""

    train: str | list[str]
    """As for sft."""
    text: TextConfig
    rows: int = Field(1, ge=1)
    """Rows of a micro-batch besides those of rollouts, and as long, over all devices."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with an example longer than a row. It is never cut."""


class PpoRollout(RolloutConfig):
    """How prompts are sampled in an iteration."""

    group_size: int = 1
    """Completions of each prompt."""

    @field_validator("group_size")
    @classmethod
    def _is_group(cls, size: int) -> int:
        if size < 1:
            raise ValueError(f"group_size={size}: expected at least 1 completion of each prompt")
        return size


class PpoEvalConfig(EvalConfig):
    """How held-out problems are sampled in an evaluation."""

    best_of_n: int = Field(0, ge=0)
    """Also the best of so many samples of the first policy, by the reward: what costs no training;
    0 for none."""


class PpoConfig(RlConfig):
    """`phase: ppo`."""

    phase: Literal["ppo"]
    rollout: PpoRollout = PpoRollout()
    algorithm: PpoAlgorithm = PpoAlgorithm()
    critic: CriticConfig = CriticConfig()
    ptx: PtxConfig | None = None
    evaluation: PpoEvalConfig = PpoEvalConfig()

    @property
    def num_minibatches(self) -> int:
        return self.algorithm.num_minibatches

    @model_validator(mode="after")
    def _weighs_what_is_stale(self) -> Self:
        check_staleness(self.rollout, self.algorithm.importance_cap)
        return self

    @model_validator(mode="after")
    def _has_texts(self) -> Self:
        if (self.ptx is None) != (self.algorithm.ptx_coef == 0):
            raise ValueError(
                f"algorithm.ptx_coef={self.algorithm.ptx_coef} "
                f"{'without' if self.ptx is None else 'with'} ptx: give both, or neither"
            )
        return self

    @model_validator(mode="after")
    def _is_slow_enough(self) -> Self:
        total = self.rollout.num_prompts * self.rollout.group_size
        limits = self.algorithm
        if limits.kl_control == "adaptive" and total >= 5 * limits.kl_horizon:
            raise ValueError(
                f"algorithm.kl_horizon={limits.kl_horizon} is too short for {total} completions in "
                "an iteration: kl_coef could become negative; use more than a fifth of them"
            )
        return self
