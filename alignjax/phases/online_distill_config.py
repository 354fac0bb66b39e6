"""What can be set of on-policy distillation."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from alignjax.phases.grpo_config import RlConfig
from alignjax.phases.online_preference_config import UpdatesConfig
from alignjax.phases.ppo_config import PpoRollout
from alignjax.phases.teacher import DivergenceConfig, TeacherConfig
from alignjax.rewards.combine import RewardConfig


class OnlineDivergenceConfig(DivergenceConfig):
    """How far the student is from the teacher, on what the student samples."""

    kind: Literal["forward_kl", "reverse_kl", "jsd", "sampled_reverse_kl"] = "reverse_kl"
    """As of phase: distill, of whole distributions at each token; or sampled_reverse_kl, which
    looks at the sampled token alone: a policy gradient with the teacher's log-prob less the
    student's as its advantage."""

    @model_validator(mode="after")
    def _is_sampled(self) -> Self:
        if self.kind == "sampled_reverse_kl" and self.temperature != 1:
            raise ValueError(
                f"temperature={self.temperature}: what is sampled is compared at "
                "rollout.temperature: set that one, and leave this one out"
            )
        return self


class OnlineDistillConfig(RlConfig):
    """`phase: online_distill`."""

    phase: Literal["online_distill"]
    teacher: TeacherConfig
    divergence: OnlineDivergenceConfig = OnlineDivergenceConfig()
    rollout: PpoRollout = PpoRollout()
    algorithm: UpdatesConfig = UpdatesConfig()
    rewards: RewardConfig | None = None  # type: ignore[assignment]
    """What is measured of the samples, such as accuracy; nothing is trained on it."""

    @property
    def num_minibatches(self) -> int:
        return self.algorithm.num_minibatches
