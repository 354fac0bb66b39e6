"""PRNG key + names and numbers -> PRNG key. No key is ever used twice."""

import zlib

import jax


def named_key(key: jax.Array, *path: str | int) -> jax.Array:
    """Folds names and numbers into a key: `named_key(key, "sample", step)`.

    Args:
      key: PRNG key; left usable, since folding does not consume it.
      path: names (by their CRC-32) and numbers, in order.
    """
    for part in path:
        key = jax.random.fold_in(key, zlib.crc32(part.encode()) if isinstance(part, str) else part)
    return key
