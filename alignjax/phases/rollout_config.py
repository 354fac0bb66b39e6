"""What can be set of how an iteration's prompts are sampled, and which devices do it."""

from collections.abc import Sequence
from typing import Self

import jax
import numpy as np
from jax.sharding import Mesh
from pydantic import Field, field_validator, model_validator

from alignjax.core.config import Config
from alignjax.core.errors import UserError
from alignjax.sharding import MeshConfig, make_mesh


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
    score_early: bool = False
    """Score completions while others are still being sampled; the scores are the same. It pays
    where reward functions take long. Not with models or judges, which would share the devices or
    compare samples."""
    int8_kv: bool = False
    """Keeps keys and values of rollouts as int8 codes, to save memory. Log-probs are recorded as
    they were sampled from: how far those of training are from them is logged."""
    int8_weights: bool = False
    """Samples from the kernels of the layers as int8 codes, made anew in each iteration."""
    mesh: MeshConfig | None = None
    """How the weights lie while they sample, as {tensor: 8} where mesh says {fsdp: 8}: they are
    moved on the devices for each round, and dropped before the updates. null: as they train, or
    with `devices` whole on each of these."""
    devices: int = Field(0, ge=0)
    """So many of the devices, the last ones, only sample (and score by models); mesh is of the
    others, and these get the weights after each iteration. 0: all do both, in turn."""
    max_staleness: int = Field(0, ge=0)
    """Iterations that the weights which sample are behind those which train. 0: in turn. 1: the
    `devices` sample the next iteration while the others train on this one. Each iteration takes one
    more copy of the weights there, and in checkpoints."""

    @field_validator("group_size")
    @classmethod
    def _is_group(cls, size: int) -> int:
        if size < 2:
            raise ValueError(f"group_size={size} gives no baseline; use at least 2")
        return size

    @model_validator(mode="after")
    def _has_devices(self) -> Self:
        if self.max_staleness and not self.devices:
            raise ValueError(
                f"max_staleness={self.max_staleness}: to sample while others train takes devices "
                "of its own; give devices, or leave max_staleness out"
            )
        return self

    def training_devices(self, devices: Sequence[jax.Device]) -> Sequence[jax.Device]:
        """Of all devices those that train.

        Raises:
          UserError: if too few are left, or weights could not go from these to the others part by
            part; or if there are several processes.
        """
        if not self.devices:
            return devices
        if jax.process_count() > 1:
            raise UserError(
                f"rollout.devices={self.devices}: devices that only sample are of a single process "
                "so far: leave it out, or use one host"
            )
        total, rest = len(devices), len(devices) - self.devices
        fitting = [n for n in range(1, total) if max(n, total - n) % min(n, total - n) == 0]
        if self.devices not in fitting:
            known = ", ".join(map(str, fitting)) or "none: it takes 2 devices at least"
            raise UserError(
                f"rollout.devices={self.devices} of {total} device(s) leaves {max(rest, 0)} to "
                "train: expected a number that divides the other, so that the weights go from "
                f"device to device; what does: {known}"
            )
        return devices[:rest]

    def sampling_mesh(self, mesh: Mesh) -> Mesh:
        """The mesh that samples, beside the one that trains.

        Raises:
          UserError: if rollout.mesh does not fit its devices.
          ValueError: if `mesh` has devices that should only sample.
        """
        config = MeshConfig() if self.mesh is None else self.mesh
        if self.devices:
            training = {*mesh.devices.flat}
            others = [device for device in jax.devices() if device not in training]
            if len(others) < self.devices:
                raise ValueError(
                    f"a mesh of {len(training)} of {len(jax.devices())} devices leaves no "
                    f"{self.devices} to sample: make it by `RlConfig.training_mesh`"
                )
            return make_mesh(config, others[-self.devices :], name="rollout.mesh")
        if self.mesh is None:
            return mesh
        made = make_mesh(config, [*mesh.devices.flat], name="rollout.mesh")
        # In the order in which they train, so that one program can move arrays between the two.
        devices = np.reshape([*mesh.devices.flat], made.devices.shape)
        return Mesh(devices, made.axis_names, axis_types=made.axis_types)
