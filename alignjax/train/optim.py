"""OptimizerConfig -> an optax transformation and its learning-rate schedule."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from optax.contrib import (
    ScheduleFreeState,
    scale_by_muon,
    schedule_free,
    schedule_free_eval_params,
)
from pydantic import Field, model_validator

from alignjax.core.config import Config
from alignjax.core.types import Params
from alignjax.train.matrices import are_matrices, layer_matrices
from alignjax.train.moments import Kind, stored

_MUON_RMS = 0.2
"""Root mean square of an update of Muon, about that of AdamW, so that both take the same learning
rate (arXiv:2502.16982 sec. 2.2)."""
_ADAFACTOR_CLIP = 1.0
"""The same for Adafactor, at most (arXiv:1804.04235 sec. 6)."""


class OptimizerConfig(Config):
    """An optimizer with global-norm clipping, warm-up and decay."""

    name: Literal["adamw", "adafactor", "muon", "schedule_free"] = "adamw"
    """adamw: arXiv:1711.05101. adafactor (arXiv:1804.04235): one number for each row and column in
    place of both moments; no momentum, learning_rate as of adamw. muon (arXiv:2502.16982): matrices
    of layers move by their momentum made orthogonal, all else by adamw. schedule_free
    (arXiv:2405.15682): adamw that averages instead of decaying; evaluations and exported models are
    of the average."""
    learning_rate: float = Field(1e-4, gt=0, allow_inf_nan=False)
    """Peak, after warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: no change, or a decay over the remaining updates."""
    warmup_steps: int = Field(0, ge=0)
    """Updates over which the rate grows linearly from 0."""
    final_frac: float = Field(0.1, ge=0, le=1)
    """Share of the peak at which a decay ends."""
    b1: float = Field(0.9, ge=0, lt=1)
    """Of the first moment; of schedule_free how near gradients are taken to the average. Adafactor
    has none."""
    b2: float = Field(0.95, ge=0, lt=1)
    """Of the second moment; adafactor's is 1 - t^-0.8 in update t."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment; adafactor has none."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Of muon's matrices, with Nesterov's step."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Decoupled; on matrices only, not on norms and biases."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients with a larger global norm are scaled down to it."""
    moments: Kind = "float32"
    """How the moments of matrices are kept: bfloat16 takes half the memory, int8, with a scale for
    each 128 of them, a quarter. Both are rounded at random (`train.moments`)."""

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        if self.name == "adafactor" and self.moments != "float32":
            raise ValueError(
                f"moments={self.moments!r}: adafactor has sums over rows and columns in place of "
                "moments, which are small already; leave moments out, or use adamw"
            )
        if self.name == "schedule_free" and (self.schedule != "constant" or self.b1 == 0):
            raise ValueError(
                f"schedule_free averages in place of a decay, and b1 > 0 says how: schedule="
                f"{self.schedule!r}, b1={self.b1}; use schedule: constant, and b1 of 0.9 or more"
            )
        return self


class Optimizer(NamedTuple):
    """A pair of pure functions (`transform.init`, `transform.update`) and the rate by update."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule


def make_optimizer(
    config: OptimizerConfig,
    num_updates: int,
    *,
    scales: Mapping[str, float] = MappingProxyType({}),
) -> Optimizer:
    """Builds the optimizer for a run of `num_updates` updates.

    Args:
      scales: for parts of the parameters, by their key at the top, so many times the learning rate.
    """
    schedule = _schedule(config, num_updates)
    rule = optax.chain(
        _DIRECTIONS[config.name](config),
        optax.add_decayed_weights(config.weight_decay, mask=are_matrices),
        optax.scale_by_learning_rate(schedule),
    )
    rule = _scaled(rule, scales)
    if config.name == "schedule_free":
        # optax counts from 1 there and from 0 elsewhere.
        rule = schedule_free(rule, lambda count: schedule(count - 1), config.b1)
    transform = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), rule)
    return Optimizer(_in_float32(transform), schedule)


def averaged(params: Params, opt_state: optax.OptState) -> Params:
    """What to evaluate and to export: params, but with schedule_free the average that they are
    near to, in their own types."""
    is_state = lambda x: isinstance(x, ScheduleFreeState)  # noqa: E731
    for state in filter(is_state, jax.tree.leaves(opt_state, is_leaf=is_state)):
        found = schedule_free_eval_params(state, params)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), found, params)
    return params


def _schedule(config: OptimizerConfig, num_updates: int) -> optax.Schedule:
    peak, final = config.learning_rate, config.learning_rate * config.final_frac
    decay_steps = max(1, num_updates - config.warmup_steps)
    after: optax.Schedule
    match config.schedule:
        case "constant":
            after = optax.constant_schedule(peak)
        case "linear":
            after = optax.linear_schedule(peak, final, decay_steps)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, decay_steps, config.final_frac)
    if not config.warmup_steps:
        return after
    # The first update has a rate above 0: update i of the warm-up takes (i + 1) / warmup_steps.
    start = peak / config.warmup_steps
    warmup = optax.linear_schedule(start, peak, max(1, config.warmup_steps - 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def _adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    return stored(optax.scale_by_adam(config.b1, config.b2, config.eps), config.moments)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    def clip(path: tuple, update: Array) -> Array:
        # Of each layer by itself, as if they were not stacked.
        is_stacked = any(getattr(part, "key", None) == "layers" for part in path)
        axes = tuple(range(1 if is_stacked else 0, update.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=axes, keepdims=True))
        return update / jnp.maximum(1.0, rms / _ADAFACTOR_CLIP)

    clipped = optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(clip, updates))
    return optax.chain(optax.scale_by_factored_rms(), clipped)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    momentum = scale_by_muon(
        beta=config.muon_momentum, eps=config.eps, weight_dimension_numbers=layer_matrices
    )

    def size(update: Array, axes: Any) -> Array:
        rows, columns = (
            math.prod(update.shape[axis] for axis in np.atleast_1d(each)) for each in axes
        )
        return _MUON_RMS * math.sqrt(max(rows, columns)) * update

    sized = optax.stateless(lambda updates, _: jax.tree.map(size, updates, layer_matrices(updates)))

    def labels(params: Params) -> Params:
        axes = layer_matrices(params)
        return jax.tree.map(lambda _, axes: "adamw" if axes is None else "muon", params, axes)

    rules = {"muon": optax.chain(stored(momentum, config.moments), sized), "adamw": _adamw(config)}
    return optax.partition(rules, labels)


def _schedule_free(config: OptimizerConfig) -> optax.GradientTransformation:
    rms = optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True)
    return stored(rms, config.moments)


_DIRECTIONS: Mapping[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "muon": _muon,
    "schedule_free": _schedule_free,
}
"""By name: gradients -> the direction of an update, before the decay of weights and the rate."""


def _scaled(
    transform: optax.GradientTransformation, scales: Mapping[str, float]
) -> optax.GradientTransformation:
    """The same, with some parts of each update scaled."""

    def update(
        grads: Params, state: optax.OptState, params: Params | None = None
    ) -> tuple[Params, optax.OptState]:
        updates, state = transform.update(grads, state, params)
        scaled: dict[str, Any] = {
            name: jax.tree.map(lambda x, scale=scale: scale * x, updates[name])
            for name, scale in scales.items()
        }
        return {**updates, **scaled} if scaled else updates, state

    return optax.GradientTransformation(transform.init, update)


def _in_float32(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Moments, gradients and updates in float32, whatever the type of the parameters."""

    def cast(tree: Params) -> Params:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Params) -> optax.OptState:
        return transform.init(cast(params))

    def update(
        grads: Params, state: optax.OptState, params: Params | None = None
    ) -> tuple[Params, optax.OptState]:
        return transform.update(cast(grads), state, None if params is None else cast(params))

    return optax.GradientTransformation(init, update)
