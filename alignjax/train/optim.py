"""OptimizerConfig -> an optax transformation and its learning-rate schedule."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from pydantic import Field

from alignjax.core.config import Config
from alignjax.core.types import Params


class OptimizerConfig(Config):
    """AdamW (arXiv:1711.05101) with global-norm clipping, warm-up and decay."""

    learning_rate: float = Field(1e-4, gt=0, allow_inf_nan=False)
    """Peak, after warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: no change, or a decay over the remaining updates."""
    warmup_steps: int = Field(0, ge=0)
    """Updates over which the rate grows linearly from 0."""
    final_frac: float = Field(0.1, ge=0, le=1)
    """Share of the peak at which a decay ends."""
    b1: float = Field(0.9, ge=0, lt=1)
    b2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Decoupled; on matrices only, not on norms and biases."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients with a larger global norm are scaled down to it."""


class Optimizer(NamedTuple):
    """A pair of pure functions (`transform.init`, `transform.update`) and the rate by update."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule


def make_optimizer(config: OptimizerConfig, num_updates: int) -> Optimizer:
    """Builds the optimizer for a run of `num_updates` updates."""
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
    schedule = after
    if config.warmup_steps:
        # The first update has a rate above 0: update i of the warm-up takes (i + 1) / warmup_steps.
        start = peak / config.warmup_steps
        warmup = optax.linear_schedule(start, peak, max(1, config.warmup_steps - 1))
        schedule = optax.join_schedules([warmup, after], [config.warmup_steps])
    transform = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            schedule, config.b1, config.b2, config.eps,
            weight_decay=config.weight_decay, mask=_is_matrix,
        ),
    )  # fmt: skip
    return Optimizer(_in_float32(transform), schedule)


def with_scale(optimizer: Optimizer, name: str, scale: float) -> Optimizer:
    """The same, with `scale` times the learning rate for the parameters under the key `name`."""
    transform = optimizer.transform

    def update(
        grads: Params, state: optax.OptState, params: Params | None = None
    ) -> tuple[Params, optax.OptState]:
        updates, state = transform.update(grads, state, params)
        scaled = jax.tree.map(lambda x: scale * x, updates[name])
        return {**updates, name: scaled}, state

    changed = optax.GradientTransformation(transform.init, update)
    return optimizer._replace(transform=changed)


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


def _is_matrix(params: Params) -> Params:
    """True for leaves that are matrices in one layer. Biases and norm scales are vectors there, but
    carry a leading layer axis when stacked, so names decide, not ranks."""

    def decide(path: tuple, leaf: jax.Array) -> bool:
        names = [str(getattr(part, "key", part)) for part in path]
        vectors = "norm", "bias", "magnitude"
        return leaf.ndim >= 2 and not any(v in name for v in vectors for name in names)

    return jax.tree_util.tree_map_with_path(decide, params)
