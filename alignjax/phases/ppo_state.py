"""What changes in a run of PPO besides parameters: scores, the price of the KL, the position."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from alignjax import losses
from alignjax.core.types import Params
from alignjax.data import RecordIterator
from alignjax.losses import KlControl, RunningMoments
from alignjax.phases.common import Policy
from alignjax.phases.ppo_config import PpoAlgorithm, PpoConfig
from alignjax.rewards.rollout import Rollouts


class Extra(NamedTuple):
    """`TrainState.extra`: what changes besides parameters."""

    control: KlControl
    moments: RunningMoments
    """Of the scores so far; as at first unless `algorithm.scale_scores`."""


@dataclass(frozen=True)
class PpoRecords:
    """Prompts, and the texts of ptx if there are any; their position is that of both."""

    prompts: RecordIterator[Any]
    texts: RecordIterator[Any] | None

    def get_state(self) -> dict[str, Any]:
        texts = None if self.texts is None else self.texts.get_state()
        return {"prompts": self.prompts.get_state(), "texts": texts}

    def set_state(self, state: dict[str, Any]) -> None:
        self.prompts.set_state(state["prompts"])
        if self.texts is not None:
            self.texts.set_state(state["texts"])


class PolicyOfPpo:
    """As `Policy`, of params in which it stands beside a critic."""

    def __init__(self, config: PpoConfig, mesh: Mesh):
        self._policy = Policy(config, mesh)

    def init(self, key: Array) -> Params:
        return {"policy": self._policy.init(key)}

    def export(self, params: Params, path: Path, **files: Any) -> None:
        self._policy.export(params["policy"], path, **files)

    def export_adapter(self, params: Params, path: Path) -> None:
        self._policy.export_adapter(params["policy"], path)


def trained_scores(
    algorithm: PpoAlgorithm, moments: RunningMoments, rollouts: Rollouts
) -> tuple[RunningMoments, np.ndarray]:
    """Moments with the new rewards, and the scores that are trained on.

    Returns:
      moments; scores, one for each completion, float32, nan where the reward failed.
    """
    rewards = rollouts.rewards
    is_valid = np.isfinite(rewards)
    found = jnp.asarray(rewards)
    if algorithm.scale_scores:
        moments = losses.update_moments(moments, found, is_valid)
        found = losses.normalize_rewards(moments, found, is_valid, shift_mean=False)
    if algorithm.missing_eos_penalty:
        has_eos = jnp.asarray(~rollouts.is_truncated.reshape(rewards.shape))
        found = losses.missing_eos_penalty(
            found, has_eos, jnp.asarray(is_valid), penalty=algorithm.missing_eos_penalty
        )
    return moments, np.where(is_valid, np.asarray(found), np.nan).reshape(-1)


CONTROLS: Mapping[str, Callable[..., KlControl]] = {
    "fixed": lambda state, kl, algorithm, num_samples: losses.fixed_kl_control(state, kl),
    "adaptive": lambda state, kl, algorithm, num_samples: losses.adaptive_kl_control(
        state, kl,
        target=algorithm.kl_target, horizon=algorithm.kl_horizon, num_samples=num_samples,
    ),
    "target": lambda state, kl, algorithm, num_samples: losses.target_kl_control(
        state, kl, target=algorithm.kl_target
    ),
}  # fmt: skip
"""By `algorithm.kl_control`."""


def controlled(
    algorithm: PpoAlgorithm, control: KlControl, kl: float, num_samples: int
) -> KlControl:
    """The price of the KL in the next iteration.

    Args:
      kl: nats; mean over the completions of this one.
      num_samples: completions that it is the mean of.
    """
    return CONTROLS[algorithm.kl_control](control, jnp.float32(kl), algorithm, num_samples)
