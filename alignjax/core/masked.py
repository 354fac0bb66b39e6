"""Arrays and a mask -> reductions of the masked entries; whatever lies off mask is never read.

Masking is by `where`, never by multiplying: nan * 0 is nan. The gradient off mask is exactly 0, and
it is finite everywhere, an empty mask and a zero standard deviation included.
"""

import chex
import jax.numpy as jnp
from jax import Array

Axis = int | tuple[int, ...] | None


def clean(where: Array, *arrays: Array, rank: int) -> tuple[Array, ...]:
    """Checks arrays of one shape and returns them in at least float32, 0 off mask.

    What comes after can neither read nor differentiate through anything off mask, where even a
    result that is thrown away would make a nan of the gradient: inf * 0 is nan.

    Args:
      where: bool of rank `rank`; True on the entries that count.
      arrays: floating, each of the shape of `where`. Carry gradient. Off mask they may be anything.
      rank: number of axes that all must have.
    Returns:
      Each array in float32, or in float64 if that is what came; bfloat16 and float16 are cast.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    """
    chex.assert_rank([where, *arrays], rank)
    chex.assert_equal_shape([where, *arrays])
    chex.assert_type(where, bool)
    for i, x in enumerate(arrays):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise AssertionError(f"array {i} after the mask is {x.dtype}: expected a float type")
    return tuple(jnp.where(where, x.astype(at_least_float32(x)), 0.0) for x in arrays)


def at_least_float32(x: Array) -> jnp.dtype:
    """The type that sums of x are made in: float32, or float64 if x is."""
    return jnp.promote_types(x.dtype, jnp.float32)


def sum(x: Array, where: Array, axis: Axis = None, *, keepdims: bool = False) -> Array:
    """Sum of the entries under the mask; 0 if there are none.

    Args:
      x: floating, of any shape. Carries gradient. Off mask it may be anything, even inf or nan.
      where: bool of the same shape; True on the entries that count.
      axis: axis or axes to reduce; all by default.
      keepdims: whether reduced axes stay with length 1.
    Returns:
      float32 (float64 if x is), reduced over `axis`.
    Raises:
      AssertionError: at trace time, if the shapes differ or `where` is not bool.
    """
    chex.assert_equal_shape([x, where])
    chex.assert_type(where, bool)
    kind = at_least_float32(x)
    return jnp.sum(jnp.where(where, x, 0.0), axis, dtype=kind, keepdims=keepdims)


def mean(x: Array, where: Array, axis: Axis = None, *, keepdims: bool = False) -> Array:
    """Mean of the entries under the mask; 0 if there are none. Arguments as in `sum`."""
    count = jnp.sum(where, axis, dtype=jnp.float32, keepdims=keepdims)
    return sum(x, where, axis, keepdims=keepdims) / jnp.maximum(count, 1.0)


def std(
    x: Array, where: Array, axis: Axis = None, *, ddof: int = 0, keepdims: bool = False
) -> Array:
    """Standard deviation of the entries under the mask; 0 if there are no more than `ddof`.

    Arguments as in `sum`; the sum of squared deviations is divided by (count - ddof). Two passes,
    so that a large mean costs no precision.
    """
    count = jnp.sum(where, axis, dtype=jnp.float32, keepdims=keepdims)
    # Masked before it is squared: inf ** 2 has a nan gradient.
    deviation = jnp.where(where, x - mean(x, where, axis, keepdims=True), 0.0)
    freedom = count - ddof
    squares = sum(deviation**2, where, axis, keepdims=keepdims)
    variance = squares / jnp.maximum(freedom, 1.0)
    is_spread = (variance > 0.0) & (freedom > 0.0)
    # The square root has an infinite slope at 0: it must never see one.
    return jnp.where(is_spread, jnp.sqrt(jnp.where(is_spread, variance, 1.0)), 0.0)


def max(x: Array, where: Array, axis: Axis = None, *, keepdims: bool = False) -> Array:
    """Maximum of the entries under the mask; -inf if there are none. Arguments as in `sum`."""
    chex.assert_equal_shape([x, where])
    chex.assert_type(where, bool)
    return jnp.max(jnp.where(where, x, -jnp.inf), axis, keepdims=keepdims)


def min(x: Array, where: Array, axis: Axis = None, *, keepdims: bool = False) -> Array:
    """Minimum of the entries under the mask; inf if there are none. Arguments as in `sum`."""
    return -max(-x, where, axis, keepdims=keepdims)
