"""What a phase compiles, with what it would be given: made to be compiled and not to be run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from alignjax.core.errors import UserError
from alignjax.core.types import Params
from alignjax.train.state import TrainState
from alignjax.train.step import Batch, Step


class NotPlannedError(UserError):
    """A phase that runs, but cannot be planned; the message says why, and names it."""


PARAMS, OPTIMIZER, FROZEN = "parameters", "optimizer", "frozen base"
REFERENCE, BATCH, KV, OTHER = "reference", "batch", "KV cache", "other"
STATE = TrainState(OTHER, PARAMS, OPTIMIZER, OTHER, REFERENCE, OTHER, OTHER)
"""The roles of a state's parts."""


@dataclass(frozen=True)
class Program:
    """One compiled function.

    Attributes:
      name: such as "train step".
      lower: traces it for abstract arguments.
      roles: what the arguments are: names in a pytree that is a prefix of the tuple of them.
      resident: by role, what lies on the devices while it runs, among the arguments or not.
      times: how often it runs in an iteration of the loop.
      gradients: what it computes that has the shape of these: gradients, a part of its temporaries.
      model_flops: what its mathematics takes on all devices (`plan.work`); 0 where nobody asks.
      apart: of devices that only sample, where those run it; None: those that train.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    roles: tuple[Any, ...]
    resident: Mapping[str, Any]
    times: float = 1.0
    gradients: Any = None
    model_flops: float = 0.0
    apart: Mesh | None = None

    def with_flops(self, model_flops: float) -> Program:
        return dataclasses.replace(self, model_flops=model_flops)

    def on(self, apart: Mesh) -> Program:
        return dataclasses.replace(self, apart=apart)

    def called(self, name: str, times: float) -> Program:
        """The same for somebody, so many times as often."""
        return dataclasses.replace(self, name=f"{name}: {self.name}", times=self.times * times)


@dataclass(frozen=True)
class Programs:
    """Those of a phase.

    Attributes:
      all: in the order of an iteration.
      num_tokens: that an iteration processes, at most: rows are taken to be full.
      steps: iterations.
      is_ahead: devices that only sample do so while the others train; False: in turn.
      notes: what was taken for granted, in sentences.
    """

    all: list[Program]
    num_tokens: float
    steps: int
    notes: list[str] = field(default_factory=list)
    is_ahead: bool = False


def train_step(
    step: Step,
    state: TrainState,
    batch: Batch,
    frozen: Params | None,
    *,
    roles: TrainState = STATE,
    frozen_roles: Any = FROZEN,
    times: float = 1.0,
    beside: Mapping[str, Any] | None = None,
) -> Program:
    """An update.

    Args:
      frozen: what it is given besides, such as the base under LoRA.
      roles, frozen_roles: of the parts of the state and of what is frozen.
      beside: by role, what else lies on the devices.
    """
    resident = {PARAMS: state.params, OPTIMIZER: state.opt_state, FROZEN: frozen, **(beside or {})}
    return Program(
        "train step",
        lambda: step.lower(state, batch),
        (roles, frozen_roles, BATCH),
        resident,
        times=times,
        gradients=state.params,
    )
