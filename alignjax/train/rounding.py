"""Parameters and their update -> new parameters, which bfloat16 must round at random."""

import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core.keys import named_key
from alignjax.core.types import Params


def stochastic_round(x: Array, key: Array) -> Array:
    """Rounds to one of the two neighbours in bfloat16, the nearer one more often: E[result] = x.

    Rounded to the nearest instead, a parameter stays where it is for good if each update is below
    half the distance to its neighbour, 1/512 to 1/256 of it.

    Args:
      x: [...] float32.
      key: PRNG key.
    Returns:
      [...] bfloat16; values that bfloat16 has, infinities and nan come back as they are. A finite x
      beyond the largest of bfloat16 becomes that or infinity.
    Source: arXiv:1502.02551 sec. 3. The 16 bits that bfloat16 drops are a fraction of the distance
      to the next value: a random one is added, and what does not carry over is cut off.
    """
    if x.dtype != jnp.float32:
        raise TypeError(f"x is {x.dtype}: expected float32")
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = ((bits + noise) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(kept, jnp.bfloat16)
    # The payload of a nan would carry over into its sign.
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def apply_updates(params: Params, updates: Params, key: Array) -> Params:
    """Adds updates to parameters: those in bfloat16 are rounded by `stochastic_round`.

    Args:
      params: pytree of float32 or bfloat16 arrays.
      updates: the same tree in float32.
      key: PRNG key, another one for each update; each parameter folds its path into it.
    Raises:
      TypeError: on parameters of another type, whose rounding nobody has thought about.
    """

    def add(path: tuple, param: Array, update: Array) -> Array:
        if param.dtype == jnp.float32:
            return param + update
        if param.dtype == jnp.bfloat16:
            name = jax.tree_util.keystr(path)
            return stochastic_round(param.astype(jnp.float32) + update, named_key(key, name))
        raise TypeError(f"{jax.tree_util.keystr(path)} is {param.dtype}: float32 or bfloat16")

    return jax.tree_util.tree_map_with_path(add, params, updates)
