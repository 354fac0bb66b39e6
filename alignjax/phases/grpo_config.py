"""What can be set of the RL phase, and the presets that name a paper."""

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self

import jax
import numpy as np
from jax.sharding import Mesh
from pydantic import Field, model_validator

from alignjax import losses
from alignjax.core.config import Config
from alignjax.data import TextConfig
from alignjax.phases.common import PhaseConfig
from alignjax.phases.rollout_config import RolloutConfig
from alignjax.rewards.combine import RewardConfig
from alignjax.sharding import batch_shards, make_mesh

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {}, "dr_grpo": {}, "dapo": {"dynamic_sampling": True, "overlong_frac": 0.2}, "bnpo": {},
    "gspo": {}, "gmpo": {}, "cispo": {}, "sapo": {}, "opo": {}, "gdpo": {}, "gpg": {}, "rloo": {},
    "reinforce_pp_baseline": {},
}  # fmt: skip
"""Those of `losses.PRESETS` whose advantage is that of a group of samples, with what each asks of
the phase besides (DAPO: arXiv:2503.14476 sec. 3.2 and 3.4)."""

HYPERPARAMETERS = ("clip_low", "clip_high", "dual", "tau_pos", "tau_neg")


class AlgorithmConfig(Config):
    """A preset, any part of which may be set otherwise. Names are those of `alignjax.losses`."""

    preset: Literal[*PRESETS] = "grpo"
    advantage: Literal[*(name for name in losses.ADVANTAGES if name != "remax")]
    """How a completion compares with its group."""
    level: Literal[*losses.LEVELS]
    """What a ratio is of: a token or a sequence."""
    surrogate: Literal[*losses.SURROGATES]
    """What is made of ratio and advantage."""
    reduction: Literal[*losses.REDUCTIONS]
    """What tokens are averaged over."""
    clip_low: float | None = None
    """Width of the trust region below a ratio of 1; null for surrogates that do not clip."""
    clip_high: float | None = None
    """The same above."""
    dual: float | None = None
    """Of dual_clip: limit of the ratio where the advantage is negative."""
    tau_pos: float | None = None
    """Of sapo: how fast the weight of a token falls off where the advantage is positive."""
    tau_neg: float | None = None
    """The same where it is negative."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL to the reference; 0 needs no reference."""
    kl_in_reward: bool = False
    """Take the KL, summed over a completion, off its reward, instead of adding it to the loss."""
    kl_estimator: Literal[*losses.KL_ESTIMATORS] = "k3"
    reference_every: int = Field(0, ge=0)
    """Iterations after which the policy becomes the reference; 0 keeps the first one for good."""
    num_updates: int = Field(1, ge=1)
    """Passes over the rollouts of an iteration."""
    num_minibatches: int = Field(1, ge=1)
    """Parts that rollouts are split into, with one optimizer update each."""
    old_logps: Literal["sampler", "trainer"] = "sampler"
    """What ratios are taken against: the log-probs recorded while sampling, which cost nothing and
    are those that was sampled from; or those of a forward pass before the first update, for a
    sampler that computes with fewer bits than the trainer."""
    importance_cap: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Multiplies the loss of a token by exp(old log-prob - that recorded while sampling), but by no
    more than this: where it was sampled by other weights, or with fewer bits, than are trained (F.
    Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025).
    Takes old_logps: trainer; 2 is usual. null: no weights."""
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
        chosen = losses.PRESETS[known]
        named = {name: getattr(chosen, name) for name in ("advantage", "level", "surrogate")}
        named |= {"reduction": chosen.reduction, "kl_coef": chosen.kl_coef}
        if chosen.kl_coef:
            named |= {"kl_estimator": chosen.kl, "kl_in_reward": chosen.kl_in_reward}
        values = {**named, **PRESETS[known], **values}
        surrogate = values["surrogate"]
        if surrogate in losses.SURROGATES:
            # Written out, so that what a run saves is what it reads back.
            defaults = keyword_defaults(getattr(losses, surrogate))
            options = chosen.options if surrogate == chosen.surrogate else {}
            values = {**defaults, **options, **values}
        return values

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        given = {name for name in HYPERPARAMETERS if getattr(self, name) is not None}
        taken = keyword_defaults(getattr(losses, self.surrogate))
        if given - taken.keys():
            raise ValueError(
                f"surrogate={self.surrogate!r} has no {', '.join(sorted(given - taken.keys()))}; "
                f"it has {', '.join(taken) or 'no hyperparameters'}"
            )
        # Raises on values that the surrogate refuses.
        losses.SURROGATES[self.surrogate](*_ONE_TOKEN, **self.algorithm.options)
        return self

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        check_importance_cap(self.old_logps, self.importance_cap)
        return self

    @model_validator(mode="after")
    def _has_reference(self) -> Self:
        if self.reference_every and not self.kl_coef:
            raise ValueError(
                f"reference_every={self.reference_every} without kl_coef, which is 0: there is no "
                "reference; give both, or neither"
            )
        return self

    @property
    def has_kl_in_loss(self) -> bool:
        return self.kl_coef > 0 and not self.kl_in_reward

    @property
    def algorithm(self) -> losses.Algorithm:
        """The same, as `losses.policy_loss` takes it."""
        options = {name: getattr(self, name) for name in HYPERPARAMETERS}
        return losses.Algorithm(
            advantage=self.advantage,
            level=self.level,
            surrogate=self.surrogate,
            reduction=self.reduction,
            kl=self.kl_estimator,
            kl_coef=self.kl_coef,
            kl_in_reward=self.kl_in_reward,
            importance_cap=self.importance_cap,
            options={name: value for name, value in options.items() if value is not None},
        )


def check_importance_cap(old_logps: str, importance_cap: float | None) -> None:
    """Raises: ValueError: if there would be nothing to weigh."""
    if importance_cap is not None and old_logps != "trainer":
        raise ValueError(
            f"importance_cap={importance_cap} with old_logps={old_logps!r}: a weight says how much "
            "more likely a token is to the trainer than to what sampled it; set old_logps: trainer"
        )


def keyword_defaults(function: Callable[..., Any]) -> dict[str, float]:
    """Keyword-only parameters of a surrogate and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


_ONE_TOKEN = (
    *(np.zeros((1, 1), np.float32) for _ in range(3)), np.ones((1, 1), bool),
    np.ones((1, 1), np.int32),
)  # fmt: skip


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


class RlConfig(PhaseConfig):
    """What the configs of phases share that sample what they train on."""

    data: RlData
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardConfig
    evaluation: EvalConfig = EvalConfig()
    deterministic: bool = False
    """Sample by the very computation of a training step, a whole pass for each token, so that both
    have the same log-probs to the last bit: on one device of a CPU, in float32. Slow, to look for
    faults; each completion then has a row of its own."""

    @model_validator(mode="after")
    def _samples_what_it_trains(self) -> Self:
        if self.model.lora is not None and self.model.lora.dropout > 0:
            raise ValueError(
                f"model.lora.dropout={self.model.lora.dropout} would train another policy than the "
                "one that samples, which drops nothing; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _is_deterministic(self) -> Self:
        if self.deterministic and (self.rollout.int8_kv or self.rollout.int8_weights):
            raise ValueError(
                "deterministic samples by the computation of training, which has no int8: set "
                "rollout.int8_kv and int8_weights to false"
            )
        if self.deterministic and (self.rollout.mesh is not None or self.rollout.is_apart):
            raise ValueError(
                "deterministic samples by the computation of training, where that is: leave out "
                "rollout.mesh, rollout.devices and rollout.processes"
            )
        return self

    @model_validator(mode="after")
    def _may_score_early(self) -> Self:
        rewards = self.rewards
        if not self.rollout.score_early:
            return self
        if self.deterministic:
            raise ValueError(
                "deterministic samples all tokens first: set rollout.score_early: false"
            )
        if rewards is None or rewards.models or rewards.judges or not rewards.functions:
            raise ValueError(
                "rollout.score_early is for reward functions alone (rewards.functions): leave it "
                "out, or models and judges"
            )
        return self

    @model_validator(mode="after")
    def _divides(self) -> Self:
        rows, parts = self.rows_per_update, self.data.micro_batches
        total = self.rollout.num_prompts * self.rollout.group_size
        if total % self.num_minibatches or rows % parts:
            raise ValueError(
                f"{total} completions (rollout.num_prompts x group_size) do not divide into "
                f"{self.num_minibatches} minibatches of {parts} micro-batches"
            )
        return self

    def training_mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Of the devices that do not only sample (`rollout.devices`, `rollout.processes`).

        Raises: UserError: if they do not fit the mesh, or none is left.
        """
        devices = jax.devices() if devices is None else devices
        return make_mesh(self.mesh, self.rollout.training_devices(devices))

    @property
    def num_minibatches(self) -> int:
        """Parts that the completions of an iteration are split into."""
        raise NotImplementedError

    @property
    def rows_per_update(self) -> int:
        return self.rollout.num_prompts * self.rollout.group_size // self.num_minibatches


def check_staleness(rollout: RolloutConfig, importance_cap: float | None) -> None:
    """Raises: ValueError: if what older weights sample would be trained on as if they had not."""
    if rollout.max_staleness and importance_cap is None:
        raise ValueError(
            f"rollout.max_staleness={rollout.max_staleness}: what older weights have sampled is "
            "to be weighed; add algorithm: {old_logps: trainer, importance_cap: 2.0}"
        )


class GrpoData(RlData):
    """As RlData, with prompts that completions share."""

    num_sharing: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Completions of a prompt that are computed beside one copy of it in a row, which is as long as
    all of them together; 1: each after a copy of its own. auto: on CPUs, where prompts may be as
    long as completions or longer, a whole group, or as many as a micro-batch would have rows; else
    1, as fused attention knows no branches. The gradient is the same."""


class GrpoConfig(RlConfig):
    """`phase: grpo`."""

    phase: Literal["grpo"]
    data: GrpoData
    algorithm: AlgorithmConfig = Field(default_factory=lambda: AlgorithmConfig(**{}))

    @model_validator(mode="after")
    def _weighs_what_is_stale(self) -> Self:
        check_staleness(self.rollout, self.algorithm.importance_cap)
        return self

    @property
    def num_minibatches(self) -> int:
        return self.algorithm.num_minibatches

    def num_sharing(self, mesh: Mesh) -> int:
        """`data.num_sharing` as a number, at most a group."""
        limits, asked = self.rollout, self.data.num_sharing
        if self.deterministic:
            return 1
        if asked != "auto":
            return min(asked, limits.group_size)
        is_cpu = mesh.devices.flat[0].platform == "cpu"
        if not is_cpu or limits.max_prompt_tokens < limits.max_tokens:
            return 1
        # No more than that: a micro-batch that fitted into memory still does.
        rows = self.rows_per_update // self.data.micro_batches // batch_shards(mesh)
        return max(1, min(rows, limits.group_size))
