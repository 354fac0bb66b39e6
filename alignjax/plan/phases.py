"""The name of a phase -> the programs that it compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from alignjax.plan import given, responses, sampled, taught
from alignjax.plan.programs import Programs
from alignjax.plan.shapes import Shapes

PLANNED: dict[str, Callable[[Any, Mesh, Shapes], Programs]] = {
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
}
"""Phases that can be planned."""
