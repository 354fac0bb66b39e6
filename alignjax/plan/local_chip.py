"""This machine's processor -> the figures of a chip, measured in a second or two."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from alignjax.plan.chips import Chip

_WIDTH = 1536
"""Of the square matrices whose product is timed."""
_WORDS = 2**26
"""Float32 in the array that is read and written: more than caches hold."""


def measured_cpu(dtype: jnp.dtype | str = jnp.float32) -> Chip:
    """The chip "cpu": one core, by its processor time.

    Args:
      dtype: of the products that are timed; `bf16_flops` is theirs.
    Returns:
      A chip whose devices share one memory, at whose bandwidth they exchange what they exchange.
    """
    device = jax.devices("cpu")[0]
    with jax.default_device(device):
        x = jnp.ones((_WIDTH, _WIDTH), dtype)
        product_s = cpu_seconds(jax.jit(jnp.dot), x, x)
        words = [jnp.ones(_WORDS, jnp.float32)]
        add_one = jax.jit(lambda x: x + 1.0, donate_argnums=0)

        def stream() -> None:  # In place: new pages would be timed too.
            words[0] = jax.block_until_ready(add_one(words[0]))

        bandwidth = 2 * words[0].nbytes / cpu_seconds(stream)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Chip("cpu", 2 * _WIDTH**3 / product_s, memory, bandwidth, bandwidth, bandwidth)


def cpu_seconds(function: Callable[..., object], *args: object, num_times: int = 5) -> float:
    """Processor time of a call, of all threads together: the least of several, after a first one.

    What else runs on the machine takes none of it, but slows it down by the caches it shares.
    """
    jax.block_until_ready(function(*args))
    found = []
    for _ in range(num_times):
        start = time.process_time()
        jax.block_until_ready(function(*args))
        found.append(time.process_time() - start)
    return min(found)
