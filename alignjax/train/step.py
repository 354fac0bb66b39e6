"""A loss function and an optimizer -> one jitted update: (state, batch) -> (state, metrics)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from alignjax.core.keys import named_key
from alignjax.core.types import Maximum, Minimum, Params, Weighted
from alignjax.models.lora import combine
from alignjax.train.optim import Optimizer
from alignjax.train.rounding import apply_updates
from alignjax.train.state import TrainState

Metric = Weighted | Maximum | Minimum
Metrics = Mapping[str, Metric]
Batch = Mapping[str, Array]
"""Arrays [M, R, T]: M micro-batches of R rows. `mask` says which tokens are targets."""
LossFn = Callable[[Params, Batch], tuple[Weighted, Metrics]]
"""Params and one micro-batch [R, T] -> the loss as a sum and its weight, and metrics likewise. The
weight must depend on the batch alone, not on the params."""


def merge(a: Metric, b: Metric) -> Metric:
    """Combines the same metric of two micro-batches, exactly as if they had been one."""
    match a, b:
        case Weighted(), Weighted():
            return Weighted(a.total + b.total, a.weight + b.weight)
        case Maximum(), Maximum():
            return Maximum(jnp.maximum(a.value, b.value))
        case Minimum(), Minimum():
            return Minimum(jnp.minimum(a.value, b.value))
    raise TypeError(f"cannot merge {type(a).__name__} with {type(b).__name__}")


def finalize(metric: Metric) -> Array:
    """A mean, or the extreme value; 0 for a mean over nothing."""
    if isinstance(metric, Weighted):
        return jnp.where(metric.weight > 0, metric.total / jnp.maximum(metric.weight, 1e-30), 0.0)
    return metric.value


def accumulate(function: Callable[[Batch], Any], batch: Batch) -> Any:
    """Sums `function(micro_batch)`, a pytree of sums and metrics, over the micro-batches by a scan.

    A micro-batch without a single target is skipped at run time: filling rows densely and leaving
    the last micro-batches empty saves their time without a new shape, hence without recompiling.
    """
    is_metric = lambda leaf: isinstance(leaf, (Weighted, Maximum, Minimum))  # noqa: E731

    def add(a: Any, b: Any) -> Any:
        return merge(a, b) if is_metric(a) else a + b

    def neutral(leaf: Any) -> Any:
        fill = lambda value: lambda x: jnp.full(x.shape, value, x.dtype)  # noqa: E731
        value = {Maximum: -jnp.inf, Minimum: jnp.inf}.get(type(leaf), 0.0)
        return jax.tree.map(fill(value), leaf)

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], batch))
    zero = jax.tree.map(neutral, shapes, is_leaf=is_metric)

    def body(carry: Any, micro_batch: Batch) -> tuple[Any, None]:
        new = jax.lax.cond(jnp.any(micro_batch["mask"]), function, lambda _: zero, micro_batch)
        return jax.tree.map(add, carry, new, is_leaf=is_metric), None

    return jax.lax.scan(body, zero, batch)[0]


def over_micro_batches(function: Callable[[Batch], Any], batch: Batch) -> Any:
    """`function` of each micro-batch, stacked; zeros, and no work, for those without a target."""
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.map(
        lambda mb: jax.lax.cond(jnp.any(mb["mask"]), function, lambda _: zeros, mb), batch
    )


class Step:
    """(state, batch) -> (state, metrics), compiled for the shardings in which a state first comes.

    The state is donated, and comes back in those shardings.
    """

    def __init__(self, function: Callable[..., Any], frozen: Params | None):
        """Args: function: (state, frozen, batch) -> (state, metrics); frozen: what it is given."""
        self._function, self._frozen = function, frozen
        self._compiled: Any = None

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        behaviour, state = state.behaviour, state._replace(behaviour=())  # It is on other devices.
        if self._compiled is None:
            self._compiled = self._jitted(state)
        state, metrics = self._compiled(state, self._frozen, batch)
        return state._replace(behaviour=behaviour), metrics

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The same, of arrays that may be abstract (`jax.ShapeDtypeStruct` with a sharding)."""
        return self._jitted(state).lower(state, self._frozen, batch)

    def _jitted(self, state: TrainState) -> Any:
        # Left to itself the compiler may move the state, and each move compiles everything that
        # reads it once more.
        kept = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(self._function, donate_argnums=0, out_shardings=(kept, None))


def make_step(loss_fn: LossFn, optimizer: Optimizer, frozen: Params | None = None) -> Step:
    """One update on the global batch; the state is donated.

    Gradients of the sums are added over micro-batches and divided once by the global weight, so the
    split over micro-batches and devices changes nothing but rounding. An update whose gradient is
    not finite, or whose batch has no targets, leaves params and optimizer as they were and is
    counted in `num_skipped_updates`.

    Args:
      frozen: parameters that `loss_fn` gets besides those of the state, and that have no gradient
        and no optimizer state, such as the base under LoRA. An input of the compiled step, which is
        neither copied nor donated.
    Returns:
      A jitted function (state, batch) -> (state, metrics); `state.step` is the loop's to advance.
    """

    def one(
        params: Params, frozen: Params | None, micro_batch: Batch
    ) -> tuple[Weighted, Metrics, Params]:
        def total(params: Params) -> tuple[Array, tuple[Array, Metrics]]:
            whole = params if frozen is None else combine(frozen, params)
            loss, metrics = loss_fn(whole, micro_batch)
            return loss.total, (jax.lax.stop_gradient(loss.weight), metrics)

        (value, (weight, metrics)), grads = jax.value_and_grad(total, has_aux=True)(params)
        # Bfloat16 parameters have bfloat16 gradients, which no sum over micro-batches should have.
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return Weighted(value, weight), metrics, grads

    def step(
        state: TrainState, frozen: Params | None, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        loss, metrics, grads = accumulate(lambda mb: one(state.params, frozen, mb), batch)
        scale = jnp.where(loss.weight > 0, 1 / jnp.maximum(loss.weight, 1e-30), 0.0)
        grads = jax.tree.map(lambda g: g * scale, grads)
        grad_norm = optax.tree.norm(grads)
        count = optax.tree.get_all_with_path(state.opt_state, "count")[0][1]
        updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.params)
        # The norm of a large gradient overflows before its entries do: look at the updates, too.
        is_good = jnp.isfinite(grad_norm + optax.tree.norm(updates)) & (loss.weight > 0)
        key = jax.random.fold_in(named_key(state.key, "rounding"), count)
        params = apply_updates(state.params, updates, key)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_good, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        out = {name: finalize(metric) for name, metric in metrics.items()}
        out |= {
            "loss": finalize(loss),
            "grad_norm": grad_norm,
            "learning_rate": optimizer.schedule(count),
            "num_skipped_updates": 1.0 - is_good,
        }
        return state._replace(params=params, opt_state=opt_state), out

    return Step(step, frozen)


def make_evaluate(loss_fn: LossFn) -> Callable[[Params, Batch], tuple[Weighted, Metrics]]:
    """The loss and metrics of a batch without gradients, still as sums, jitted."""
    return jax.jit(lambda params, batch: accumulate(lambda mb: loss_fn(params, mb), batch))
