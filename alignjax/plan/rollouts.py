"""What is compiled to sample with a policy that trains: where it trains, in another layout on the
same devices, or on devices of their own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from alignjax.core.errors import UserError
from alignjax.models import lora
from alignjax.phases.grpo_config import RlConfig
from alignjax.phases.rollout_devices import RolloutDevices
from alignjax.plan import weights
from alignjax.plan.memory import tree_bytes
from alignjax.plan.programs import PARAMS, Program, Programs
from alignjax.plan.responses import NOTES, scorers_of
from alignjax.plan.sampling import sampling
from alignjax.plan.scorer import Samples, Scorer
from alignjax.plan.shapes import Shapes
from alignjax.sharding import shardings

MOVED, SENT, KEPT = "moved weights", "sent weights", "kept weights"


@dataclass(frozen=True)
class Sampled:
    """How a policy is sampled.

    Attributes:
      config: of the phase.
      mesh: of the devices that train.
      apart: of devices that only sample; None: all do both.
      scorers: what scores samples, on the devices that sample.
    """

    config: RlConfig
    mesh: Mesh
    apart: Mesh | None
    scorers: list[Scorer]

    @classmethod
    def of(cls, config: RlConfig, mesh: Mesh, apart: Mesh | None, shapes: Shapes) -> Sampled:
        """Raises: UserError: if it samples as no accelerator does."""
        if config.deterministic:
            raise UserError(
                "deterministic: true samples as one device of a CPU does, to look for faults: "
                "leave it out to plan"
            )
        where = mesh if apart is None else apart
        return cls(config, mesh, apart, scorers_of(config.rewards, where, shapes))

    def beside(self, policy: weights.Weights) -> dict[str, Any]:
        """By their roles, the parameters that lie where the policy trains: of scorers, or those
        kept that sample in other processes (`phases.rollout_devices.Weights.kept`)."""
        if self.apart is None:
            return {one.role: one.params for one in self.scorers}
        limits = self.config.rollout
        return {KEPT: (policy.params,) * limits.max_staleness} if limits.processes else {}

    def programs(self, policy: weights.Weights, resident: dict[str, Any]) -> list[Program]:
        """Of an iteration: what moves the weights, samples and scores.

        Args:
          resident: what lies on the devices that train.
        """
        limits = self.config.rollout
        if self.apart is not None:
            return self._apart(policy, resident, self.apart)
        model, where, role, found = policy.model, self.mesh, PARAMS, []
        whole, beside = policy.whole(policy.params), resident
        if limits.mesh is not None:
            devices = RolloutDevices(limits, self.mesh)
            model, where, role = devices.model(model), devices.mesh, MOVED
            moved = weights.placed(whole, shardings(model.logical_axes(), where, whole))
            found.append(_move("move the weights", whole, moved, PARAMS, resident))
            whole, beside = moved, {**resident, MOVED: moved}
        found += sampling(
            model, whole, limits, where, beside, num_samples=limits.group_size, role=role
        )
        return found + self._scored(resident)

    def iteration(self, policy: weights.Weights, programs: list[Program]) -> Programs:
        """All programs of an iteration."""
        is_ahead, notes = self.config.rollout.max_staleness > 0, list(NOTES)
        if self.apart is not None:
            sent, target = self._sent(policy, self.apart)
            size = tree_bytes(target if sent is None else sent) / 1e9
            lasts = "the longer of both" if is_ahead else "both, one after the other"
            notes.append(
                f"{self.apart.size} devices only sample, {self.mesh.size} train: an iteration "
                f"takes {lasts}. After it {size:.3g} GB of weights go to each that samples, which "
                "is in no time here"
            )
        notes += [note for one in self.scorers for note in one.notes]
        num_tokens, steps = num_tokens_of(self.config), self.config.loop.steps
        return Programs(programs, num_tokens, steps, notes, is_ahead)

    def _apart(
        self, policy: weights.Weights, resident: dict[str, Any], apart: Mesh
    ) -> list[Program]:
        """As `phases.rollout_devices.Weights` and `phases.disaggregated.Ahead`: the weights of each
        iteration that is in flight lie as they were sent, and those that sample as they compute."""
        limits, model = self.config.rollout, dataclasses.replace(policy.model, mesh=apart)
        sent, trained = self._sent(policy, apart)
        whole = trained
        if policy.frozen is not None:
            axes = lora.split(model.logical_axes())[1]
            frozen = weights.placed(policy.frozen, shardings(axes, apart, policy.frozen))
            whole = lora.combine(frozen, trained)
        copies = limits.max_staleness + 1
        beside = {one.role: one.params for one in self.scorers}
        if sent is None:  # They arrive as they compute.
            target = jax.tree.map(lambda x: _repeated(x, self.mesh), trained)
            first = _move("lay out the weights", policy.params, target, PARAMS, resident)
            beside |= {MOVED: (whole, *(trained,) * (copies - 1))}
        else:
            beside |= {SENT: (sent,) * copies}
            first = _move("lay out the weights", sent, trained, SENT, beside, apart)
            beside |= {MOVED: whole}
        found = sampling(
            model, whole, limits, apart, beside, num_samples=limits.group_size, role=MOVED
        )
        found += self._scored(beside)
        return [first, *(one.on(apart) for one in found)]

    def _sent(self, policy: weights.Weights, apart: Mesh) -> tuple[Any, Any]:
        """What trains, as it arrives on devices that are more than those that train, else None; and
        as it lies there to compute."""
        axes = policy.model.logical_axes()
        if policy.frozen is not None:
            axes, _ = lora.split(axes)
        target = weights.placed(policy.params, shardings(axes, apart, policy.params))
        if apart.size <= self.mesh.size:
            return None, target
        return jax.tree.map(lambda x: _repeated(x, apart), policy.params), target

    def _scored(self, resident: dict[str, Any]) -> list[Program]:
        samples = Samples.of(self.config.rollout, self.config.rollout.group_size)
        return [each for one in self.scorers for each in one.programs(resident, samples)]


def longest_of(config: RlConfig) -> int:
    return config.rollout.max_prompt_tokens + config.rollout.max_tokens


def num_tokens_of(config: RlConfig) -> float:
    return float(config.rollout.num_prompts * config.rollout.group_size * longest_of(config))


def _move(
    name: str, given: Any, wanted: Any, role: str, resident: Any, apart: Mesh | None = None
) -> Program:
    """Arrays in one layout -> the same in another, on the same devices. All in one program; when it
    runs they go one after the other, which takes less memory."""
    targets = jax.tree.map(lambda x: x.sharding, wanted)
    function = jax.jit(lambda arrays: arrays, out_shardings=targets)
    return Program(name, lambda: function.lower(given), (role,), resident, apart=apart)


def _repeated(x: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The parts of an array that other devices have, on the devices of a mesh that are a multiple
    of those: each part as many times, as `sharding.sent` lays them out."""
    assert isinstance(x.sharding, NamedSharding)
    axes = x.sharding.mesh
    wider = Mesh(
        np.reshape([*mesh.devices.flat], (*axes.devices.shape, -1)),
        (*axes.axis_names, "copies"),
        axis_types=(AxisType.Auto,) * (1 + len(axes.axis_names)),
    )
    where = NamedSharding(wider, x.sharding.spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
