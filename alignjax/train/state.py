"""Everything on the device that changes during a run, as one pytree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from alignjax.core.types import Params
from alignjax.sharding import fetch


class TrainState(NamedTuple):
    """What a checkpoint holds, beside the position in the data.

    Frozen things (a reference that never moves, a reward model, the base under LoRA) are inputs of
    a phase and not here.
    """

    step: Array
    """[] int32; iterations completed: one collection of data and the updates on it."""
    params: Params
    """What is trained: under LoRA the adapters alone."""
    opt_state: optax.OptState
    key: Array
    """PRNG key of the run. It is never consumed: names and `step` are folded into it."""
    reference: Params | None = None
    """The reference policy where it is refreshed during the run, else None."""
    extra: Any = None
    """What else changes during a run, such as the coefficient of a KL: a pytree of arrays."""
    behaviour: tuple[Params, ...] = ()
    """Earlier `params`, the oldest first, which sample what the next iterations train on; on the
    devices that do, or of other processes on those that train (`phases.disaggregated`). Empty where
    the params themselves sample."""

    def on_host(self) -> tuple[int, np.ndarray]:
        """Step and key, in every process, all of which ask."""
        step, key = fetch((self.step, self.key))
        return int(step), key


def create_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: Array,
    *,
    reference: Params | None = None,
    extra: Any = None,
) -> TrainState:
    """The state before the first step, all of it on the devices of the params.

    Optimizer moments are created with the params' shardings; everything else is replicated.
    """
    state = TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.init(params), key, reference, extra
    )
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, NamedSharding):
        return state
    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, replicated),
        state,
    )
