"""The critics of PPO: where their parameters start, what they compute, how they are written."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from alignjax.core.errors import UserError
from alignjax.core.precision import compute_dtype
from alignjax.core.processes import is_first
from alignjax.core.types import Params
from alignjax.models import ScalarModel, load, load_reward, lora, save_reward, save_value_head
from alignjax.models.heads import read_scalar, value_head
from alignjax.phases.common import Policy, appearing
from alignjax.phases.ppo_config import PpoConfig
from alignjax.phases.scoring import MOMENTS, check_same_ids, moments
from alignjax.rewards.combine import RewardModelConfig
from alignjax.sharding import copied
from alignjax.train.step import Batch


class Critic(Protocol):
    """What estimates the reward that is to come. Its parameters stand under `name`."""

    name: str

    def init(self, policy_params: Params, key: Array) -> Params:
        """Its parameters to start from, arrays of their own.

        Args:
          policy_params: those that the policy starts with, and trains.
        """
        ...

    def values(self, params: Params, batch: Batch, hidden: Array) -> Array:
        """The value of the state after each token, [R, T] float32.

        Args:
          params: of the policy and of the critic, by name.
          batch: token rows [R, T].
          hidden: [R, T, D]; the policy's, of the same rows.
        """
        ...

    def export(self, params: Params, path: Path) -> None:
        """Writes it into the directory `path`, beside that of the policy.

        Args:
          params: the critic's alone.
        """
        ...


def separate_values(model: ScalarModel, params: Params, batch: Batch) -> Array:
    """What a decoder and a head of their own say after each token of rows: [R, T] float32."""
    rows = batch["tokens"], batch["segment_ids"], batch["positions"]
    return model.apply(params, *rows)


class SeparateCritic:
    """A decoder and a head of its own. All of it trains, under LoRA too.

    One that starts as a reward model says at first, after a whole text, what that model's reward
    for it is: weight (score - mean) / std. The factor goes into its head and the rest is taken off
    its values, since no head has a bias.
    """

    name = "critic"

    def __init__(self, config: PpoConfig, policy: Policy, mesh: Mesh):
        """Raises: UserError: if the reward model that it starts as cannot be read, or does not go
        with the policy."""
        self._policy = policy
        source, path = config.model, _directory(config)
        dtype = compute_dtype(source.compute_dtype, mesh.devices.flat[0].platform)
        options: dict[str, Any] = {
            "mesh": mesh, "compute_dtype": dtype, "param_dtype": source.param_dtype,
            "remat": source.remat,
        }  # fmt: skip
        self._load = None if source.path is None else functools.partial(
            load, source.path, **options
        )  # fmt: skip
        self._load_reward: Callable[..., Any] | None = None
        self._scale, self._offset = 1.0, 0.0
        self._loaded: Params | None = None
        if path is None:
            plain = lora.plain(policy.model)
            # It has no use for an unembedding.
            tied = plain.config.model_copy(update={"tie_embeddings": True})
            self._model = ScalarModel(dataclasses.replace(plain, config=tied), value_head)
            return
        check_same_ids("critic.path", path, policy.tokenizer)
        same = [model for model in config.rewards.models.values() if model.path == path]
        reward = same[0] if same else RewardModelConfig(path=path)
        if reward.squash is not None:
            raise UserError(
                f"critic: the reward of {path} is squashed, so that no critic that starts as that "
                "model says what it will be; set critic.from_policy to true"
            )
        mean, std, _ = moments(f"critic ({path})", reward)
        self._scale = (reward.weight or 1.0) / std
        self._offset = self._scale * mean
        self._load_reward = functools.partial(load_reward, path, **options)
        self._model, self._loaded = self._load_reward()
        longest = config.rollout.max_prompt_tokens + config.rollout.max_tokens
        context = self._model.decoder.config.max_position_embeddings
        if longest > context:
            raise UserError(
                f"critic: a prompt and its completion have up to {longest} tokens, but {path} has "
                f"a context of {context}; lower rollout.max_prompt_tokens or max_tokens"
            )

    def init(self, policy_params: Params, key: Array) -> Params:
        if self._load_reward is not None:
            # What is given away is donated by the first update: asked again, it is read again.
            loaded, self._loaded = self._loaded, None
            params = self._load_reward()[1] if loaded is None else loaded
            return {**params, "head": {"kernel": self._scale * params["head"]["kernel"]}}
        trunk = copied(policy_params) if self._load is None else self._load()[1]
        return self._model.on({k: v for k, v in trunk.items() if k != "unembedding"}, key)

    def values(self, params: Params, batch: Batch, hidden: Array) -> Array:
        del hidden
        return separate_values(self._model, params[self.name], batch) - self._offset

    def export(self, params: Params, path: Path) -> None:
        """A reward model's directory, that `critic.path` and `models.load_reward` read."""
        with appearing(path) as temporary:
            ids = self._policy.token_ids
            save_reward(temporary, self._model, params, extra_config=ids)
            known = {"mean": self._offset, "std": 1.0}
            if is_first():
                (temporary / MOMENTS).write_text(json.dumps(known) + "\n", encoding="utf-8")
                self._policy.tokenizer.save(str(temporary))


class SharedCritic:
    """A head on the policy's hidden states, whose loss the policy's trunk feels, too."""

    name = "value_head"

    def __init__(self, config: PpoConfig, policy: Policy, mesh: Mesh):
        del config, mesh
        self._hidden_size = policy.model.config.hidden_size

    def init(self, policy_params: Params, key: Array) -> Params:
        del policy_params
        return value_head(key, self._hidden_size)

    def values(self, params: Params, batch: Batch, hidden: Array) -> Array:
        del batch
        return read_scalar(params[self.name], hidden)

    def export(self, params: Params, path: Path) -> None:
        """`value_head.safetensors`, that `models.load_value_head` reads."""
        with appearing(path) as temporary:
            save_value_head(temporary, params)


CRITICS: dict[str, Any] = {"separate": SeparateCritic, "shared": SharedCritic}
"""By `critic.trunk`: config, policy, mesh -> a `Critic`."""


def _directory(config: PpoConfig) -> str | None:
    """The reward model that a critic starts as, if any."""
    if config.critic.path is not None or config.critic.from_policy:
        return config.critic.path
    return next((model.path for model in config.rewards.models.values()), None)


def state_values(values: Array) -> Array:
    """[R, T] values of the states after each token -> of those in which each was chosen.

    A state is what stands before a token, so its value is read at the token before. At the first
    token of a sequence, which nobody chose, the result means nothing.
    """
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0)))
