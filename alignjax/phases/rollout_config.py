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
    """So many of the devices, the last ones (of each process as many), only sample (and score by
    models); mesh is of the others, and these get the weights after each iteration. 0: all do both,
    in turn."""
    processes: int = Field(0, ge=0)
    """So many of the processes, the last ones, only sample (and score by models); mesh is of the
    devices of the others. Instead of `devices`, where whole hosts are to sample."""
    max_staleness: int = Field(0, ge=0)
    """Iterations that the weights which sample are behind those which train. 0: in turn. 1: the
    devices or processes sample the next iteration while the others train on this one. Each
    iteration takes one more copy of the weights there (of `processes`, where they train), and in
    checkpoints."""

    @field_validator("group_size")
    @classmethod
    def _is_group(cls, size: int) -> int:
        if size < 2:
            raise ValueError(f"group_size={size} gives no baseline; use at least 2")
        return size

    @model_validator(mode="after")
    def _has_devices(self) -> Self:
        if self.max_staleness and not self.is_apart:
            raise ValueError(
                f"max_staleness={self.max_staleness}: to sample while others train takes devices "
                "of its own; give devices or processes, or leave max_staleness out"
            )
        if self.devices and self.processes:
            raise ValueError(
                f"devices={self.devices} of each process and processes={self.processes} as a "
                "whole cannot both sample; give one of them"
            )
        if self.processes and self.max_staleness > 1:
            # They come between two rounds of sampling, when all that is in flight is done.
            raise ValueError(
                f"max_staleness={self.max_staleness} with processes={self.processes}: weights that "
                "go to another process gain nothing from more than 1"
            )
        return self

    @property
    def is_apart(self) -> bool:
        """Whether the devices that sample do not train."""
        return self.devices > 0 or self.processes > 0

    def training_devices(self, devices: Sequence[jax.Device]) -> Sequence[jax.Device]:
        """Of all devices those that train.

        Raises:
          UserError: if too few are left, or weights could not go from these to the others part by
            part, all of them within their process or none.
        """
        if not self.is_apart:
            return devices
        num, total = len({device.process_index for device in devices}), len(devices)
        if self.processes:
            training = [d for d in devices if d.process_index < num - self.processes]
            sizes = len(training), total - len(training)
            if not training or max(sizes) % min(sizes):
                raise UserError(
                    f"rollout.processes={self.processes} of {num} process(es) leaves "
                    f"{sizes[0]} of {total} device(s) to train: expected a number that divides "
                    "that of the others, or is a multiple of it; and 2 processes at least"
                )
            return training
        each = total // num
        fitting = [n * num for n in range(1, each) if max(n, each - n) % min(n, each - n) == 0]
        if self.devices not in fitting:
            known = ", ".join(map(str, fitting)) or "none: it takes 2 devices at least"
            processes = "" if num == 1 else f" of {num} processes"
            raise UserError(
                f"rollout.devices={self.devices} of {total} device(s){processes} leaves "
                f"{max(total - self.devices, 0)} to train: expected a number that divides the "
                "other, so that the weights go from device to device, of each process as many; "
                f"what does: {known}"
            )
        sampling = {*_last_of_each(devices, self.devices // num)}
        return [device for device in devices if device not in sampling]

    def sampling_mesh(self, mesh: Mesh) -> Mesh:
        """The mesh that samples, beside the one that trains.

        Raises:
          UserError: if rollout.mesh does not fit its devices.
          ValueError: if `mesh` has devices that should only sample.
        """
        config = MeshConfig() if self.mesh is None else self.mesh
        training = [*mesh.devices.flat]
        if self.is_apart:
            others = [device for device in jax.devices() if device not in {*training}]
            if self.devices:
                others = _last_of_each(others, self.devices // jax.process_count())
            if len(others) < self.devices:
                raise ValueError(
                    f"a mesh of {len(training)} of {len(jax.devices())} devices leaves no "
                    f"{self.devices} to sample: make it by `RlConfig.training_mesh`"
                )
            made = make_mesh(config, others, name="rollout.mesh")
            order = [*made.devices.flat]
            if self.devices:
                order = _beside(training, order)
        elif self.mesh is None:
            return mesh
        else:
            made = make_mesh(config, training, name="rollout.mesh")
            # As they train, so that one program can move arrays between the two.
            order = training
        devices = np.reshape(order, made.devices.shape)
        return Mesh(devices, made.axis_names, axis_types=made.axis_types)


def _last_of_each(devices: Sequence[jax.Device], num: int) -> list[jax.Device]:
    """The last so many of each process."""
    found: list[jax.Device] = []
    for process in sorted({device.process_index for device in devices}):
        found += [device for device in devices if device.process_index == process][-num:]
    return found


def _beside(training: Sequence[jax.Device], sampling: Sequence[jax.Device]) -> list[jax.Device]:
    """The devices that sample, each in the process of the one that it gets its weights from."""
    left, found = [*sampling], []
    for place in range(len(sampling)):
        process = training[place * len(training) // len(sampling)].process_index
        near = next((device for device in left if device.process_index == process), None)
        if near is None:
            raise UserError(
                f"rollout.devices={len(sampling)}: with this mesh, weights would go from process "
                "to process; use half the devices"
            )
        left.remove(near)
        found.append(near)
    return found
