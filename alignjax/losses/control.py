"""The KL that was measured -> the coefficient of the KL penalty: (state, kl) -> state.

The state is an array, part of what a run saves. A KL that is nan, as that of a step without a
token, leaves the coefficient as it was; it is for whoever logs the KL to show it. An infinite KL is
a very large one.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array


class KlControl(NamedTuple):
    """State of a controller."""

    kl_coef: Array
    """[] float32; reward units for each nat."""


def fixed_kl_control(state: KlControl, kl: Array) -> KlControl:
    """The coefficient stays as it is.

    Args:
      state: kl_coef [] float32, > 0.
      kl: [] float32, nats; mean over sequences of the KL from the reference. Gradient stopped.
    Returns:
      KlControl.
    Raises:
      AssertionError: at trace time, if kl is not a scalar.
    """
    chex.assert_rank(kl, 0)
    return state


def adaptive_kl_control(
    state: KlControl, kl: Array, *, target: float = 6.0, horizon: int = 10_000, num_samples: int
) -> KlControl:
    """kl_coef (1 + clip(KL / target - 1, -0.2, 0.2) num_samples / horizon).

    Args:
      state, kl: as in `fixed_kl_control`.
      target: nats for each sequence; where the KL is to stay.
      horizon: samples; in so many the coefficient changes by a factor of about exp(0.2) at most.
      num_samples: samples; how many sequences kl is the mean of.
    Returns:
      KlControl.
    Raises:
      AssertionError: at trace time, if kl is not a scalar.
      ValueError: unless target > 0 and 0 < num_samples < 5 horizon: beyond, kl_coef could be < 0.
    Source: arXiv:1909.08593 sec. 2.2, whose gain of 0.1 is num_samples / horizon in its code.
    """
    _check_target(target)
    if not 0 < num_samples < 5 * horizon:
        raise ValueError(
            f"num_samples={num_samples}, horizon={horizon}: expected 0 < num_samples < 5 * horizon"
        )
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return _scaled(state, kl, 1.0 + error * (num_samples / horizon))


def target_kl_control(state: KlControl, kl: Array, *, target: float) -> KlControl:
    """kl_coef doubled if KL > 1.5 target, halved if KL < target / 1.5.

    Args:
      state, kl: as in `fixed_kl_control`; kl may be of any unit that target has.
      target: nats; where the KL is to stay.
    Returns:
      KlControl.
    Raises:
      AssertionError: at trace time, if kl is not a scalar.
      ValueError: unless target > 0.
    Source: arXiv:1707.06347 sec. 4 (PPO with an adaptive KL penalty, the loss of eq. 8).
    """
    _check_target(target)
    factor = jnp.where(kl > 1.5 * target, 2.0, jnp.where(kl < target / 1.5, 0.5, 1.0))
    return _scaled(state, kl, factor)


def _scaled(state: KlControl, kl: Array, factor: Array) -> KlControl:
    chex.assert_rank(kl, 0)
    kl_coef = jnp.where(jnp.isnan(kl), state.kl_coef, state.kl_coef * factor)
    return KlControl(jax.lax.stop_gradient(kl_coef).astype(state.kl_coef.dtype))


def _check_target(target: float) -> None:
    if target <= 0:
        raise ValueError(f"target={target}: expected target > 0")
