"""What a phase compiles, with what it would be given: made to be compiled and not to be run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

PARAMS, OPTIMIZER, FROZEN = "parameters", "optimizer", "frozen base"
REFERENCE, BATCH, KV, OTHER = "reference", "batch", "KV cache", "other"


@dataclass(frozen=True)
class Program:
    """One compiled function.

    Attributes:
      name: such as "train step".
      lower: traces it for abstract arguments.
      roles: what the arguments are: names in a pytree that is a prefix of the tuple of them.
      resident: by role, what lies on the devices while it runs, among the arguments or not.
      times: how often it runs in an iteration of the loop.
      dynamic_trips: turns of its loops whose number depends on data.
      gradients: what it computes that has the shape of these: gradients, a part of its temporaries.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    roles: tuple[Any, ...]
    resident: Mapping[str, Any]
    times: float = 1.0
    dynamic_trips: int = 1
    gradients: Any = None


@dataclass(frozen=True)
class Programs:
    """Those of a phase.

    Attributes:
      all: in the order of an iteration.
      num_tokens: that an iteration processes, at most: rows are taken to be full.
      steps: iterations.
      notes: what was taken for granted, in sentences.
    """

    all: list[Program]
    num_tokens: float
    steps: int
    notes: list[str] = field(default_factory=list)


def state_roles() -> Any:
    """Of a `TrainState`."""
    from alignjax.train.state import TrainState

    return TrainState(OTHER, PARAMS, OPTIMIZER, OTHER, REFERENCE, OTHER)
