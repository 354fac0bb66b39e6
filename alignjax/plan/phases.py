"""A config of a phase -> the programs that it compiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from alignjax.phases.grpo_config import RlConfig
from alignjax.plan import critiqued, given, responses, sampled, taught
from alignjax.plan.programs import Programs
from alignjax.plan.shapes import Shapes
from alignjax.sharding import MeshConfig, make_mesh

PLANNED: dict[str, Callable[..., Programs]] = {
    "sft": given.sft,
    "reward": given.reward,
    "preference": given.preference,
    "grpo": sampled.grpo,
    "ppo": sampled.ppo,
    "online_preference": taught.online_preference,
    "distill": taught.distill,
    "online_distill": taught.online_distill,
    "sample": responses.responses,
    "reject": responses.responses,
    "label": responses.label,
    "critique": critiqued.critique,
}
"""The name of a phase -> what gives its programs for a config, a mesh and shapes; of phases that
sample as they train also for the mesh of devices that only sample."""


def programs_of(
    config: Any, devices: Sequence[jax.Device], shapes: Shapes
) -> tuple[Mesh, Programs]:
    """What a phase compiles on these devices, and the mesh of those that train, or of all.

    Raises:
      UserError: if the devices do not fit its meshes, or something says no shape of a model.
      NotPlannedError: if it cannot be planned.
    """
    if not isinstance(config, RlConfig) or not config.rollout.is_apart:
        mesh = make_mesh(config.mesh, devices)
        return mesh, PLANNED[config.phase](config, mesh, shapes)
    mesh = config.training_mesh(devices)
    training = {*mesh.devices.flat}
    apart = make_mesh(
        config.rollout.mesh or MeshConfig(),
        [device for device in devices if device not in training],
        name="rollout.mesh",
    )
    return mesh, PLANNED[config.phase](config, mesh, shapes, apart)
